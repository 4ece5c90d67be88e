"""Reading checkpoints: exact values, shards, and every kind of damage refused in one sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune_converters.errors import CheckpointError
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.reading.safetensors_file import SafetensorsFile
from edgetune_converters.reading.weight_files import INDEX_FILE, SINGLE_FILE

_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """A safetensors file written by hand, so that it may also be wrong."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return raw_safetensors(path, header, data)


def raw_safetensors(path: Path, header: Any, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def model(directory: Path, config: dict[str, Any] | None = None, *, packed: bool = False) -> Path:
    """A directory with two small tensors, the second of packed integers if asked for."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or {"architectures": ["LlamaForCausalLM"]}))
    values = np.arange(12, dtype="<f4")
    safetensors(
        directory / SINGLE_FILE,
        {"a": ("F32", [4, 3], values.tobytes()), "b": ("I32" if packed else "F32", [2], bytes(8))},
    )
    return directory


def test_rows_by_range_and_by_index(tmp_path: Path) -> None:
    checkpoint = Checkpoint(model(tmp_path))
    whole = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert np.array_equal(checkpoint.rows("a", slice(1, 3)), whole[1:3])
    index = np.array([3, 0, 2])
    assert np.array_equal(checkpoint.rows("a", index), whole[index])
    assert checkpoint.rows("b", slice(None)).shape == (2, 1)


def test_a_block_is_a_copy_that_may_be_changed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(model(tmp_path))
    checkpoint.rows("a", slice(0, 2))[:] = 9
    assert checkpoint.rows("a", slice(0, 1))[0, 1] == 1


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_every_float_dtype_is_exact(dtype: str, tmp_path: Path) -> None:
    values = np.array([1.0, -0.5, 3.140625, 0.0, 65280.0], np.float32)  # exact in bf16 and f16
    as_stored = {"F32": values.astype("<f4"), "F16": values.astype("<f2"), "F64": values.astype("<f8"),
                 "BF16": (values.view(np.uint32) >> 16).astype("<u2")}[dtype]  # fmt: skip
    file = SafetensorsFile(safetensors(tmp_path / "x.safetensors", {"x": (dtype, [1, 5], as_stored.tobytes())}))
    assert np.array_equal(file.rows(file.tensors["x"], slice(None))[0], values)


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    model(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    weight_map = {}
    for number, name in enumerate(["a", "b"]):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        safetensors(tmp_path / file, {name: ("F32", [1, 2], np.full(2, number, "<f4").tobytes())})
        weight_map[name] = file
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.rows("b", slice(None)).tolist() == [[1, 1]]
    assert sorted(checkpoint.identity()) == ["config.json", *weight_map.values()]

    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map | {"a": weight_map["b"], "c": "x"}}))
    with pytest.raises(CheckpointError, match="x of the index is missing"):
        Checkpoint(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"b": weight_map["b"], "c": weight_map["a"]}}))
    with pytest.raises(CheckpointError, match=r"the index places c in .* which does not hold it"):
        Checkpoint(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"b": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"outside the model directory"):
        Checkpoint(tmp_path)


# -- directories that are no model -------------------------------------------------------------------------------------


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model directory"):
        Checkpoint(tmp_path / "nowhere")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        Checkpoint(tmp_path)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    (model(tmp_path) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (model(tmp_path) / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_the_remedy(name: str, tmp_path: Path) -> None:
    (model(tmp_path) / SINGLE_FILE).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"pickled weights .{name}.; safetensors only") as caught:
        Checkpoint(tmp_path)
    assert "save_pretrained" in str(caught.value.hint)


def test_a_checkpoint_of_another_quantization_is_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "aqlm", "bits": 2}}
    with pytest.raises(CheckpointError, match=r"already quantized \(aqlm\).*not read"):
        Checkpoint(model(tmp_path, config, packed=True))


# -- damaged files -----------------------------------------------------------------------------------------------------

_GOOD = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "not a JSON object"),
        ({"a": []}, "not described by an object"),
        ({"a": _GOOD | {"dtype": "Q4"}}, "unknown dtype"),
        ({"a": _GOOD | {"dtype": []}}, "unknown dtype"),
        ({"a": _GOOD | {"shape": [2**61, 2**61]}}, "but takes 8 bytes"),
        ({"a": _GOOD | {"shape": [-1, -2]}}, "not natural numbers"),
        ({"a": _GOOD | {"shape": [True, 2]}}, "not natural numbers"),
        ({"a": _GOOD | {"shape": [1.0, 2]}}, "not natural numbers"),
        ({"a": _GOOD | {"data_offsets": [0]}}, "not natural numbers"),
        ({"a": _GOOD | {"data_offsets": [8, 0]}}, "but takes -8 bytes"),
        ({"a": _GOOD | {"data_offsets": [8, 16]}}, "hole before it"),
        ({"a": _GOOD, "b": _GOOD}, "overlaps the tensor before it"),
        ({"a": _GOOD | {"shape": [2, 2], "data_offsets": [0, 16]}}, "is truncated: its tensors need"),
        ({}, "8 bytes after its last tensor"),
        ({"__metadata__": [], "a": _GOOD}, "__metadata__ is not an object"),
    ],
)
def test_headers_that_contradict_the_file_are_refused(header: Any, message: str, tmp_path: Path) -> None:
    path = raw_safetensors(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 2**63), struct.pack("<Q", 4) + b"{{{{"])
def test_files_that_are_not_safetensors_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        SafetensorsFile(path)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    header = {"a": _GOOD | {"dtype": "Q4"}, "b": _GOOD | {"shape": [3, 3]}}
    with pytest.raises(CheckpointError, match=r"(?s)2 faults.*a has the unknown.*b is F32"):
        SafetensorsFile(raw_safetensors(tmp_path / "x.safetensors", header, bytes(8)))


@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 7)), max_size=4))
def test_damage_is_an_error_or_harmless(cut: int, flips: list[tuple[int, int]], tmp_path: Path) -> None:
    """Truncated and bit-flipped files: CheckpointError or a header that is consistent, never anything else."""
    path = tmp_path / "fuzz.safetensors"
    whole = bytearray(safetensors(path, {f"t{i}": ("F32", [2, 3], bytes(24)) for i in range(3)}).read_bytes())
    for position, bit in flips:
        whole[position % len(whole)] ^= 1 << bit
    path.write_bytes(whole[:cut] if cut < 350 else whole)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for info in file.tensors.values():
        if info.dtype in _SIZES:
            file.rows(info, slice(None))


@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
            )
        ),
        max_leaves=8,
    )
)
def test_any_json_as_a_header(header: Any, tmp_path: Path) -> None:
    path = raw_safetensors(tmp_path / "fuzz.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError):  # eight bytes of data that no tensor accounts for
        SafetensorsFile(path)
