"""What is written is what is read, by us and by the gguf package; damage is an error, never a crash."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf import read
from edgetune_converters.gguf.layout import ALIGNMENT, TensorSpec
from edgetune_converters.gguf.types import BY_NAME
from edgetune_converters.gguf.values import (
    Value,
    ValueKind,
    as_read,
    boolean,
    f32,
    f32s,
    i32s,
    string,
    strings,
    u32,
    value_of,
)
from edgetune_converters.gguf.writer import GgufWriter

METADATA = {
    "general.architecture": string("llama"),
    "text": string("三成亮 🙂"),
    "small": Value(ValueKind.U8, 200),
    "negative": Value(ValueKind.I16, -7),
    "wide": Value(ValueKind.U64, 2**40),
    "count": u32(7),
    "tenth": f32(0.1),
    "precise": value_of(0.1),
    "yes": boolean(True),
    "texts": strings(["a", "", "ß"]),
    "numbers": i32s([-1, 0, 1]),
    "scores": f32s([0.1, -2.5]),
    "empty": i32s([]),
}
SPECS = [
    TensorSpec("a.weight", (3, 5), BY_NAME["f32"]),
    TensorSpec("b.weight", (2, 64), BY_NAME["q8_0"]),
    TensorSpec("c.bias", (7,), BY_NAME["f32"]),
]


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    return written(tmp_path / "whole.gguf").read_bytes()


def written(path: Path) -> Path:
    """A small file with every kind of value."""
    with GgufWriter.open(path, METADATA, SPECS) as writer:
        for spec in SPECS:
            writer.append(np.arange(spec.bytes, dtype=np.uint8))
        writer.verify()
        writer.publish()
    return path


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    found = read(written(tmp_path / "x.gguf"))
    assert found.metadata == {key: as_read(value) for key, value in METADATA.items()}
    assert [(entry.name, entry.shape, entry.type) for entry in found.tensors] == [
        (spec.name, spec.shape, spec.type.name) for spec in SPECS
    ]
    assert all(entry.offset % ALIGNMENT == 0 for entry in found.tensors)
    assert found.tensor("b.weight").shape == (2, 68)
    assert found.tensor("b.weight")[1, 0] == 68
    assert found.size == (tmp_path / "x.gguf").stat().st_size
    with pytest.raises(KeyError):
        found.tensor("nothing")


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    package: Any = pytest.importorskip("gguf")
    ours, theirs = read(written(tmp_path / "x.gguf")), package.GGUFReader(tmp_path / "x.gguf")
    assert {key: theirs.fields[key].contents() for key in METADATA if key != "empty"} == {
        key: value for key, value in ours.metadata.items() if key != "empty"
    }
    for entry, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (entry.name, entry.offset, entry.bytes) == (other.name, other.data_offset, other.n_bytes)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    assert written(tmp_path / "a.gguf").read_bytes() == written(tmp_path / "b.gguf").read_bytes()


# -- a writer that is not finished leaves nothing ----------------------------------------------------------------------


def _interrupted(path: Path, error: type[BaseException]) -> None:
    with GgufWriter.open(path, METADATA, SPECS) as writer:
        assert writer.partial.exists()
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_removes_the_partial_file(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        _interrupted(tmp_path / "x.gguf", error)
    assert list(tmp_path.iterdir()) == []


def test_missing_rows_are_noticed(tmp_path: Path) -> None:
    with GgufWriter.open(tmp_path / "x.gguf", METADATA, SPECS) as writer:
        writer.append(np.zeros(4, np.uint8))
        with pytest.raises(ArtifactError, match="only 0 of 3 tensors"):
            writer.verify()
    assert list(tmp_path.iterdir()) == []


def test_too_many_rows_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with GgufWriter.open(path, METADATA, SPECS) as writer, pytest.raises(ArtifactError, match="more rows for tensor 0"):
        writer.append(np.zeros(61, np.uint8))


def test_a_file_that_is_not_what_was_planned_is_noticed(tmp_path: Path) -> None:
    with GgufWriter.open(tmp_path / "x.gguf", METADATA, SPECS) as writer:
        for spec in SPECS:
            writer.append(np.zeros(spec.bytes, np.uint8))
        _damage(writer)
        with pytest.raises(ArtifactError, match=r"metadata 'count' differs"):
            writer.verify()
    assert list(tmp_path.iterdir()) == []


def _damage(writer: GgufWriter) -> None:
    """Change one value in the file behind the writer's back."""
    with writer.partial.open("r+b") as file:
        file.seek(file.read().index(b"count") + 9)
        file.write(b"\x08")


def test_an_older_file_is_replaced_only_by_a_finished_one(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("older")
    with pytest.raises(RuntimeError):
        _interrupted(path, RuntimeError)
    assert path.read_text() == "older"
    assert read(written(path)).tensors


def test_a_name_that_llama_cpp_would_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="longer than 63 bytes"):
        GgufWriter.open(tmp_path / "x.gguf", {}, [TensorSpec("x" * 64, (1,), BY_NAME["f32"])])


# -- damaged and foreign files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"PK\x03\x04 some other file", b"GGUF" + bytes(20)])
def test_files_that_are_not_gguf_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        read(path)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.gguf", tmp_path):
        with pytest.raises(ArtifactError, match="cannot read"):
            read(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """Only the padding after the last tensor can be missing without loss."""
    whole = written(tmp_path / "x.gguf").read_bytes()
    last = read(tmp_path / "x.gguf").tensors[-1]
    cut = tmp_path / "cut.gguf"
    for length in range(0, last.offset + last.bytes, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            read(cut)


def _header(n_tensors: int, n_values: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + rest + bytes(64)


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _entry(name: bytes, dimensions: list[int], kind: int, offset: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_header(2**62, 0, b""), "promises 4611686018427387904 tensors"),
        (_header(0, 2**62, b""), "promises 4611686018427387904 metadata"),
        (_header(0, 1, struct.pack("<Q", 2**63)), "ends at byte"),
        (_header(0, 1, _text(b"k") + struct.pack("<I", 99)), "99 is not a known metadata type"),
        (_header(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 8, 2**60)), "promises .* strings"),
        (_header(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 4, 2**60)), "promises .* array elements"),
        (_header(0, 1, _text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "arrays of arrays"),
        (_header(0, 1, _text(b"\xff") + struct.pack("<II", 4, 1)), "not UTF-8"),
        (_header(0, 2, (_text(b"k") + struct.pack("<II", 4, 1)) * 2), "'k' occurs twice"),
        (_header(0, 1, _text(b"general.alignment") + struct.pack("<II", 4, 3)), "not a power of two"),
        (_header(0, 1, _text(b"general.alignment") + struct.pack("<II", 4, 0)), "not a power of two"),
        (_header(1, 0, _entry(b"t", [], 0, 0) + bytes(64)), "has 0 dimensions"),
        (_header(1, 0, _entry(b"t", [4], 77, 0)), "has an unknown storage type"),
        (_header(1, 0, _entry(b"t", [33], 8, 0)), "rows of 33, not a multiple of the block of q8_0"),
        (_header(1, 0, _entry(b"t", [2**62, 2**62], 0, 0)), "ends at byte"),
        (_header(1, 0, _entry(b"t", [4], 0, 1)), "not a multiple of 32"),
        (_header(1, 0, _entry(b"t", [4], 0, 2**60)), "ends at byte"),
        (_header(2, 0, _entry(b"t", [4], 0, 0) * 2), "occurs twice|overlaps"),
        (_header(2, 0, _entry(b"t", [4], 0, 0) + _entry(b"u", [4], 0, 0)), "overlaps the tensor before it"),
    ],
)
def test_headers_that_lie(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read(path)


@given(cut=st.integers(0, 2000), flips=st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 7)), max_size=5))
def test_damage_is_an_error_or_harmless(cut: int, flips: list[tuple[int, int]], whole: bytes, tmp_path: Path) -> None:
    damaged = bytearray(whole)
    for position, bit in flips:
        damaged[position % len(whole)] ^= 1 << bit
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(damaged[:cut] if cut < 1500 else damaged)
    try:
        found = read(path)
    except ArtifactError:
        return
    for entry in found.tensors:
        assert found.tensor(entry.name).nbytes == entry.bytes


@given(rest=st.binary(max_size=200), counts=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_noise_after_the_magic(rest: bytes, counts: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest)
    try:
        read(path)
    except ArtifactError:
        return
    assert counts[0] == 0 or rest
