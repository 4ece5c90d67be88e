"""The statistics beside those of stock llama-perplexity, on the same base file and the same kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune.reference.llama_kld import KldBaseFile
from edgetune.validation import llama_perplexity
from tests.export_requests import export
from tests.validation import stock

ROOT = Path(__file__).parents[2]
BASE = ROOT / "samples/smart-home/base"
CONTEXT = 128


def digits(words: str) -> float:
    """Half a unit of the last digit that is printed."""
    if words.startswith("Cor"):
        return 0.005
    return 0.0005 if "Δp" in words or "top" in words else 0.0000005


def assert_same(ours: dict[str, tuple[float, float | None]], theirs: dict[str, tuple[float, float | None]]) -> None:
    """To 1e-4, and to the digits that are printed on either side."""
    assert ours.keys() == theirs.keys()
    assert len(theirs) == 34
    for words, (value, error) in theirs.items():
        found, found_error = ours[words]
        assert found == pytest.approx(value, rel=1e-4, abs=2.02 * digits(words)), words
        assert (error is None) == (found_error is None), words
        if error is not None:
            assert found_error == pytest.approx(error, rel=1e-4, abs=2.02 * digits(words)), words


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's own kind of sentence, 32 chunks of it."""
    lines = (ROOT / "samples/smart-home/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(str(turn["content"]) for row in rows for turn in row["messages"])[:12_000])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = {name: folder / f"{name}.gguf" for name in ("f32", "q8_0", "q4_0", "q2_k")}
    export(BASE, paths, allow_fallback=True)
    return paths


@pytest.fixture(scope="module")
def base(files: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by llama-perplexity itself."""
    path = tmp_path_factory.mktemp("base") / "base.kld"
    stock.write_base(files["f32"], text, path, CONTEXT, 1)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("type_", ["q8_0", "q4_0", "q2_k"])
def test_every_statistic_on_its_own_base_file(files: dict[str, Path], base: Path, type_: str) -> None:
    theirs = stock.statistics(files[type_], base, CONTEXT, 1)
    opened = KldBaseFile(base)
    assert opened.chunks >= 10
    figures = llama_perplexity.measure_against_base_file(opened, files[type_], 1, lambda *_: None)
    assert_same(stock.parsed("\n".join(llama_perplexity.format_statistics(figures))), theirs)


@pytest.mark.slow
def test_a_file_against_itself_has_the_floor_of_the_coding(files: dict[str, Path], base: Path) -> None:
    figures = llama_perplexity.measure_against_base_file(KldBaseFile(base), files["f32"], 1, lambda *_: None)
    assert abs(figures.kld.value) < 1e-4
    assert figures.same_top.value > 0.999


def test_lines_are_read_as_they_are_written() -> None:
    printed = "Mean PPL(Q)                   :  12.345678 ±   0.123456\n99.9%   Δp: -0.125%\nSame top p: 99.1 ± 0.2 %\n"
    assert stock.parsed(printed) == {
        "Mean PPL(Q)": (12.345678, 0.123456), "99.9%   Δp": (-0.125, None), "Same top p": (99.1, 0.2)
    }  # fmt: skip
