"""Pages that a pass brings into the system's cache are dropped; pages cached before stay."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune_converters.files.contents import sha256_of
from edgetune_converters.provenance import hashing as identity
from edgetune_converters.provenance.hashing import InputHasher
from edgetune_converters.reading import page_cache
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.reading.page_cache import PassingPages, cached_pages
from tests.converters import tiny
from tests.export_requests import export

CHUNK = 1 << 16
SIZE = 40 * CHUNK + 123


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "CHUNK_BYTES", CHUNK)


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[tuple[Path, mmap.mmap]]:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            yield path, view


def forgotten(path: Path, view: mmap.mmap) -> bool:
    """Whether the system lets a file go when it is told to; some file systems live in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return not cached_pages(view, SIZE).any()


def read_all(path: Path) -> None:
    path.read_bytes()


def test_what_both_have_read_leaves_the_cache(mapped: tuple[Path, mmap.mmap]) -> None:
    path, view = mapped
    if not forgotten(path, view):
        pytest.skip("files of this file system are always in memory")
    pages = PassingPages(path, view, SIZE, first=100)
    assert pages.follow()
    read_all(path)
    assert cached_pages(view, SIZE).all()
    pages.passed(100, SIZE, SIZE - 100)
    assert cached_pages(view, SIZE).all()  # one of the two is not enough
    pages.followed(SIZE)
    pages.close()
    assert cached_pages(view, SIZE).sum() <= (page_cache._KEPT_CHUNKS + 1) * CHUNK // mmap.PAGESIZE
    assert pages.passed_bytes == SIZE


def test_pages_cached_before_stay_cached(mapped: tuple[Path, mmap.mmap]) -> None:
    path, view = mapped
    if not forgotten(path, view):
        pytest.skip("files of this file system are always in memory")
    there = slice(10 * CHUNK, 12 * CHUNK)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # without reading ahead
        os.pread(file.fileno(), there.stop - there.start, there.start)
    before = cached_pages(view, SIZE)
    assert before.any()
    assert not before.all()
    pages = PassingPages(path, view, SIZE, first=0)
    assert pages.follow()
    read_all(path)
    pages.passed(0, SIZE, SIZE)
    pages.followed(SIZE)
    pages.close()
    after = cached_pages(view, SIZE)
    assert after[before].all()
    assert not after.all()


def test_a_file_that_is_in_the_cache_is_left_alone(mapped: tuple[Path, mmap.mmap]) -> None:
    path, view = mapped
    read_all(path)
    pages = PassingPages(path, view, SIZE, first=0)
    assert not pages.follow()
    pages.passed(0, SIZE, SIZE)
    pages.followed(SIZE)
    pages.close()
    assert cached_pages(view, SIZE).all()


@given(
    cuts=st.lists(st.integers(1, 99_999), unique=True, max_size=30).map(sorted),
    reads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    followed=st.integers(0, 100_000),
)
def test_nothing_is_dropped_before_both_have_read_it(
    cuts: list[int], reads: int, seed: int, followed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces in any order, each in several parts; a chunk goes when its last byte was read, and not before."""
    monkeypatch.setattr(page_cache, "CHUNK_BYTES", 4096)
    size, chunks = 100_000, 25
    pages = PassingPages(Path(), None, size, first=0)  # type: ignore[arg-type]
    pages._left = {index: min(4096, size - index * 4096) for index in range(chunks)}
    pieces = [piece for piece in zip([0, *cuts], [*cuts, size], strict=True) for _ in range(reads)]
    left = np.full(size, reads, np.uint8)
    for number in np.random.default_rng(seed).permutation(len(pieces)):
        start, stop = pieces[number]
        pages.passed(start, stop, (stop - start) / reads)
        left[start:stop] -= 1
        assert pages._waiting == {index for index in range(chunks) if not left[index * 4096 : (index + 1) * 4096].any()}
    dropped: list[int] = []
    monkeypatch.setattr(pages, "_file", -1)
    monkeypatch.setattr(pages, "_forget", dropped.append)
    pages.followed(followed)
    ready = {index for index in range(chunks) if min((index + 1) * 4096, size) <= followed}
    assert set(dropped) <= ready
    assert len(dropped) == max(0, len(ready) - page_cache._KEPT_CHUNKS)


def test_the_hash_waits_for_the_pass_but_not_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays near, so that the cache need not hold the model, and ends when nobody reads any more."""
    base = tiny.base("llama", tmp_path / "base")
    checkpoint = Checkpoint(base)
    monkeypatch.setattr(identity, "_PIECE_BYTES", 4096)
    monkeypatch.setattr(identity, "_AHEAD_BYTES", 8192)
    monkeypatch.setattr(PassingPages, "follow", lambda pages: True)
    with InputHasher(checkpoint, None, None) as hashing:
        started = threading.Event()
        started.wait(0.3)
        headers = sum(pages.passed_bytes for pages in hashing._pages.values())
        assert hashing._hashed <= headers + 8192 + 4096 + (base / "config.json").stat().st_size
        assert not hashing._base.done()
        assert hashing.result().base == {path.name: sha256_of(path) for path in checkpoint.identity_files}


def test_an_export_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    """Cold: no more than the last chunks of it stay. Warm: all of it does."""
    base = tiny.base("llama", tmp_path / "base")
    checkpoint = Checkpoint(base)
    weights = [path for path in checkpoint.identity_files if path.suffix == ".safetensors"]

    def cached() -> int:
        return sum(int(cached_pages(file._map, file.size).sum()) for file in checkpoint._files.values() if file._map)

    whole = cached()
    for file in checkpoint._files.values():
        assert file._map
        file._map.madvise(mmap.MADV_DONTNEED)  # pages that somebody maps would stay
    for path in weights:
        with path.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached():
        pytest.skip("files of this file system are always in memory")
    (cold,) = export(base, {"q8_0": tmp_path / "cold.gguf"})
    kept = len(weights) * (page_cache._KEPT_CHUNKS + 1) * CHUNK // mmap.PAGESIZE
    assert cached() <= min(kept, whole)
    for path in weights:
        read_all(path)
    (warm,) = export(base, {"q8_0": tmp_path / "warm.gguf"})
    assert cached() == whole
    assert (tmp_path / "cold.gguf").read_bytes() == (tmp_path / "warm.gguf").read_bytes()
    assert cold.sha256 == warm.sha256
