"""Whole model directories and GGUF bases that are cut short or have bits flipped, through the whole export.

What must come of it is an error of ours with nothing left behind, or exactly what the undamaged files give. A flipped
bit in the middle of weights makes a weight like another: it is found where it makes NaN or infinity, and always where
the hashes of the base are known, which is so for every run of edgetune's.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from edgetune_converters import gguf
from edgetune_converters.errors import AdapterError, EdgetuneError
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.reading.weight_files import INDEX_FILE, SINGLE_FILE
from tests.converters import tiny
from tests.export_requests import export
from tests.profiles import scaled

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_HEADERS = ("header 0", "header 1")
_PLACES = ("config.json", INDEX_FILE, *_HEADERS, *_SHARDS)
_FLIPS = st.lists(st.tuples(st.integers(0, 1 << 24), st.integers(0, 7)), min_size=1, max_size=3)
Tensors = dict[str, bytes]


@dataclass(frozen=True, repr=False)
class Whole:
    """An undamaged model in two shards, what is made of it, and its hashes.

    Not to be printed by hypothesis, which warns of so much text, and the warning hides what has failed.
    """

    directory: Path
    tensors: Tensors
    hashes: dict[str, str]

    def __repr__(self) -> str:
        return "<a model>"


def _tensors(path: Path) -> Tensors:
    file = gguf.read(path)
    return {entry.name: entry.type.encode() + file.tensor(entry.name).tobytes() for entry in file.tensors}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    directory = tmp_path_factory.mktemp("whole") / "base"
    tiny.base("qwen2", directory, num_hidden_layers=1)
    loaded = load_file(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    names = sorted(loaded)
    shards = dict(zip(_SHARDS, (names[::2], names[1::2]), strict=True))
    for file, held in shards.items():
        save_file({name: loaded[name] for name in held}, directory / file, {"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    export(directory, {"f32": directory.parent / "x.gguf"})
    return Whole(directory, _tensors(directory.parent / "x.gguf"), Checkpoint(directory).identity())


@contextmanager
def _damaged(whole: Whole, folder: Path) -> Iterator[Path]:
    """A copy of the model that may be changed."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole.directory, copy)
    yield copy


def _exported(base: Path, folder: Path, **options: object) -> Tensors | None:
    """The tensors that come of it; None for an error of ours, which must leave nothing."""
    output = folder / "out" / "x.gguf"
    shutil.rmtree(output.parent, ignore_errors=True)
    try:
        export(base, {"f32": output}, **options)  # type: ignore[arg-type]
    except EdgetuneError as error:
        assert error.message  # noqa: PT017 - either outcome is right
        assert not output.parent.exists() or not list(output.parent.iterdir())
        return None
    return _tensors(output)


def _spot(base: Path, place: str) -> tuple[Path, int, int]:
    """The file, first and last byte of a place: a header, the weights behind it, or a file of words."""
    path = base / (_SHARDS[int(place[-1])] if place in _HEADERS else place)
    if path.name not in _SHARDS:
        return path, 0, path.stat().st_size
    end = 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])
    return (path, 0, end) if place in _HEADERS else (path, end, path.stat().st_size)


def _flip(path: Path, first: int, last: int, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(path.read_bytes())
    for at, bit in flips:
        raw[first + at % (last - first)] ^= 1 << bit
    path.write_bytes(raw)


@settings(max_examples=scaled(0.8))
@given(place=st.sampled_from(_PLACES), flips=_FLIPS)
def test_flipped_bits_are_an_error_or_harmless(
    place: str, flips: list[tuple[int, int]], whole: Whole, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    with _damaged(whole, folder) as base:
        _flip(*_spot(base, place), flips)
        found = _exported(base, folder)
        if found is None:
            return
        assert found.keys() == whole.tensors.keys()
        wrong = [name for name in found if found[name] != whole.tensors[name]]
        # of the weights themselves only those that were hit; the embedding is hit when its padding rows are, too
        assert len(wrong) <= (len(flips) if place in _SHARDS else 0), wrong
        same = (base / _spot(base, place)[0].name).read_bytes() == (
            whole.directory / _spot(base, place)[0].name
        ).read_bytes()
        if not same and _spot(base, place)[0].name in whole.hashes:
            with pytest.raises(AdapterError, match="is not the base the adapter was trained on"):
                export(base, {"f32": folder / "y.gguf"}, expected_base=whole.hashes)


@settings(max_examples=scaled(0.4))
@given(name=st.sampled_from(["config.json", INDEX_FILE, *_SHARDS]), at=st.floats(0, 1), extra=st.binary(max_size=9))
def test_truncated_and_extended_files_are_refused(
    name: str, at: float, extra: bytes, whole: Whole, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    with _damaged(whole, folder) as base:
        raw = (base / name).read_bytes()
        (base / name).write_bytes(raw[: int(at * (len(raw.rstrip(b"\n")) - 1))])  # a line end less is no damage
        assert _exported(base, folder) is None
        (base / name).write_bytes(raw + b"\0" + extra)
        assert _exported(base, folder) is None


_INDEXES = st.sampled_from([*_SHARDS, "model-00003-of-00003.safetensors", "../x", "", ".", "config.json"])


@settings(max_examples=scaled(0.4))
@given(changes=st.dictionaries(st.integers(0, 30), st.none() | _INDEXES, min_size=1, max_size=3), new=st.booleans())
def test_an_index_that_disagrees_with_the_shards_is_refused_or_harmless(
    changes: dict[int, str | None], new: bool, whole: Whole, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Tensors moved to another shard, left out of the index, or in it and nowhere else."""
    folder = tmp_path_factory.mktemp("index")
    with _damaged(whole, folder) as base:
        index = json.loads((base / INDEX_FILE).read_text("utf-8"))
        names = sorted(index["weight_map"])
        for number, file in changes.items():
            if file is None:
                index["weight_map"].pop(names[number % len(names)], None)
            else:
                index["weight_map"][names[number % len(names)]] = file
        if new:
            index["weight_map"]["model.more.weight"] = _SHARDS[0]
        (base / INDEX_FILE).write_text(json.dumps(index))
        found = _exported(base, folder)
        places = set(index["weight_map"].values())
        # as in transformers: all tensors of all shards that are named count, wherever the index places them
        assert found == (None if new or places != set(_SHARDS) else whole.tensors)


def test_all_unknown_tensors_are_in_one_message(whole: Whole, tmp_path: Path) -> None:
    with _damaged(whole, tmp_path) as base:
        loaded = load_file(base / _SHARDS[0])
        more = {f"model.layers.0.surprise{number}.weight": np.zeros((2, 2), np.float32) for number in range(3)}
        save_file(loaded | more, base / _SHARDS[0])
        index = json.loads((base / INDEX_FILE).read_text("utf-8"))
        index["weight_map"] |= dict.fromkeys(more, _SHARDS[0])
        (base / INDEX_FILE).write_text(json.dumps(index))
        with pytest.raises(
            EdgetuneError, match=r"(?s)surprise0.*surprise1.*surprise2.*is not known in the Qwen2 family"
        ):
            export(base, {"f32": tmp_path / "x.gguf"})


# -- GGUF files as the base --------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class File:
    """A GGUF file: its bytes, where the tensors are listed, where their data begins, and what is made of it."""

    raw: bytes
    entries: int
    data: int
    tensors: Tensors

    def __repr__(self) -> str:
        return "<a file>"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> File:
    folder = tmp_path_factory.mktemp("file")
    export(tiny.base("qwen2", folder / "base", num_hidden_layers=1), {"q4_0": folder / "x.gguf"})
    export(folder / "x.gguf", {"f32": folder / "y.gguf"})
    read, raw = gguf.read(folder / "x.gguf"), (folder / "x.gguf").read_bytes()
    entries = min(raw.rfind(entry.name.encode(), 0, read.tensors[0].offset) for entry in read.tensors)
    return File(raw, entries - 8, min(entry.offset for entry in read.tensors), _tensors(folder / "y.gguf"))


@given(flips=_FLIPS)
def test_flipped_bits_in_the_list_of_tensors_are_an_error_or_harmless(
    flips: list[tuple[int, int]], file: File, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Names, shapes, types and offsets: an error, or the very tensors."""
    folder = tmp_path_factory.mktemp("entries")
    path = folder / "x.gguf"
    path.write_bytes(file.raw)
    _flip(path, file.entries, file.data, flips)
    found = _exported(path, folder)
    assert found is None or found == file.tensors


@settings(max_examples=scaled(0.4))
@given(at=st.floats(0, 1))
def test_a_truncated_file_is_an_error(at: float, file: File, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("short")
    (folder / "x.gguf").write_bytes(file.raw[: int(at * (len(file.raw) - 33))])  # the end may be padding
    assert _exported(folder / "x.gguf", folder) is None
