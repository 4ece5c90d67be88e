"""One module of the base with the adapter's tensors for it: what the fold of a kind gets, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.change import Apply, ReadDelta, added
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.products import is_zero_product, product
from edgetune_converters.adapters.weights import AdapterWeights
from edgetune_converters.reading.safetensors_file import INTEGERS
from edgetune_converters.tensors import ALL, F32, Read, TensorInfo


class Misfit(Exception):
    """The tensors of a module do not fit; the message says which and why."""


@dataclass(frozen=True)
class Fold:
    """The change of the weight or the bias of a module: a transform, or factors left [n, r] and right [r, k].

    Both concern the matrix as PyTorch's Linear holds it, [outputs, inputs] (an embedding: [rows, width]); where the
    base stores it transposed, the matching transposes. A bias is a column [outputs, 1]. The adapter's tensors are read
    when `apply` or `factors` is called.
    """

    apply: Apply | None = None
    factors: Callable[[], tuple[F32, F32]] | None = None
    part: Literal["weight", "bias"] = "weight"
    changes_nothing: Callable[[], bool] = lambda: False
    needs_trained: bool = False

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return is_zero_product(*self.factors()) if self.factors else self.changes_nothing()

    def as_apply(self) -> Apply:
        """Return the change as a transform."""
        factors = self.factors
        if factors is None:
            assert self.apply is not None
            return self.apply

        def delta() -> ReadDelta:
            left, right = factors()
            return lambda rows, columns: product(left, right, rows, columns)

        return added(delta)


@dataclass
class AdaptedModule:
    """A module of the base that an adapter changes. Shapes are checked at once, values read on demand."""

    name: str
    """As the adapter spells it, and as the patterns of adapter_config.json see it."""
    rows: int
    columns: int
    has_bias: bool
    tensors: Mapping[str, TensorInfo]
    """The tensors of the module by role."""
    shared: Mapping[str, TensorInfo]
    """The tensors that all modules share, by role."""
    config: PeftConfig
    file: AdapterWeights
    widest: Callable[[], tuple[int, int] | None] = lambda: None
    """The largest numbers of outputs and of inputs of all modules; None where one is not known."""
    weight: Callable[[], Read] | None = None
    """Returns the reader of the weight [outputs, inputs] as the base stores it; None where there is none."""
    used: dict[str, TensorInfo] = field(default_factory=dict)
    """The tensors that the fold asked for: those that it did not are reported as unused."""

    def has(self, role: str) -> bool:
        """Whether the adapter has a tensor of this role for the module."""
        return role in self.tensors or role in self.shared

    def shape(self, role: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises Misfit when the adapter has none."""
        return self._info(role).shape

    def tensor(self, role: str, *shapes: tuple[int, ...]) -> Callable[[], F32]:
        """Return a function that reads a tensor in f32 [its first axes, last axis] reshaped to its own shape.

        Raises Misfit when the adapter has none, or when its shape is none of `shapes`.
        """
        info = self._info(role)
        if shapes and info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise Misfit(f"{info.name} has the shape {list(info.shape)}, not {wanted}")
        return lambda: self.file.rows(info, ALL).reshape(info.shape)

    def integers(self, role: str, *shapes: tuple[int, ...]) -> Callable[[], NDArray[np.int64]]:
        """Return a function that reads a tensor of integers in its own shape. Raises Misfit as `tensor`."""
        read, info = self.tensor(role, *shapes), self._info(role)
        return lambda: self.file.integers(info) if info.dtype in INTEGERS else read().astype(np.int64)

    def _info(self, role: str) -> TensorInfo:
        info = self.tensors.get(role) or self.shared.get(role)
        if info is None:
            raise Misfit(f"{self.name} has no {role}")
        self.used[role] = info
        return info
