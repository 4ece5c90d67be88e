"""Background work during the streaming pass: hashing the base, verifying the vocabulary, several blocks at once."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune_converters import gguf
from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.errors import AdapterError, CheckpointError, TokenizerError
from edgetune_converters.files.hashed_file import HashedFile
from edgetune_converters.files.ordered_pool import run_in_order, split_threads
from edgetune_converters.merging import stream
from edgetune_converters.provenance.hashing import InputHasher
from edgetune_converters.provenance.receipts import Receipt, combined_hash
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.tokenizers import convert, verify_ids
from tests.converters import tiny
from tests.export_requests import export


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.adapter(base, tmp_path_factory.mktemp("adapter") / "adapter")


# -- the base's hash ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 200_000])
def test_a_late_hash_gives_the_same_files(limit: int | None, base: Path, tmp_path: Path) -> None:
    """With expected hashes the header is right from the start; without them it is completed at the end."""
    identity = Checkpoint(base).identity()
    made = []
    for folder, expected in (("late", None), ("early", identity), ("half", {"config.json": identity["config.json"]})):
        (receipt,) = export(
            base, {"q8_0": tmp_path / folder / "x.gguf"}, expected_base=expected, split_max_size=limit, name="x"
        )
        receipt.write()
        Receipt.read(Path(receipt.artifact)).check()
        made.append({path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.gguf")})
    assert made[0] == made[1] == made[2]
    first = next(iter(sorted((tmp_path / "late").glob("*.gguf"))))
    assert gguf.read(first).metadata["edgetune.base.sha256"] == combined_hash(identity)


def test_a_wrong_base_ends_the_pass_before_its_end(base: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def slowly(done: int, total: int) -> None:
        seen.append((done, total))
        time.sleep(0.05)

    with pytest.raises(AdapterError, match=r"not the base .*: config\.json, model-00002.* differ$"):
        export(
            base,
            {"f32": tmp_path / "x.gguf"},
            expected_base={"config.json": "0", "model-00002-of-00006.safetensors": "1"},
            progress=slowly,
        )
    assert len(seen) < 20
    assert all(done < total for done, total in seen)
    assert not list(tmp_path.iterdir())


def test_a_wrong_base_is_found_however_late_its_hash_comes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = InputHasher._digest

    def late(hashing: InputHasher, path: Path) -> str:
        time.sleep(0.05)
        return digest(hashing, path)

    monkeypatch.setattr(InputHasher, "_digest", late)
    with pytest.raises(AdapterError, match=r"not the base .*: model-00002.* differs"):
        export(base, {"q8_0": tmp_path / "x.gguf"}, expected_base={"model-00002-of-00006.safetensors": "0"})
    assert not list(tmp_path.iterdir())


def test_a_base_that_vanishes_is_reported_in_one_sentence(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    checkpoint = Checkpoint(copy)
    (copy / "model-00003-of-00006.safetensors").unlink()
    with (
        InputHasher(checkpoint, None, None) as hashing,
        pytest.raises(CheckpointError, match=r"cannot read .*No such file"),
    ):
        hashing.result()


def test_hashing_stops_when_the_export_does(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(20 * 10**9)  # would take more than ten seconds
    checkpoint = Checkpoint(base)
    checkpoint._files = {path: None}  # type: ignore[dict-item]
    began = threading.active_count()
    with InputHasher(checkpoint, None, None):
        assert threading.active_count() > began
    assert threading.active_count() == began


def test_what_is_written_is_hashed(tmp_path: Path) -> None:
    pieces = [np.random.default_rng(i).bytes(size) for i, size in enumerate((1, 0, 300_000, 7, 1_000_000))]
    for beginning in (b"", b"x" * 100):
        file = HashedFile(tmp_path / "x")
        try:
            for piece in pieces:
                file.write(piece)
            file.fix_header(beginning)
            digest = file.hexdigest()
        finally:
            file.close()
        wanted = beginning + b"".join(pieces)[len(beginning) :]
        assert (tmp_path / "x").read_bytes() == wanted
        assert digest == hashlib.sha256(wanted).hexdigest()


# -- the proof of the vocabulary ---------------------------------------------------------------------------------------


def test_a_vocabulary_that_fails_verification_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = threading.Event()

    def failing(*arguments: Any) -> Any:
        assert began.wait(10)  # the pass has begun by then
        return verify_ids.IdComparison(1, [verify_ids.IdDifference("text", [1], [2])], [])

    monkeypatch.setattr(convert, "verify", failing)
    with pytest.raises(TokenizerError, match="does not cut text as the tokenizer"):
        export(base, {"f32": tmp_path / "x.gguf"}, progress=lambda done, total: began.set())
    assert not list(tmp_path.iterdir())


def test_the_pass_restarts_with_the_vocabulary_that_is_verified(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first way of writing it is shown to be wrong; what is then written is what the second one gives."""
    began = threading.Event()
    candidates = convert._candidates

    def two(*arguments: Any) -> Any:
        candidate = next(iter(candidates(*arguments)))
        return iter([replace(candidate, pre="gpt-2"), replace(candidate, pre="llama-bpe")])

    def verify(files: Any, metadata: Any, *rest: Any) -> Any:
        wrong = metadata["tokenizer.ggml.pre"].data == "gpt-2"
        assert not wrong or began.wait(10)
        return verify_ids.IdComparison(1, [verify_ids.IdDifference("text", [1], [2])] if wrong else [], [])

    monkeypatch.setattr(convert, "_candidates", two)
    monkeypatch.setattr(convert, "verify", verify)
    (receipt,) = export(base, {"f32": tmp_path / "x.gguf"}, progress=lambda done, total: began.set())
    assert gguf.read(tmp_path / "x.gguf").metadata["tokenizer.ggml.pre"] == "llama-bpe"
    assert receipt.tokenizer["pre"] == "llama-bpe"
    receipt.write()
    Receipt.read(tmp_path / "x.gguf").check()


# -- several blocks at once --------------------------------------------------------------------------------------------


def test_the_number_of_threads_changes_no_byte(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream.MergedTensor.pieces, "__defaults__", (16 * 1024,))  # many blocks
    made = []
    for threads in (1, 2, 7):
        folder = tmp_path / str(threads)
        receipts = export(
            base, {"q4_0": folder / "a.gguf", "f16": folder / "b.gguf"}, safetensors={"bf16": folder / "m"},
            adapter=adapter, threads=threads, name="x", measure_survival=True, allow_fallback=True,
        )  # fmt: skip
        made.append((receipts[0].survival, [receipt.sha256 for receipt in receipts]))
    assert made[0] == made[1] == made[2]


def test_results_come_in_order_and_few_are_in_memory() -> None:
    alive, most, lock = 0, 0, threading.Lock()

    def call(number: int) -> int:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        time.sleep(0.001 * (number % 3))
        return number

    found = []
    for number in run_in_order((lambda number=number: call(number) for number in range(50)), 3):  # type: ignore[misc]
        found.append(number)
        with lock:
            alive -= 1
    assert found == list(range(50))
    assert 2 <= most <= 6


def test_an_error_is_raised_in_order_and_nothing_more_is_started() -> None:
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        if number == 5:
            raise KeyError(number)
        return number

    results = run_in_order((lambda number=number: call(number) for number in range(100)), 2)  # type: ignore[misc]
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError):
        next(results)
    assert max(begun) < 10


@pytest.mark.parametrize(("threads", "wanted"), [(1, (1, 1)), (2, (2, 1)), (4, (4, 1)), (5, (4, 2)), (64, (4, 16))])
def test_threads_are_divided_among_blocks(threads: int, wanted: tuple[int, int]) -> None:
    assert split_threads(threads) == wanted


def test_cached_stacks_of_experts_are_freed_with_their_adapter(adapter: Path) -> None:
    recent = Adapter(adapter).stacks
    assert recent is not Adapter(adapter).stacks
    pair = (np.zeros(1, np.float32), np.zeros(1, np.float32))
    for name in "abc":
        assert recent(name, lambda: pair) is pair
    assert recent("b", lambda: pytest.fail("read twice")) is pair
    assert list(recent._kept) == ["c", "b"]
