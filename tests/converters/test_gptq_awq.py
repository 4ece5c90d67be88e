"""GPTQ and AWQ weights: every bit as GPTQModel and AutoAWQ dequantize them, from samples that these libraries wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune_converters.reading.prequantized.methods import decoders
from edgetune_converters.reading.safetensors_file import SafetensorsFile, row_count

SAMPLES = Path(__file__).parent / "quantized_samples"


def _samples() -> Iterator[tuple[str, str]]:
    for method in ("gptq", "awq"):
        for name in SafetensorsFile(SAMPLES / f"{method}.safetensors").metadata:
            yield method, name


@pytest.mark.parametrize(("method", "name"), list(_samples()))
def test_weights_are_those_of_the_library(method: str, name: str) -> None:
    """In f32 the product is exact; rounded once, it is the product of the library in f16, the type of the scales."""
    file = SafetensorsFile(SAMPLES / f"{method}.safetensors")
    stored = {f"m.{key.partition('.')[2]}": info for key, info in file.tensors.items() if key.startswith(f"{name}.")}
    wanted = {part: file.rows(stored.pop(f"m.{part}"), slice(None)) for part in ("f16", "f32")}
    packed = {key: replace(info, name=key) for key, info in stored.items()}

    def view(info: Any) -> Any:
        return file.raw(info, 0, row_count(info.shape)).reshape(info.shape)

    config = {"quantization_config": json.loads(file.metadata[name])}
    decoder = decoders(packed, config, view)["m.weight"]
    rows = decoder.rows(0, decoder.info.shape[0])
    assert (decoder.info.shape, set(decoder.parts)) == (rows.shape, set(packed))
    if "gemv_fast" in name:  # which stores the product of scale and zero point in f16: half a unit of its last place
        assert np.abs(rows - wanted["f32"]).max() <= np.spacing(np.float16(0.021 * 15)) / 2
    else:
        assert np.array_equal(rows, wanted["f32"])
        assert np.array_equal(rows.astype(np.float16).astype(np.float32), wanted["f16"])
    for first, last in ((0, 1), (3, 17), (8, 9), (13, 32), (31, 32)):
        assert np.array_equal(decoder.rows(first, last), rows[first:last]), (first, last)
