"""llama.cpp's files of log-probabilities: what is written is read, and nothing that is damaged is believed."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.errors import DataError
from edgetune.reference.codecs import F32, F64
from edgetune.reference.llama_kld import KldBaseFile, KldBaseWriter, scored_positions, split_into_chunks, with_bos

CHUNKS, CONTEXT = 3, 21
RANDOM = np.random.default_rng(3)


def made(path: Path, vocab: int = 101, spread: float = 3.0) -> tuple[Path, F32]:
    """A file of a random model, and its logits [CHUNKS * rows, V]."""
    tokens = RANDOM.integers(0, vocab, (CHUNKS, CONTEXT)).astype(np.int32)
    logits = RANDOM.normal(0, spread, (CHUNKS * len(scored_positions(CONTEXT)), vocab)).astype(np.float32)
    with KldBaseWriter(path, tokens, vocab) as writer:
        for start in range(0, len(logits), 7):
            writer.add(logits[start : start + 7])
    return path, logits


def log_softmax(logits: F32) -> F64:
    wide = logits.astype(np.float64)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


@pytest.mark.parametrize("vocab", [100, 101])
def test_what_is_written_is_read(tmp_path: Path, vocab: int) -> None:
    path, logits = made(tmp_path / "base.kld", vocab)
    base = KldBaseFile(path)
    assert (base.chunks, base.context, base.vocab_size, base.rows) == (CHUNKS, CONTEXT, vocab, len(logits))
    # the layout, byte for byte: 10 rows a chunk of 8 + 2 V bytes, V padded to even
    assert path.stat().st_size == 20 + 4 * CHUNKS * CONTEXT + CHUNKS * 10 * (8 + 2 * (vocab + vocab % 2))
    assert path.read_bytes()[:20] == b"_logits_" + struct.pack("<iii", CONTEXT, vocab, CHUNKS)
    exact = log_softmax(logits)[4:9]
    likely = exact > exact.max(axis=1, keepdims=True) - 16  # what is less likely has code 0
    np.testing.assert_allclose(base.log_probs(4, 9)[likely], exact[likely], atol=16 / 65535)
    np.testing.assert_array_equal(base.targets, base.tokens[:, 11:].reshape(-1))
    assert [path.name for path in tmp_path.iterdir()] == ["base.kld"]


def test_the_figures_are_llama_perplexitys(tmp_path: Path) -> None:
    """Its formula, in float64: sum of p (log p - log q) over p > exp(-16), p as stored and not normalized."""
    path, logits = made(tmp_path / "base.kld", spread=5.0)
    base = KldBaseFile(path)
    other = logits + RANDOM.normal(0, 0.3, logits.shape).astype(np.float32)
    found = base.compare(0, other)
    stored, ours = base.log_probs(0, base.rows).astype(np.float64), log_softmax(other)
    kept = stored > -16
    assert not kept.all()
    wanted = np.where(kept, np.exp(stored) * (stored - ours), 0).sum(axis=1)
    total = np.exp(stored[:, :]).sum(axis=1, where=kept)
    assert not np.allclose(wanted / total - np.log(total), wanted, rtol=1e-5, atol=1e-7)  # normalized, it would differ
    np.testing.assert_allclose(found.kld, wanted, rtol=1e-5, atol=1e-7)
    at = np.arange(base.rows), base.targets
    np.testing.assert_allclose(found.nll, -ours[at], atol=4e-6)
    np.testing.assert_allclose(found.nll_base, -stored[at], rtol=1e-6)
    np.testing.assert_array_equal(found.same_top, stored.argmax(1) == ours.argmax(1))
    part = base.compare(5, other[5:12])
    np.testing.assert_array_equal(part.kld, found.kld[5:12])


def test_bos_is_fed_and_not_stored() -> None:
    chunk = np.array([5, 6, 7], np.int32)
    assert with_bos(chunk, 1).tolist() == [1, 6, 7]
    assert with_bos(chunk, None).tolist() == chunk.tolist() == [5, 6, 7]


def test_chunks_are_whole() -> None:
    assert split_into_chunks(np.arange(10, dtype=np.int32), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match="3 tokens, fewer than one chunk of 4"):
        split_into_chunks(np.arange(3, dtype=np.int32), 4)


def test_nothing_is_left_of_a_file_that_failed(tmp_path: Path) -> None:
    tokens = np.zeros((CHUNKS, CONTEXT), np.int32)
    with pytest.raises(KeyboardInterrupt), KldBaseWriter(tmp_path / "a.kld", tokens, 7):
        raise KeyboardInterrupt
    with (
        pytest.raises(DataError, match="29 rows were not written"),
        KldBaseWriter(tmp_path / "a.kld", tokens, 7) as w,
    ):
        w.add(np.zeros((1, 7), np.float32))
    assert list(tmp_path.iterdir()) == []


def _header(**changes: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        values = {"context": CONTEXT, "vocab": 101, "chunks": CHUNKS} | changes
        return b"_logits_" + struct.pack("<iii", *values.values()) + content[20:]

    return change


def _row(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    start = 20 + 4 * CHUNKS * CONTEXT + offset
    return lambda content: content[:start] + value + content[start + len(value) :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "foreign": (lambda content: b"GGUF" + content[4:], "not a file of llama.cpp"),
    "empty": (lambda _: b"", "not a file of llama.cpp"),
    "header only": (lambda content: content[:14], "ends within its header"),
    "truncated": (lambda content: content[:-3], "truncated"),
    "longer": (lambda content: content + b"x", "longer than its header says"),
    "no chunk": (_header(chunks=0), "0 chunks"),
    "negative": (_header(vocab=-5), "vocabulary of -5"),
    "huge": (_header(chunks=2**31 - 1, vocab=2**31 - 1), "truncated"),
    "foreign tokens": (lambda content: content[:20] + b"\xff\xff\xff\x7f" + content[24:], "outside its vocabulary"),
    "not a number": (_row(0, struct.pack("<f", float("nan"))), "not log-probabilities"),
    "another scale": (_row(4, struct.pack("<f", -30.0)), "add up to 0"),
    "above 1": (_row(4, struct.pack("<f", 3.0)), "not log-probabilities"),
    "infinite": (_row(0, struct.pack("<f", 3e38)), "not log-probabilities"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence(tmp_path: Path, name: str) -> None:
    path, logits = made(tmp_path / "base.kld")
    damage, words = DAMAGES[name]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=words):
        KldBaseFile(path).compare(0, logits)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.kld", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            KldBaseFile(path)


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=12), st.integers(0, 40))
def test_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: bytes, cut: int
) -> None:
    """Bytes overwritten, or cut away: one sentence, or numbers; never a crash, never a figure that is no number."""
    path, logits = made(tmp_path_factory.mktemp("fuzz") / "base.kld")
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place : place + len(value)] = value[: len(content) - place]
    path.write_bytes(bytes(content[: len(content) - cut if cut > 20 else len(content)]))
    with contextlib.suppress(DataError):
        base = KldBaseFile(path)
        if base.vocab_size == 101:
            assert np.isfinite(base.compare(0, logits[: base.rows]).kld).all()
