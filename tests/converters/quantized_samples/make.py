"""Write the samples beside this file: weights as GPTQModel and AutoAWQ pack them, and as they dequantize them.

The libraries are no dependencies: gptqmodel keeps PEFT from being imported. Run it in an environment of its own:

    pip install torch transformers safetensors gptqmodel==7.7.0 autoawq==0.2.9
    python tests/converters/quantized_samples/make.py
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS, COLUMNS = 32, 128

torch: Any = importlib.import_module("torch")
save_file: Any = importlib.import_module("safetensors.torch").save_file

# name -> bits, group_size, desc_act, sym, checkpoint_format
GPTQ: dict[str, tuple[int, int, bool, bool, str]] = {
    **{f"bits{bits}": (bits, 32, False, True, "gptq") for bits in (2, 3, 4, 8)},
    **{f"bits{bits}_planes": (bits, 32, False, False, "gptq_p") for bits in (3, 5, 6, 7, 8)},
    **{f"bits{bits}_asym": (bits, 64, False, False, "gptq") for bits in (2, 3, 4, 8)},
    **{f"bits{bits}_v2": (bits, 64, False, False, "gptq_v2") for bits in (2, 3, 4, 8)},
    **{f"bits{bits}_order": (bits, 32, True, False, "gptq") for bits in (2, 3, 4, 8)},
    "whole_rows": (4, -1, False, True, "gptq"),
    "whole_rows_order": (4, -1, True, False, "gptq_v2"),
    "one_group": (4, 128, False, False, "gptq"),
}


def gptq() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield name, settings and tensors of each case, with the weight in f16 and, from scales in f32, in f32."""
    linear = importlib.import_module("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    to_v1 = importlib.import_module("gptqmodel.utils.model").convert_gptq_v2_to_v1_format_module
    quantization = importlib.import_module("gptqmodel.quantization")
    for seed, (name, (bits, size, order, sym, stored)) in enumerate(GPTQ.items()):
        generator = torch.Generator().manual_seed(seed)
        count = 1 if size < 0 else COLUMNS // size
        scales = (torch.rand(ROWS, count, generator=generator) * 0.02 + 0.001).half().float()
        zeros = torch.full((ROWS, count), 2.0 ** (bits - 1))
        if not sym:
            zeros = torch.randint(0, 2**bits, (ROWS, count), generator=generator).float()
        index = torch.arange(COLUMNS) // (COLUMNS // count)
        index = (index[torch.randperm(COLUMNS, generator=generator)] if order else index).to(torch.int32)
        plain = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator)
        plain.weight.data = scales[:, index.long()] * (codes - zeros[:, index.long()])
        settings: dict[str, Any] = {"bits": bits, "group_size": size, "desc_act": order, "sym": sym}
        sizes = {"in_features": COLUMNS, "out_features": ROWS, "bias": False}
        layer = linear(**settings, **sizes, format=quantization.FORMAT(stored))
        layer.pack_original(linear=plain, scales=scales, zeros=zeros, g_idx=index)
        layer.eval()
        layer.scales = layer.scales.half()
        half = layer.dequantize_weight().T.contiguous()
        layer.scales = layer.scales.float()
        exact = layer.dequantize_weight().T.contiguous()
        if stored == "gptq":
            to_v1(layer, quantization.QuantizeConfig(**settings))
        tensors = {part: getattr(layer, part).clone() for part in ("qweight", "qzeros", "g_idx")}
        tensors |= {"scales": layer.scales.half(), "f16": half, "f32": exact}
        yield name, {"quant_method": "gptq", **settings, "checkpoint_format": stored}, tensors


def awq() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """As `gptq`: gemm is what AutoAWQ gives back, the others pack the same integers, which it unpacks on GPUs only."""
    modules = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    gemv = importlib.import_module("awq.modules.linear.gemv").WQLinear_GEMV
    fast = importlib.import_module("awq.modules.linear.gemv_fast").WQLinear_GEMVFast
    unpacked = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    for seed, size in enumerate((32, 64, 128, -1)):
        generator = torch.Generator().manual_seed(seed)
        width = COLUMNS if size < 0 else size
        count = COLUMNS // width
        scales = (torch.rand(ROWS, count, generator=generator) * 0.02 + 0.001).half().float()
        zeros = torch.randint(0, 16, (ROWS, count), generator=generator).float()
        codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=generator)
        plain = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        plain.weight.data = ((codes.reshape(ROWS, count, width) - zeros[..., None]) * scales[..., None]).reshape(
            ROWS, COLUMNS
        )
        gemm = modules.from_linear(plain, 4, width, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        half = unpacked(gemm.qweight, gemm.qzeros, gemm.scales, 4, width).T.contiguous()
        exact = unpacked(gemm.qweight, gemm.qzeros, gemm.scales.float(), 4, width).T.contiguous()
        for version, layer in (
            ("gemm", gemm),
            ("gemv", gemv.from_linear(plain, 4, width, scales=scales, zeros=zeros)),
            ("gemv_fast", fast.from_linear(plain, 4, width, scales=scales, zeros=zeros)),
        ):
            tensors = {part: getattr(layer, part).contiguous() for part in ("qweight", "qzeros", "scales")}
            settings = {"bits": 4, "group_size": size, "zero_point": True, "version": version}
            yield f"{version}_{width}", {"quant_method": "awq", **settings}, {**tensors, "f16": half, "f32": exact}


def main() -> None:
    """Write gptq.safetensors and awq.safetensors: tensors NAME.PART, settings by name in the metadata."""
    for method, cases in (("gptq", gptq()), ("awq", awq())):
        tensors: dict[str, Any] = {}
        stated: dict[str, Any] = {}
        for name, settings, parts in cases:
            stated[name] = json.dumps(settings)
            tensors |= {f"{name}.{part}": tensor.clone().contiguous() for part, tensor in parts.items()}
        save_file(tensors, HERE / f"{method}.safetensors", metadata=stated)


if __name__ == "__main__":
    main()
