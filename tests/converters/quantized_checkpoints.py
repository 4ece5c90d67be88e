"""Tiny checkpoints with the matrices of their blocks in GPTQ, AWQ or compressed-tensors, and the same weights plain.

The packing is written from the published formats; that the reader agrees with the libraries is shown by samples.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"
GROUP = 4
Arrays = dict[str, NDArray[Any]]
Pack = Callable[[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], int], Arrays]
_LINEAR = re.compile(r".*(layers|h|blocks)\.\d+\..*\.weight")
_OTHERS = re.compile(r".*(norm|ln_|conv|gate\.weight|router|embed|wte|wpe).*")
_CONV1D = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")


def bit_stream(codes: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Pack codes along the last axis without gaps, the first in the lowest bits, into words of 32 bits."""
    single = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    flat = single.reshape(*codes.shape[:-1], -1)
    flat = np.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % 32)])
    return np.packbits(flat, axis=-1, bitorder="little").view(np.int32)


def as_gptq(codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any], index: NDArray[Any], bits: int) -> Arrays:
    """The parts of a GPTQ layer (checkpoint_format gptq), with the bias of zeros that AutoGPTQ adds."""
    return {
        "qweight": np.ascontiguousarray(bit_stream(codes.T.T, bits).T),
        "qzeros": bit_stream(zeros.T - 1, bits),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": index.astype(np.int32),
        "bias": np.zeros(len(codes), np.float16),
    }


def as_awq(codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any], index: NDArray[Any], bits: int) -> Arrays:
    """The parts of an AWQ layer (version gemm)."""

    def ordered(values: NDArray[Any]) -> NDArray[np.int32]:
        return bit_stream(values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape), 4)

    return {"qweight": ordered(codes.T), "qzeros": ordered(zeros.T), "scales": np.ascontiguousarray(scales.T)}


def as_packed(codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any], index: NDArray[Any], bits: int) -> Arrays:
    """The parts of a layer of compressed-tensors (pack-quantized, asymmetric)."""
    return {
        "weight_packed": bit_stream(codes, bits),
        "weight_scale": scales,
        "weight_zero_point": np.ascontiguousarray(bit_stream(zeros.T, bits).T),
        "weight_shape": np.array(codes.shape, np.int64),
    }


ENTRIES: dict[str, tuple[Pack, dict[str, Any]]] = {
    "gptq": (as_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
    "gptq-3bit": (as_gptq, {"quant_method": "gptq", "bits": 3, "group_size": GROUP, "desc_act": False, "sym": False}),
    "awq": (as_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "pack-quantized": (
        as_packed,
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": False}}},
        },
    ),
}  # fmt: skip


def quantized(base: Path, directory: Path, method: str, *, only: str = ".*", order: bool = False) -> tuple[Path, Path]:
    """Write a quantized copy of a checkpoint, and a plain one in f32 with the same weights; return both.

    Args:
        base: The directory of a model in one file.
        directory: Where the two are written.
        method: A key of ENTRIES.
        only: Which of the matrices are quantized, a pattern of their names.
        order: Whether columns are assigned to groups in another order than theirs (desc_act).
    """
    pack, entry = ENTRIES[method]
    bits = entry.get("bits", 4)
    tensors = load_file(base / WEIGHTS)
    plain, stored = {name: array.astype(np.float32) for name, array in tensors.items()}, dict(tensors)
    for name in _matrices(tensors, only, 8 if method == "awq" else 1):
        weight = plain[name].T if _CONV1D.fullmatch(name) and _is_gpt2(base) else plain[name]
        codes, zeros, scales, index = _rounded(weight, bits, order)
        value = (codes.astype(np.float32) - zeros[:, index]) * scales.astype(np.float32)[:, index]
        plain[name] = np.ascontiguousarray(value.T if weight is not plain[name] else value)
        module = name.removesuffix(".weight")
        del stored[name]
        parts = pack(codes, zeros, scales, index, bits)
        stored = {f"{module}.{part}": array for part, array in parts.items()} | stored  # an own bias wins
    return (
        _written(base, directory / method, stored, {"quantization_config": entry}),
        _written(base, directory / "plain", plain, {"torch_dtype": "float32", "dtype": "float32"}),
    )


def _matrices(tensors: Arrays, only: str, together: int) -> Iterator[str]:
    for name, array in tensors.items():
        fits = array.ndim == 2 and array.shape[0] % together == 0 and array.shape[1] % GROUP == 0
        if fits and _LINEAR.fullmatch(name) and not _OTHERS.fullmatch(name) and re.search(only, name):
            yield name


def _is_gpt2(base: Path) -> bool:
    return bool(json.loads((base / "config.json").read_text())["model_type"] == "gpt2")


def _rounded(weight: NDArray[Any], bits: int, order: bool) -> tuple[NDArray[Any], ...]:
    """Codes, zero points of at least 1, scales in f16, and the group of each column."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.min(-1), groups.max(-1)
    scales = np.maximum((high - low) / (2**bits - 1), 1e-5).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 1, 2**bits - 1).astype(np.uint8)
    index = np.arange(weight.shape[1]) // GROUP
    if order:
        index = index[np.random.default_rng(0).permutation(len(index))]
    steps = scales.astype(np.float32)[:, index]
    codes = np.clip(np.rint(weight / steps) + zeros[:, index], 0, 2**bits - 1).astype(np.uint8)
    return codes, zeros, scales, index


def _written(base: Path, directory: Path, tensors: Arrays, entries: dict[str, Any]) -> Path:
    shutil.copytree(base, directory)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    stated = json.loads((directory / "config.json").read_text()) | entries
    (directory / "config.json").write_text(json.dumps(stated))
    return directory
