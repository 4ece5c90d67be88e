"""The record of the weights that bitsandbytes has quantized, from which the export computes the same numbers."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Params4bit
from numpy.typing import NDArray

import edgetune_native
from edgetune import console


def record_quantized_weights(model: Any) -> dict[str, Any]:
    """Return the `quantized` entry of the manifest: every 4-bit weight by name, grouped by common properties.

    The entry of a weight holds the offset of its nested scales, whose last bits depend on the device and its threads,
    and the hash of its scales, with which the export checks its own. Call it before an adapter changes the names.
    """
    groups: list[dict[str, Any]] = []
    misread = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Params4bit):
            continue
        common, own = _describe(weight.quant_state)
        group = next((each for each in groups if common.items() <= each.items()), None)
        if group is None:
            group = {**common, "tensors": {}}
            groups.append(group)
        group["tensors"][f"{name}.weight"] = own
        misread += [f"{name}.weight"] if _is_misread(weight) else []
    if misread:
        console.warn(
            f"bitsandbytes on this CPU misreads {len(misread)} weights, such as {misread[0]}, whose rows are not a "
            "multiple of the block size: no exported file can equal the model that is trained here; use "
            "quantization.bits: 16, or a GPU"
        )
    return {"device": model.device.type, "torch_threads": torch.get_num_threads(), "groups": groups, "misread": misread}


def _scales(state: Any) -> torch.Tensor:
    """Return the scale of each block."""
    if not state.nested:
        return torch.as_tensor(state.absmax)
    return torch.as_tensor(dequantize_blockwise(state.absmax, state.state2) + state.offset)


def _is_misread(weight: Any) -> bool:
    """Whether bitsandbytes multiplies by other scales than it stored, as its AVX-512 code does for rows of 96."""
    state = weight.quant_state
    if weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return False
    codes = weight.data.contiguous().view(torch.uint8).numpy().reshape(-1)
    expected = edgetune_native.dequantize_4bit(
        codes, _f32(_scales(state)), tuple(state.shape), quant_type=state.quant_type, blocksize=state.blocksize
    )
    values = dequantize_4bit(weight.data, state).float().numpy()
    return not np.allclose(values, expected, rtol=2**-7, atol=0)  # the dtype of the state may have rounded it


def _describe(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the properties that a weight shares with others, and its own."""
    common = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "double_quant": state.nested,
        "dtype": str(state.dtype).removeprefix("torch."),
        "nested_map": base64.b64encode(_f32(state.state2.code).tobytes()).decode() if state.nested else None,
    }
    offset = float(state.offset.item()) if state.nested else None
    return common, {"offset": offset, "scales_sha256": hashlib.sha256(_f32(_scales(state)).tobytes()).hexdigest()}


def _f32(values: torch.Tensor) -> NDArray[np.float32]:
    """Convert to little-endian float32, the format in which values are hashed and stored."""
    converted: NDArray[np.float32] = values.detach().float().cpu().numpy().astype("<f4")
    return converted
