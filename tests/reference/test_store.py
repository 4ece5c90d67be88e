"""What is stored of the trained model comes back as it was, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.errors import RunDirectoryError
from edgetune.reference import merged
from edgetune.reference.codecs import F32, F64
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.reference.writer import ReferenceWriter

VOCAB = 300


def rows() -> ScoredRows:
    random = np.random.default_rng(1)
    positions = np.concatenate([np.arange(5, 20), np.arange(30, 50), np.arange(51, 70)])
    return ScoredRows(random.integers(0, VOCAB, 70, np.int32), np.array([0, 20, 50, 70]), positions)


def logits(seed: int, spread: float = 4.0) -> F32:
    shape = (len(rows().positions), VOCAB)
    return np.random.default_rng(seed).normal(0, spread, shape).astype(np.float32)


TRAINED, BASE = logits(2), logits(2) + logits(3, 1.0)


def log_softmax(values: NDArray[np.floating]) -> F64:
    wide = values.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def kld(reference: NDArray[np.floating], other: NDArray[np.floating]) -> F64:
    p, q = log_softmax(reference), log_softmax(other)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def nll(values: NDArray[np.floating]) -> F64:
    return np.asarray(-log_softmax(values)[np.arange(len(values)), rows().targets])


def writer(directory: Path, limit: int = 8192, top_k: int = 40) -> ReferenceWriter:
    info = {"device": "cpu", "sizes": {3: (1, 2)}}
    return ReferenceWriter(directory, rows(), vocab_size=VOCAB, full_vocabulary_limit=limit, top_k=top_k, info=info)


def fill(open_writer: ReferenceWriter, block: int = 7) -> None:
    for start in range(0, len(TRAINED), block):
        open_writer.add_trained(TRAINED[start : start + block])
    for start in range(0, len(BASE), block + 4):
        open_writer.add_base(BASE[start : start + block + 4])


@pytest.fixture(params=[8192, 10], ids=["u16", "top_k"])
def reference(request: pytest.FixtureRequest, tmp_path: Path) -> Reference:
    with writer(tmp_path / "reference", request.param) as open_writer:
        fill(open_writer)
        open_writer.set_contract([{"messages": [], "add_generation_prompt": True, "text": "灯 \u200b", "ids": [1, 2]}])
        open_writer.set_task("json", [{"messages": [], "expected": "{}", "base": "", "trained": "{}"}])
    return Reference.open(tmp_path / "reference")


def test_everything_small_comes_back(reference: Reference) -> None:
    np.testing.assert_array_equal(reference.rows.tokens, rows().tokens)
    np.testing.assert_array_equal(reference.rows.positions, rows().positions)
    np.testing.assert_allclose(reference.trained_nll, nll(TRAINED), rtol=1e-6)
    np.testing.assert_allclose(reference.base_nll, nll(BASE), rtol=1e-6)
    np.testing.assert_array_equal(reference.trained_top, TRAINED.argmax(axis=1))
    np.testing.assert_array_equal(reference.base_top, BASE.argmax(axis=1))
    assert reference.vocab_size == VOCAB
    assert reference.info == {"device": "cpu", "sizes": {"3": [1, 2]}}
    assert reference.contract[0]["text"] == "灯 \u200b"
    assert reference.task == {"kind": "json", "rows": [{"messages": [], "expected": "{}", "base": "", "trained": "{}"}]}


def test_the_floor_is_what_coding_costs(reference: Reference) -> None:
    assert reference.trained_floor.max() < 1e-3
    np.testing.assert_allclose(reference.compare(0, TRAINED).kld, reference.trained_floor, rtol=1e-5, atol=1e-12)


def test_full_vocabulary_divergence_is_the_oracles(tmp_path: Path) -> None:
    with writer(tmp_path / "reference") as open_writer:
        fill(open_writer)
    reference = Reference.open(tmp_path / "reference")
    assert (reference.coding, reference.is_lower_bound) == ("u16", False)
    found = reference.compare(10, BASE[10:30])
    np.testing.assert_allclose(found.kld, kld(TRAINED, BASE)[10:30], atol=2e-4)
    np.testing.assert_allclose(reference.base_kld, kld(TRAINED, BASE), atol=2e-4)
    np.testing.assert_allclose(found.nll, nll(BASE)[10:30], atol=2.5e-6)  # the f32 sums of edgetune_native.compare
    decoded, exact = reference.log_probs(3, 9), log_softmax(TRAINED)[3:9]
    likely = exact > exact.max(axis=1, keepdims=True) - 16
    np.testing.assert_allclose(decoded[likely], exact[likely], atol=16 / 65535)


def test_top_k_divergence_is_that_of_the_merged_distributions(tmp_path: Path) -> None:
    with writer(tmp_path / "reference", limit=10) as open_writer:
        fill(open_writer)
    reference = Reference.open(tmp_path / "reference")
    assert (reference.coding, reference.is_lower_bound) == ("top_k", True)

    def merged(values: F32) -> F64:
        probabilities = np.exp(log_softmax(values))
        kept = np.take_along_axis(probabilities, np.argsort(-TRAINED, axis=1)[:, :40], axis=1)
        return np.asarray(np.log(np.concatenate([kept, 1 - kept.sum(axis=1, keepdims=True)], axis=1)))

    expected = kld(merged(TRAINED), merged(BASE))
    found = reference.compare(0, BASE).kld
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.all(found <= kld(TRAINED, BASE) + 1e-6)
    with pytest.raises(ValueError, match="top-k"):
        reference.log_probs(0, 1)


def test_top_k_of_the_whole_vocabulary_is_exact(tmp_path: Path) -> None:
    with writer(tmp_path / "reference", limit=10, top_k=VOCAB + 5) as open_writer:
        fill(open_writer)
    found = Reference.open(tmp_path / "reference").compare(0, BASE).kld
    np.testing.assert_allclose(found, kld(TRAINED, BASE), rtol=1e-4, atol=1e-6)


def test_a_base_captured_first_has_no_divergence(tmp_path: Path) -> None:
    with writer(tmp_path / "reference") as open_writer:
        open_writer.add_base(BASE)
        open_writer.add_trained(TRAINED)
    assert np.isnan(Reference.open(tmp_path / "reference").base_kld).all()


def test_nothing_is_left_of_a_reference_that_failed(tmp_path: Path) -> None:
    open_writer = writer(tmp_path / "reference")
    open_writer.add_trained(TRAINED[:5])
    open_writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with (
        pytest.raises(RunDirectoryError, match=r"base model was captured at 0 of 54"),
        writer(tmp_path / "reference") as w,
    ):
        w.add_trained(TRAINED)
    assert list(tmp_path.iterdir()) == []


def test_a_new_reference_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for limit in (8192, 10):
        with writer(tmp_path / "reference", limit) as open_writer:
            fill(open_writer)
    assert Reference.open(tmp_path / "reference").coding == "top_k"
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


@pytest.mark.parametrize("name", ["trained.codes.npy", "trained_nll.npy", "tokens.npy", "reference.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    with writer(tmp_path / "reference") as open_writer:
        fill(open_writer)
    file = tmp_path / "reference" / name
    content = file.read_bytes()
    changed = content.replace(b'"coding": "u16"', b'"coding": "u17"') if name.endswith("json") else content
    changed = changed if changed != content else content[:-1] + bytes([content[-1] ^ 1])
    file.write_bytes({"truncated": content[: len(content) // 2], "altered": changed, "missing": b""}[damage])
    if damage == "missing":
        file.unlink()
    with pytest.raises(RunDirectoryError, match="reference"):
        Reference.open(tmp_path / "reference")


def test_another_version_is_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "reference") as open_writer:
        fill(open_writer)
    file = tmp_path / "reference/reference.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    with pytest.raises(RunDirectoryError, match="version"):
        Reference.open(tmp_path / "reference")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_diverged_is_not_stored(tmp_path: Path, bad: float) -> None:
    broken = TRAINED.copy()
    broken[3, 4] = bad
    with pytest.raises(RunDirectoryError, match="not a finite number"), writer(tmp_path / "reference") as open_writer:
        open_writer.add_trained(broken)
    assert list(tmp_path.iterdir()) == []


def test_a_confident_model_is_not_given_a_tail(tmp_path: Path) -> None:
    """16 bits reach 16 nats down; what lies below must not be taken for exp(-16)."""
    sure = np.random.default_rng(4).normal(0, 1, (3, 4096)).astype(np.float32)
    sure[:, 7] = 25
    three = ScoredRows(np.full(4, 7, np.int32), np.array([0, 4]), np.array([1, 2, 3]))
    directory = tmp_path / "reference"
    with ReferenceWriter(
        directory, three, vocab_size=4096, full_vocabulary_limit=8192, top_k=1, info={}
    ) as open_writer:
        open_writer.add_trained(sure)
        open_writer.add_base(sure)
    assert Reference.open(directory).trained_floor.max() < 2e-6


def test_tokens_that_were_masked_out_are_no_fault(tmp_path: Path) -> None:
    masked = TRAINED.copy()
    masked[:, -1] = -np.inf
    masked[np.arange(len(masked)), rows().targets] = 1
    with writer(tmp_path / "reference") as open_writer:
        open_writer.add_trained(masked)
        open_writer.add_base(BASE)
    assert Reference.open(tmp_path / "reference").trained_floor.max() < 1e-3


def test_shapes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(54, 299\)"), writer(tmp_path / "reference") as open_writer:
        open_writer.add_trained(TRAINED[:, 1:])
    full = writer(tmp_path / "reference")
    full.add_trained(TRAINED)
    with pytest.raises(ValueError, match="0 positions are left"):
        full.add_trained(TRAINED[:1])
    full.abort()


@pytest.mark.parametrize(
    ("offsets", "positions", "what"),
    [
        ([0, 3, 3, 6], [1], "row_offsets"), ([1, 6], [1], "row_offsets"), ([0, 5], [1], "row_offsets"), ([], [], "row"),
        ([0, 3, 6], [2, 1], "positions"), ([0, 3, 6], [6], "positions"), ([0, 3, 6], [-1], "positions"),
        ([0, 3, 6], [0], "first token"), ([0, 3, 6], [3], "first token"),
    ],
)  # fmt: skip
def test_rows_that_contradict_themselves(offsets: list[int], positions: list[int], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        ScoredRows(np.arange(6, dtype=np.int32), np.array(offsets, np.int64), np.array(positions, np.int64))


def test_rows_one_by_one() -> None:
    found = [(list(ids), list(scored), where) for ids, scored, where in rows().first(2)]
    tokens = list(rows().tokens)
    assert found == [
        (tokens[:20], list(range(5, 20)), slice(0, 15)),
        (tokens[20:50], list(range(10, 30)), slice(15, 35)),
    ]


def test_an_empty_row_set_and_foreign_tokens(tmp_path: Path) -> None:
    empty = ScoredRows(np.arange(3, dtype=np.int32), np.array([0, 3]), np.array([], np.int64))
    options = {"vocab_size": 2, "full_vocabulary_limit": 1, "top_k": 1, "info": {}}
    with pytest.raises(RunDirectoryError, match="no token to score"):
        ReferenceWriter(tmp_path / "reference", empty, **options)  # type: ignore[arg-type]
    foreign = ScoredRows(np.arange(3, dtype=np.int32), np.array([0, 3]), np.array([1]))
    with pytest.raises(RunDirectoryError, match="outside the vocabulary of 2"):
        ReferenceWriter(tmp_path / "reference", foreign, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# -- taken up again ----------------------------------------------------------------------------------------------------


def keyed(directory: Path, key: str = "k", limit: int = 8192) -> ReferenceWriter:
    return ReferenceWriter(
        directory, rows(), vocab_size=VOCAB, full_vocabulary_limit=limit, top_k=40, info={}, key=key
    )  # fmt: skip


def add(open_writer: ReferenceWriter, start: int, stop: int) -> None:
    open_writer.add_trained(TRAINED[start:stop])
    open_writer.add_base(BASE[start:stop])


@pytest.mark.parametrize("limit", [8192, 10], ids=["u16", "top_k"])
def test_a_killed_writer_is_taken_up_where_it_was_safe(tmp_path: Path, limit: int) -> None:
    """What came after the last checkpoint, whole or torn, is written again; the result is that of one writer."""
    killed = keyed(tmp_path / "reference", limit=limit)
    add(killed, 0, 12)
    killed.checkpoint()
    add(killed, 12, 20)
    killed.add_trained(TRAINED[20:23])
    killed._partial.close()  # as far as the kernel has it, which outlives the process
    with keyed(tmp_path / "reference", limit=limit) as again:
        assert again.done == 12
        add(again, 12, len(TRAINED))
    with writer(tmp_path / "whole", limit) as other:
        fill(other)
    ours, theirs = Reference.open(tmp_path / "reference"), Reference.open(tmp_path / "whole")
    np.testing.assert_array_equal(ours.trained_nll, theirs.trained_nll)
    np.testing.assert_array_equal(ours.base_kld, theirs.base_kld)
    np.testing.assert_array_equal(ours.compare(0, BASE).kld, theirs.compare(0, BASE).kld)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference", "whole"]
    assert not (tmp_path / "reference/progress.json").exists()


def test_an_interrupted_writer_is_taken_up(tmp_path: Path) -> None:
    open_writer = keyed(tmp_path / "reference")
    add(open_writer, 0, 5)
    open_writer.checkpoint()
    open_writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not (tmp_path / "reference").exists()
    again = keyed(tmp_path / "reference")
    assert again.done == 5
    again.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["another key", "torn progress", "short column", "missing column", "other column"])
def test_what_cannot_be_taken_up_is_begun_anew(tmp_path: Path, damage: str) -> None:
    killed = keyed(tmp_path / "reference")
    add(killed, 0, 12)
    killed.checkpoint()
    killed._partial.close()
    partial = next(tmp_path.glob("*.partial"))
    column = partial / "trained.codes.npy"
    changes: dict[str, Callable[[], object]] = {
        "another key": lambda: None,
        "torn progress": lambda: (partial / "progress.json").write_text('{"key": "k", "posi'),
        "short column": lambda: column.write_bytes(column.read_bytes()[:-700]),
        "missing column": column.unlink,
        "other column": lambda: column.write_bytes(b"no column at all, but bytes enough" * 999),
    }
    changes[damage]()
    with keyed(tmp_path / "reference", "other" if damage == "another key" else "k") as again:
        assert again.done == 0
        add(again, 0, len(TRAINED))
    assert Reference.open(tmp_path / "reference").vocab_size == VOCAB


def test_a_model_that_diverged_leaves_nothing_to_take_up(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="finite"), keyed(tmp_path / "reference") as open_writer:
        open_writer.add_trained(np.full_like(TRAINED, np.nan))
    assert list(tmp_path.iterdir()) == []


# -- the merged model beside it ----------------------------------------------------------------------------------------


def test_a_merged_model_belongs_to_one_reference(tmp_path: Path) -> None:
    for name, logits_of_base in (("one", BASE), ("other", TRAINED)):
        with writer(tmp_path / name) as open_writer:
            open_writer.add_trained(TRAINED)
            open_writer.add_base(logits_of_base)
    one, other = Reference.open(tmp_path / "one"), Reference.open(tmp_path / "other")
    assert merged.read(one, "original") is None
    said = one.compare(0, BASE)
    path = merged.write(one, "original", said)
    found = merged.read(one, "original")
    assert found is not None
    np.testing.assert_array_equal(found.kld, said.kld)
    np.testing.assert_array_equal(found.top, said.top)
    (other.directory / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RunDirectoryError, match="belongs to another reference"):
        merged.read(other, "original")
    for damaged in (path.read_bytes()[:-40], b"", b"PK no archive"):
        path.write_bytes(damaged)
        with pytest.raises(RunDirectoryError, match=r"is damaged.*"):
            merged.read(one, "original")
