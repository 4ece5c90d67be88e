"""What all decoders of quantized weights share: the interface, the error of a weight, and checks of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import CheckpointError
from edgetune_converters.tensors import F32, TensorInfo, to_f32

ViewTensor = Callable[[TensorInfo], NDArray[Any]]
ConfigJson = Mapping[str, Any]

FLOATS = ("F32", "F16", "BF16")
"""The dtypes of scales."""


class WeightDecoder(Protocol):
    """Decodes one quantized weight."""

    @property
    def info(self) -> TensorInfo:
        """Name and original shape of the weight; `dtype` as it is stored."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the stored tensors that belong to it."""

    def rows(self, first: int, last: int) -> F32:
        """Return rows first..last as a fresh f32 array."""


MakeDecoder = Callable[[str, Mapping[str, TensorInfo], ConfigJson, ViewTensor], WeightDecoder]
"""Makes a decoder of the name of the stored tensor, all tensors, `quantization_config`, and a view of a tensor."""


class WeightError(Exception):
    """What is wrong with one weight, as a sentence with its name."""


def is_or_are(things: Sequence[str]) -> str:
    """Return the verb for a list of names."""
    return "is" if len(things) == 1 else "are"


def required(module: str, endings: Iterable[str], tensors: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """Return the parts of a module. Raises WeightError with those that are missing."""
    names = [f"{module}.{ending}" for ending in endings]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise WeightError(f"{module} is stored quantized, but {' and '.join(missing)} {is_or_are(missing)} missing")
    return [tensors[name] for name in names]


def check_matrix(info: TensorInfo, dtypes: Sequence[str], shape: tuple[int | None, ...] = (None, None)) -> None:
    """Raise WeightError unless a part has one of `dtypes` and the shape; None stands for any length above 0."""
    fits = len(info.shape) == len(shape) and all(
        length == wanted if wanted is not None else length > 0 for length, wanted in zip(info.shape, shape, strict=True)
    )
    if not fits or info.dtype not in dtypes:
        lengths = ", ".join("any" if length is None else str(length) for length in shape)
        wanted = info.dtype if info.dtype in dtypes else " or ".join(dtypes)
        raise WeightError(f"{info.name} is {info.dtype} {list(info.shape)}; {wanted} [{lengths}] was expected")


def finite_scales(stored: NDArray[Any], info: TensorInfo) -> F32:
    """Return scales in f32. Raises CheckpointError for NaN and infinity."""
    scales = to_f32(np.ascontiguousarray(stored), info.dtype)
    if not np.isfinite(scales).all():
        raise CheckpointError(f"{info.name} holds NaN or infinity", "The base model is damaged: fetch it again")
    return scales
