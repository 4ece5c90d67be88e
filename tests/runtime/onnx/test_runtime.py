"""What is ONNX Runtime's own behind the Runtime interface; what all runtimes do is in test_runtimes."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.runtime import RuntimeProblem, Sampling, load
from edgetune.runtime.interrupts import terminate_on_signal
from edgetune.runtime.onnx import runtime as implementation
from edgetune_converters.errors import ArtifactError
from tests.converters import tiny
from tests.runtime.scores import PROMPT, scored

IDS, POSITIONS = tiny.random_ids(200), list(range(1, 200))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "model")


def edit(folder: Path, change: Callable[[Any], None]) -> Path:
    """Change the graph, which keeps pointing to the same data."""
    proto = onnx.load_model(folder / "model.onnx", load_external_data=False)
    change(proto)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder


def configure(folder: Path, **entries: Any) -> Path:
    """Change the `model` section of genai_config.json."""
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"].update(entries)
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_the_graph_itself_can_be_named(folder: Path) -> None:
    with load(folder) as whole, load(folder / "model.onnx") as graph:
        assert list(graph.generate(PROMPT, Sampling(), 5)) == list(whole.generate(PROMPT, Sampling(), 5))


def test_blocks_of_logits_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(folder) as runtime:
        whole = scored(runtime, IDS, POSITIONS)
    monkeypatch.setattr(implementation, "_OUTPUT_BYTES", 7 * 4 * 523)
    monkeypatch.setattr(implementation, "_BATCH", 64)
    with load(folder) as bounded:
        blocks = [block.copy() for block in bounded.score(np.array(IDS, np.int32), np.array(POSITIONS))]
    assert {len(block) for block in blocks} <= {7, 3}
    np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-3)


@given(st.sets(st.integers(0, 400), min_size=1, max_size=30), st.integers(1, 70), st.integers(1, 70))
def test_pieces_cover_everything_within_the_bounds(wanted: set[int], batch: int, rows: int) -> None:
    places = np.array(sorted(wanted))
    pieces = list(implementation._pieces(places, batch, rows))
    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(places[-1] + 1))
    for start, stop in pieces:
        own = places[(places >= start) & (places < stop)]
        assert stop - start <= batch
        assert not len(own) or own[-1] - own[0] < rows


def test_a_prompt_in_several_pieces_is_the_same_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(folder) as runtime:
        whole = list(runtime.generate(IDS, Sampling(), 20))
    monkeypatch.setattr(implementation, "_BATCH", 33)
    with load(folder) as runtime:
        assert list(runtime.generate(IDS, Sampling(), 20)) == whole


def test_a_graph_without_logits_range_gives_the_same_scores(folder: Path, copy: Path) -> None:
    def without_range(proto: Any) -> None:
        inputs = proto.graph.input
        inputs.remove(next(entry for entry in inputs if entry.name == "logits_range"))

    with load(folder) as runtime, load(edit(copy, without_range)) as other:
        some = [3, 4, 50, 120, 199]
        np.testing.assert_allclose(scored(other, IDS, some), scored(runtime, IDS, some), atol=1e-3)
        assert list(other.generate(PROMPT, Sampling(), 9)) == list(runtime.generate(PROMPT, Sampling(), 9))


def test_inputs_and_outputs_are_named_by_genai_config(folder: Path, copy: Path) -> None:
    def rename(proto: Any) -> None:
        for entry in (*proto.graph.input, *proto.graph.output):
            entry.name = entry.name.replace("past_key_values.", "kv_in_").replace("present.", "kv_out_")
        for node in proto.graph.node:
            for names in (node.input, node.output):
                names[:] = [name.replace("past_key_values.", "kv_in_").replace("present.", "kv_out_") for name in names]

    edit(copy, rename)
    with pytest.raises(RuntimeProblem, match=r"past_key_values\.0\.key"):
        load(copy)
    decoder = json.loads((copy / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    decoder["inputs"] |= {"past_key_names": "kv_in_%d.key", "past_value_names": "kv_in_%d.value"}
    decoder["outputs"] |= {"present_key_names": "kv_out_%d.key", "present_value_names": "kv_out_%d.value"}
    with load(configure(copy, decoder=decoder)) as renamed, load(folder) as runtime:
        np.testing.assert_array_equal(scored(renamed, IDS, [7, 199]), scored(runtime, IDS, [7, 199]))


def test_the_cache_is_written_in_place(folder: Path) -> None:
    """A token appends its keys and values to a buffer that was allocated at the start."""
    with load(folder, context=64) as runtime:
        list(runtime.generate(PROMPT, Sampling(), 1))
        cache = runtime._decoder._cache  # type: ignore[attr-defined]
        before = [buffer.copy() for buffer in cache._buffers]
        list(runtime.generate(PROMPT, Sampling(), 2))
        for old, new in zip(before, cache._buffers, strict=True):
            assert new.shape == (1, 2, 64, 24)
            np.testing.assert_allclose(new[:, :, :20], old[:, :, :20], atol=1e-5)
            assert not old[:, :, 20:].any()
            assert new[:, :, 20].any()
            assert not new[:, :, 21:].any()


# -- signals -----------------------------------------------------------------------------------------------------------


class Options:
    terminate = False


@pytest.fixture
def deaf() -> Iterator[None]:
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, previous)


@pytest.mark.usefixtures("deaf")
def test_a_signal_terminates_and_nothing_else_does() -> None:
    options = Options()
    with terminate_on_signal(options):
        pass
    assert not options.terminate
    with terminate_on_signal(options):
        ctypes.CDLL(None).kill(os.getpid(), signal.SIGUSR1)
        while not options.terminate:
            pass
    assert signal.set_wakeup_fd(-1) == -1


def test_generation_works_in_another_thread(folder: Path) -> None:
    found: list[int] = []
    with load(folder) as runtime:
        thread = threading.Thread(target=lambda: found.extend(runtime.generate(PROMPT, Sampling(), 4)))
        thread.start()
        thread.join()
        assert found == list(runtime.generate(PROMPT, Sampling(), 4))


@pytest.mark.usefixtures("deaf")
def test_scores_are_unchanged_by_a_handled_signal(folder: Path) -> None:
    with load(folder) as runtime:
        undisturbed = scored(runtime, IDS, POSITIONS)
        stop = threading.Event()

        def disturb() -> None:
            while not stop.wait(0.0005):
                os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for _ in range(20):
                np.testing.assert_array_equal(scored(runtime, IDS, POSITIONS), undisturbed)
        finally:
            stop.set()
            thread.join()


# -- limits and files --------------------------------------------------------------------------------------------------


def test_a_context_longer_than_the_tables_is_refused(folder: Path) -> None:
    with pytest.raises(RuntimeProblem, match=r"257 tokens.*was made for 256") as error:
        load(folder, context=257)
    assert "256 or less" in str(error.value.hint)
    with load(folder, context=257, clip=True) as runtime:
        assert runtime.context == 256
        assert len(list(runtime.generate(IDS, Sampling(), 100))) == 256 - 200 + 1


def test_a_model_without_a_context_length_is_an_error(copy: Path) -> None:
    (copy / "genai_config.json").unlink()
    (copy / "config.json").unlink(missing_ok=True)
    with pytest.raises(RuntimeProblem, match="the length of the context"):
        load(copy)
    (copy / "config.json").write_text('{"max_position_embeddings": 100}', encoding="utf-8")
    with load(copy) as runtime:
        assert runtime.context == 100


def test_a_tokenizer_of_another_model_is_an_error(copy: Path) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    vocabulary |= {f"more{number}": number for number in range(len(vocabulary), 523)} | {"☃": 523}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(RuntimeProblem, match="has 524 tokens, the model only 523"):
        load(copy)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_or_malformed_tokenizer_is_an_error(copy: Path, content: str | None) -> None:
    (copy / "tokenizer.json").unlink()
    if content is not None:
        (copy / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(RuntimeProblem, match=r"tokenizer"):
        load(copy)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "", 3, "a/b.onnx"])
def test_a_graph_outside_the_folder_is_refused(copy: Path, name: Any) -> None:
    with pytest.raises(ArtifactError, match="not a file in its folder"):
        load(configure(copy, decoder={"filename": name}))
