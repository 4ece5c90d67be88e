"""Several adapters as one: their weighted sum, or TIES, DARE and magnitude pruning of LoRA.

`linear` adds the changes of adapters of any kind, `cat` those of LoRA, which PEFT stores as longer A and B. `ties` and
the like combine all A and all B of a module apart, each weighted by the root of weight * scale; `ties-svd` and the
like combine the products of B and A, of which singular values make a pair of a given rank. Source: PEFT,
tuners/lora/model.py (add_weighted_adapter), utils/merge_utils.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.adapters.change import Change, Transform
from edgetune_converters.adapters.combine_methods import COMBINE_METHODS, CombineMethod
from edgetune_converters.adapters.lora import PairFactors
from edgetune_converters.adapters.lora_variants import PLAIN
from edgetune_converters.adapters.low_rank import best_factors, of_product
from edgetune_converters.adapters.once import Once
from edgetune_converters.adapters.products import matrix_product, product
from edgetune_converters.adapters.state_dict import AdapterTensors
from edgetune_converters.adapters.torch_random import kept_at_random
from edgetune_converters.errors import AdapterError
from edgetune_converters.names import CombineName
from edgetune_converters.tensors import ALL, F32, Read, RowIndex, widened

_SHOWN = 5
"""Changes that an error names one by one."""


@dataclass(frozen=True)
class Combination:
    """Adapters that are combined, in order, and how."""

    adapters: tuple[Path, ...]
    weights: tuple[float, ...]
    method: CombineName = "linear"
    density: float = 1.0
    """Share of the values that is kept; without effect where nothing is pruned."""
    seed: int = 0
    """Of what DARE draws."""
    rank: int | None = None
    """Of the pairs that singular values make; None: the largest of the combined pairs."""


class CombinedAdapter(Adapter):
    """Several adapters with weights. Raises AdapterError for one that cannot be combined."""

    def __init__(self, combination: Combination, parts: Sequence[Adapter]) -> None:
        first = parts[0]
        self.combination, self.parts = combination, tuple(parts)
        self.config, self.file, self.kind, self.path, self.stacks = (
            first.config, first.file, first.kind, first.path, first.stacks
        )  # fmt: skip
        self.labels = _labels([part.path for part in parts])
        self._weights = ()
        self._initial = ()
        self._tensors = None
        self.notes: list[str] = []

    def identity(self) -> dict[str, str]:
        """Return the SHA-256 of the files of all adapters, and of weights and method under `combination`."""
        files = {
            f"{label}/{name}": digest
            for label, part in zip(self.labels, self.parts, strict=True)
            for name, digest in part.identity().items()
        }
        return files | {"combination": hashlib.sha256(json.dumps(self.description).encode()).hexdigest()}

    @property
    def description(self) -> dict[str, Any]:
        """How the adapters are combined, for receipts and metadata."""
        made = self.combination
        found: dict[str, Any] = {
            "method": made.method,
            "adapters": [
                {"name": label, "weight": weight} for label, weight in zip(self.labels, made.weights, strict=True)
            ],
        }
        method = COMBINE_METHODS[made.method]
        if method.prunes:
            found["density"] = made.density
        if method.at_random:
            found["seed"] = made.seed
        if method.lowers_rank:
            found["rank"] = made.rank
        return found

    def tensors(self, base: BaseTargets) -> AdapterTensors:
        """Return the tensors of the first adapter."""
        return self.parts[0].tensors(base)

    def changes(self, base: BaseTargets) -> dict[str, Change]:
        """Return the combined change of each base tensor that one of the adapters touches. Raises AdapterError."""
        of_parts = [part.changes(base) for part in self.parts]
        self.notes = [
            f"{label}: {note}" for label, part in zip(self.labels, self.parts, strict=True) for note in part.notes
        ]
        combined: dict[str, Change] = {}
        problems: list[str] = []
        method = COMBINE_METHODS[self.combination.method]
        for target in dict.fromkeys(name for changes in of_parts for name in changes):
            found = [(index, changes[target]) for index, changes in enumerate(of_parts) if target in changes]
            if why := _why_not_combined([change for _, change in found], method):
                labels = " and ".join(self.labels[index] for index, _ in found)
                problems.append(f"{target}, changed by {labels}: {why}")
                continue
            if not method.prunes and not method.lowers_rank:
                combined[target] = _sum_of([(self.combination.weights[index], change) for index, change in found])
                continue
            make = partial(self._of_products if method.lowers_rank else self._pruned, target, found)
            names = [name for _, change in found for name in change.names]
            combined[target] = Change(self.file, factors=Once(make), names=names)
        if problems:
            raise AdapterError.of_many(
                f"changes that {self.combination.method} cannot combine",
                problems[:_SHOWN],
                "Combine them with --combine linear, which adds the changes of any kind",
                total=len(problems),
            )
        return combined

    def _pruned(self, target: str, found: Sequence[tuple[int, Change]]) -> tuple[F32, F32]:
        """Return the combination of all A and of all B."""
        pairs = []
        for index, change in found:
            assert isinstance(change.factors, PairFactors)
            pairs.append((self.combination.weights[index] * change.factors.scale, change.factors, index))
        roots = [math.sqrt(abs(weight)) for weight, _, _ in pairs]
        signed = [math.copysign(root, weight) for root, (weight, _, _) in zip(roots, pairs, strict=True)]
        factors = [(pair.file.rows(pair.a, ALL), pair.file.rows(pair.b, ALL)) for _, pair, _ in pairs]
        labels = [index for _, _, index in pairs]
        a = self._combined([a for a, _ in factors], signed, [f"{target} A {label}" for label in labels])
        b = self._combined([b for _, b in factors], roots, [f"{target} B {label}" for label in labels])
        left, right = (a.T, b.T) if pairs[0][1].transposed else (b, a)
        return np.ascontiguousarray(left), np.ascontiguousarray(right)

    def _of_products(self, target: str, found: Sequence[tuple[int, Change]]) -> tuple[F32, F32]:
        """Return the pair that is nearest to the combination of all products."""
        pairs = [change.factors() for _, change in found if change.factors is not None]
        rank = self.combination.rank or max(right.shape[0] for _, right in pairs)
        weights = [self.combination.weights[index] for index, _ in found]
        if not COMBINE_METHODS[self.combination.method].prunes:
            left, right = joined([(weight, *pair) for weight, pair in zip(weights, pairs, strict=True)])
            return (left, right) if right.shape[0] <= rank else of_product(left, right, rank)[:2]
        products = [matrix_product(left, right) for left, right in pairs]
        return best_factors(self._combined(products, weights, [f"{target} {index}" for index, _ in found]), rank)

    def _combined(self, values: Sequence[F32], weights: Sequence[float], labels: Sequence[str]) -> F32:
        made = self.combination
        method = COMBINE_METHODS[made.method]
        prune = partial(dropped_at_random, seed=made.seed) if method.at_random else without_smallest
        kept = [prune(each, made.density, label=label) for each, label in zip(values, labels, strict=True)]
        return weighted_sum(np.stack(kept), np.array(weights, np.float32), by_majority=method.by_majority)


def _labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of the directories, numbered where two are equal."""
    names = [path.resolve().name for path in paths]
    return tuple(
        name if names.count(name) == 1 else f"{name}-{names[:place].count(name) + 1}"
        for place, name in enumerate(names)
    )


# -- sums of changes ---------------------------------------------------------------------------------------------------


def _sum_of(weighted: Sequence[tuple[float, Change]]) -> Change:
    """Return the weighted sum of what several changes add to a tensor; a sum of products stays a product."""
    changes = [change for _, change in weighted]
    names = [name for change in changes for name in change.names]
    file = changes[0].file
    if all(_is_product(change) for change in changes):
        return Change(file, factors=partial(_joined, weighted), names=names)

    def apply(base: Read, trained: Read) -> Read:
        merged = [(np.float32(weight), _reader(change, base, trained)) for weight, change in weighted]

        def read(rows: RowIndex, columns: RowIndex) -> F32:
            before = widened(base(rows, columns))
            found = np.array(before, np.float32)
            for weight, after in merged:
                found += weight * (widened(after(rows, columns)) - before)
            return found

        return read

    needed = any(change.transform is not None and change.transform.needs_trained for change in changes)
    return Change(file, transform=Transform(apply, (), needs_trained=needed), names=names)


def _is_product(change: Change) -> bool:
    return change.factors is not None and change.replacement is None and change.token_rows is None


def _joined(weighted: Sequence[tuple[float, Change]]) -> tuple[F32, F32]:
    return joined([(weight, *change.factors()) for weight, change in weighted if change.factors is not None])


def joined(pairs: Sequence[tuple[float, F32, F32]]) -> tuple[F32, F32]:
    """Return one pair whose product is the weighted sum of the products of pairs (weight, left, right)."""
    left = np.concatenate([left * np.float32(weight) for weight, left, _ in pairs], axis=-1)
    return np.ascontiguousarray(left), np.concatenate([right for _, _, right in pairs], axis=-2)


def _reader(change: Change, base: Read, trained: Read) -> Read:
    """Return a reader of the tensor with one change."""
    read = base
    if change.replacement is not None:
        read = partial(change.file.stored, change.replacement)
    if change.token_rows is not None:
        read = change.token_rows.over(read)
    if change.transform is not None:
        return change.transform.apply(read, read if trained is base else trained)
    if change.factors is None:
        return read
    left, right = change.factors()
    return lambda rows, columns: widened(read(rows, columns)) + product(left, right, rows, columns)


# -- pruned pairs ------------------------------------------------------------------------------------------------------


def _why_not_combined(changes: Sequence[Change], method: CombineMethod) -> str | None:
    if not method.pairs_alone:
        return None
    pairs = [change.factors for change in changes if isinstance(change.factors, PairFactors)]
    if len(pairs) < len(changes) or not all(_is_product(change) for change in changes):
        return "it is not changed by a pair A, B of LoRA alone"
    if not method.prunes and not method.lowers_rank:
        return None
    if any(pair.experts is not None for pair in pairs):
        return "its pairs are those of all experts"
    if method.lowers_rank:
        return None
    if any(pair.initial is not None or pair.spelled is not PLAIN for pair in pairs):
        return "its pair is of a variant of LoRA"
    ranks = [pair.a.shape[0] for pair in pairs]
    return None if len(set(ranks)) == 1 else f"the ranks {', '.join(map(str, ranks))} differ"


def without_smallest(values: F32, density: float, *, label: str = "") -> F32:
    """Return values of which the largest share `density` is kept, by magnitude."""
    if density >= 1:
        return values
    flat = values.reshape(-1)
    kept = np.argsort(-np.abs(flat), kind="stable")[: int(density * flat.size)]
    found = np.zeros_like(flat)
    found[kept] = flat[kept]
    return found.reshape(values.shape)


def dropped_at_random(values: F32, density: float, *, label: str, seed: int) -> F32:
    """Return values of which a share `density` is kept, drawn for this label, and scaled to keep their mean."""
    if density >= 1:
        return values
    own = int.from_bytes(hashlib.sha256(f"{seed} {label}".encode()).digest()[:4], "little")
    return rescaled(values, kept_at_random(values.size, density, own), density)


def rescaled(values: F32, kept: NDArray[np.bool_], density: float) -> F32:
    """Return the kept values over the density, and zeros."""
    found: F32 = values * kept.reshape(values.shape) / np.float32(density)
    return found


def weighted_sum(values: F32, weights: F32, *, by_majority: bool) -> F32:
    """Return the sum of values [n, ...] with weights [n].

    `by_majority`: each place takes the mean of those values whose sign is that of the sum of all.
    """
    weighted = values * weights.reshape(-1, *(1 for _ in values.shape[1:]))
    if not by_majority:
        total: F32 = weighted.sum(0)
        return total
    elected = np.sign(values) == np.where(values.sum(0) >= 0, 1, -1)
    mean: F32 = ((weighted * elected).sum(0) / np.maximum(elected.sum(0), 1)).astype(np.float32)
    return mean


def open_combination(combination: Combination, open_one: Callable[[Path], Adapter]) -> Adapter:
    """Open several adapters as one. Raises AdapterError for a kind that changes no weights."""
    parts = [open_one(path) for path in combination.adapters]
    for part in parts:
        if type(part) is not Adapter:
            raise AdapterError(
                f"{part.path} is a {part.config.peft_type} adapter, which cannot be combined with others",
                "Export it alone",
            )
    return CombinedAdapter(combination, parts)
