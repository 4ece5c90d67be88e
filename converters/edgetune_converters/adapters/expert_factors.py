"""Pairs A, B of single experts, as factors of the parameter that holds all experts of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgetune_converters.adapters.weights import AdapterWeights
from edgetune_converters.tensors import ALL, F32, TensorInfo


@dataclass(frozen=True)
class ExpertPart:
    """A matrix [rows, columns] of one expert: rows from `first` on of expert `number` in a target of all experts."""

    target: str
    number: int
    first: int
    rows: int
    columns: int


@dataclass(frozen=True)
class ExpertPair:
    """A and B of the matrix of one expert."""

    part: ExpertPart
    a: TensorInfo
    b: TensorInfo
    scale: float


class StackCache:
    """Cache of the last two stacks of factors: each expert of a layer asks for the same stack."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[F32, F32]] = {}

    def __call__(self, name: str, read: Callable[[], tuple[F32, F32]]) -> tuple[F32, F32]:
        found = self._kept.pop(name, None) or read()
        self._kept = {**dict(list(self._kept.items())[-1:]), name: found}
        return found


@dataclass(frozen=True)
class PairsOfExperts:
    """Reads the pairs as left [experts, n, r] and right [experts, r, k], with zeros where an expert has no pair.

    Pairs of one expert (gate and up) follow each other along r. `transposed`: the target [experts, n, k] holds the
    matrix of each expert transposed.
    """

    file: AdapterWeights
    pairs: tuple[ExpertPair, ...]
    shape: tuple[int, ...]
    transposed: bool
    cache: StackCache

    def __call__(self) -> tuple[F32, F32]:
        return self.cache(self.pairs[0].b.name, self._read)

    def _read(self) -> tuple[F32, F32]:
        count, rows, columns = self.shape
        ranks = [0] * count
        places = []
        for pair in self.pairs:
            rank = pair.a.shape[0]
            places.append(slice(ranks[pair.part.number], ranks[pair.part.number] + rank))
            ranks[pair.part.number] += rank
        left, right = (
            np.zeros((count, rows, max(ranks)), np.float32),
            np.zeros((count, max(ranks), columns), np.float32),
        )
        for pair, place in zip(self.pairs, places, strict=True):
            part = pair.part
            own = slice(part.first, part.first + part.rows)
            a, b = self.file.rows(pair.a, ALL), self.file.rows(pair.b, ALL) * np.float32(pair.scale)
            if self.transposed:
                left[part.number, :, place], right[part.number, place, own] = a.T, b.T
            else:
                left[part.number, own, place], right[part.number, place] = b, a
        return left, right
