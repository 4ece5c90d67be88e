"""compressed-tensors: every format as the library itself writes it, and every weight as the library decompresses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from edgetune_converters.reading.prequantized.methods import decoders
from edgetune_converters.reading.safetensors_file import SafetensorsFile, row_count

torch: Any = pytest.importorskip("torch")
compressors: Any = pytest.importorskip("compressed_tensors.compressors", reason="pip install compressed-tensors")
quantization: Any = pytest.importorskip("compressed_tensors.quantization")

ROWS, COLUMNS = 72, 256

# name -> format, settings of the weights
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"int{bits}-group-{'sym' if symmetric else 'asym'}": (
            "pack-quantized",
            {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric},
        )
        for bits in range(2, 9)
        for symmetric in (True, False)
    },
    "int4-channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}),
    "int4-channel-asym": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False}),
    "int4-tensor": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "tensor", "symmetric": True}),
    "w8a8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
    "w8a8-asym": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "int8-group": (
        "naive-quantized",
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True},
    ),
    "int8-group-asym": (
        "naive-quantized",
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-group": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True},
    ),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
}


def _compressed(name: str, weight: Any, dtype: Any) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """The stored tensors of a weight, the weight as the library gives it back, and config.json's entry."""
    format_, settings = SCHEMES[name]
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**settings))
    compressor = compressors.BaseCompressor.get_value_from_registry(format_)
    state = {"weight": weight.to(dtype), **_parameters(scheme.weights, weight, dtype)}
    stored = compressor.compress(state, scheme)
    entry = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    return stored, compressor.decompress(dict(stored), scheme)["weight"], entry


def _parameters(args: Any, weight: Any, dtype: Any) -> dict[str, Any]:
    """Scales and zero points as the library computes them from the range of each group."""
    strategy = str(args.strategy)
    rows, columns = weight.shape
    if strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        blocks = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif strategy in ("group", "tensor_group"):
        groups = weight.reshape(rows, -1, args.group_size)
        low, high = groups.amin(-1), groups.amax(-1)
    elif strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    found = {}
    if strategy == "tensor_group":
        found["weight_global_scale"] = quantization.utils.generate_gparam(low.min(), high.max())
    scale, zero = quantization.utils.calculate_qparams(low, high, args, global_scale=found.get("weight_global_scale"))
    found["weight_scale"] = scale if strategy == "tensor_group" else scale.to(dtype)
    return found if args.symmetric else found | {"weight_zero_point": zero}


def _decoder(stored: dict[str, Any], entry: dict[str, Any], directory: Path) -> tuple[Any, set[str]]:
    """The decoder of a weight, and the names of the stored tensors."""
    save_file({f"m.{part}": tensor.contiguous() for part, tensor in stored.items()}, directory / "x.safetensors")
    file = SafetensorsFile(directory / "x.safetensors")

    def view(info: Any) -> Any:
        return file.raw(info, 0, row_count(info.shape)).reshape(info.shape)

    return decoders(file.tensors, {"quantization_config": entry}, view)["m.weight"], set(file.tensors)


def _decoded(stored: dict[str, Any], entry: dict[str, Any], directory: Path) -> Any:
    return _decoder(stored, entry, directory)[0].rows(0, ROWS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_of_the_library(name: str, dtype: str, tmp_path: Path) -> None:
    """The product in f32, rounded once to the type of the model, is that of the library in this type."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) * 0.05
    stored, wanted, entry = _compressed(name, weight, getattr(torch, dtype))
    decoder, parts = _decoder(stored, entry, tmp_path)
    assert (decoder.info.shape, set(decoder.parts)) == ((ROWS, COLUMNS), parts)
    rows = decoder.rows(0, ROWS)
    assert np.array_equal(torch.from_numpy(rows).to(wanted.dtype).float().numpy(), wanted.float().numpy())
    for first, last in ((0, 1), (3, 17), (31, 65), (71, 72)):
        assert np.array_equal(decoder.rows(first, last), rows[first:last])


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    """Zero points in bytes, groups in the order of activations (g_idx), and 3 bits with ten codes in a word."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) * 0.05
    stored, _, entry = _compressed("int3-group-asym", weight, torch.float32)
    scheme = quantization.QuantizationArgs(**SCHEMES["int3-group-asym"][1])
    parameters = _parameters(scheme, weight, torch.float32)
    scale, zero = parameters["weight_scale"], parameters["weight_zero_point"].to(torch.int8)
    index = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1)) // 32
    codes = ((weight / scale[:, index]).round() + zero[:, index]).clamp(-4, 3)
    padded = torch.nn.functional.pad(codes + 4, (0, -COLUMNS % 10)).to(torch.int32).reshape(ROWS, -1, 10)
    words = sum(padded[..., place] << (3 * place) for place in range(10))
    old = stored | {"weight_packed": words, "weight_zero_point": zero, "weight_g_idx": index.to(torch.int32)}
    wanted = (codes - zero[:, index]) * scale[:, index]
    assert np.array_equal(_decoded(old, entry, tmp_path), wanted.numpy())


def test_an_index_of_minus_ones_is_no_order(tmp_path: Path) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) * 0.05
    stored, wanted, entry = _compressed("int4-group-asym", weight, torch.float32)
    unset = stored | {"weight_g_idx": torch.full((COLUMNS,), -1, dtype=torch.int32)}
    assert np.array_equal(_decoded(unset, entry, tmp_path), wanted.numpy())


def test_nvfp4_of_modelopt_has_a_factor_where_the_library_has_a_divisor(tmp_path: Path) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) * 0.05
    stored, wanted, _ = _compressed("nvfp4", weight, torch.float32)
    factor = 1 / stored["weight_global_scale"].reshape(())
    parts = {
        "weight": stored["weight_packed"],
        "weight_scale": stored["weight_scale"],
        "weight_scale_2": factor,
        "input_scale": torch.tensor(0.5),
    }
    rows = _decoded(parts, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, tmp_path)
    codes = wanted.float() / (stored["weight_scale"].float().repeat_interleave(16, 1) * factor)
    exact = codes.mul(2).round().div(2) * (stored["weight_scale"].float() * factor).repeat_interleave(16, 1)
    assert np.array_equal(rows, exact.numpy())
