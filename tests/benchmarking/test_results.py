"""The table and the JSON of measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.benchmarking.memory import MemorySpeed
from edgetune.benchmarking.results import BenchResults
from edgetune.benchmarking.speeds import Speed

PROMPT = Speed("pp512", 2, (200.0, 210.0, 220.0), 512, 0)
ANSWER = Speed("tg128", 2, (40.0, 41.0, 39.0), 0, 128)
STREAMS = Speed("32 streams", 2, (80.0,), 64, 32, streams=32, together=16, first_token=1.5)


def results(cache: int | None = 32 << 20) -> BenchResults:
    return BenchResults(
        Path("model.gguf"), "gguf", 1 << 30, 750_000_000, {"edgetune": "1.0"}, "a processor", cache,
        {2: MemorySpeed(2, 37.5e9, 30e9)}, [PROMPT, ANSWER, STREAMS],
    )  # fmt: skip


def test_the_table_has_the_columns_of_llama_bench_and_the_share_of_the_bandwidth() -> None:
    lines = results().table().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert cells[0] == ["model", "size", "threads", "test", "t/s", ""]
    assert cells[2] == ["model.gguf", "1024.00 MiB", "2", "pp512", "210.00 ± 10.00", ""]
    assert cells[3][3:] == ["tg128", "40.00 ± 1.00", "30.0 GB/s, 80% of the memory's bandwidth"]
    assert cells[4][3:] == ["32 streams", "80.00 ± 0.00", "2.50 each, first token after 1.50 s, 16 at once"]
    assert len({len(line) for line in lines[:5]}) == 1, "the columns are aligned"
    assert "memory, 2 threads: 37.5 GB/s read, 30.0 GB/s copied; a token reads 750.0 MB of weights" in lines
    assert lines[-1] == "a processor; edgetune 1.0"


@pytest.mark.parametrize(("cache", "is_said"), [(None, False), (32 << 20, False), (1 << 30, True)])
def test_weights_that_fit_the_cache_are_said(cache: int | None, is_said: bool) -> None:
    assert ("fit the processor's cache" in results(cache).table()) is is_said


def test_the_json_has_each_round_and_no_share_for_prompts_and_streams() -> None:
    found = results().to_json()
    prompt, answer, streams = found["tests"]
    assert prompt["samples"] == [200.0, 210.0, 220.0]
    assert prompt["tokens_per_second"] == 210.0
    assert prompt["deviation"] == pytest.approx(10)
    assert (prompt["bandwidth_share"], streams["bandwidth_share"]) == (None, None)
    assert answer["bandwidth_share"] == pytest.approx(0.8)
    assert (streams["streams"], streams["decoded_together"], streams["first_token_seconds"]) == (32, 16, 1.5)
    assert found["memory"][0]["bytes_per_second"] == 37.5e9
