"""Which tensors of a GGUF file lose most by quantization: export it again with some of them in 16 bits, and measure.

First every kind of tensor (`ffn_down` of all layers, `attn_v`, the output ...), then the layers of the costliest kind,
from both ends inwards: quantization usually hurts the first and the last layers most. When the time is over, the
tensors measured so far are reported.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetune.console import Progress
from edgetune.errors import RunDirectoryError
from edgetune.reference.store import Reference
from edgetune.sensitivity.divergence import token_klds, trial_rows
from edgetune.validation.results import TensorCost, TensorCosts
from edgetune_converters.exporting import export
from edgetune_converters.gguf import keys, reader
from edgetune_converters.names import MERGE_BASES, ORIGINAL
from edgetune_converters.quantization.overrides import Overrides, overrides_of
from edgetune_converters.request import ExportRequest, Target

UNQUANTIZED = "f16"
"""The storage type in which tensors are restored."""
_NOT_QUANTIZED = ("f32", "f16", "bf16")
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are restored together: those of a kind, or one of them."""

    name: str
    """The name of the tensor; `*` stands for every layer."""
    types: str
    weights: int
    layer: int | None = None

    @property
    def pattern(self) -> str:
        """Return the regular expression for `--tensor-type`."""
        return "^" + re.escape(self.name).replace(r"\*", r"\d+") + "$"


def locate(request: ExportRequest, reference: Reference, file: Path, seconds: float, progress: Progress) -> TensorCosts:
    """Measure what the quantization of each kind of tensor costs, then of each layer of the costliest kind.

    Args:
        request: How the run is exported. Recipe, merge base and overrides are taken from the file.
        reference: The outputs of the trained model.
        file: A quantized GGUF file of the run.
        seconds: Time limit; a measurement that has begun is completed.
        progress: Counts measurements.

    Raises:
        RunDirectoryError: The file does not state how it was made, so it cannot be exported again.
    """
    variants = _Variants.of(request, file)
    rows = trial_rows(reference)
    kinds, layers = tensor_groups(file)
    end = time.monotonic() + seconds
    kld = float(token_klds(reference, rows, file).mean())
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", suffix=".partial", dir=file.parent) as folder:
        path = Path(folder) / "variant.gguf"

        def measure(group: TensorGroup) -> TensorCost:
            try:
                export(variants.request(group, path))
                without = float(token_klds(reference, rows, path).mean())
            finally:
                path.unlink(missing_ok=True)
            return TensorCost(
                tensor=group.name, type=group.types, weights=group.weights, kld_without=without, gain=kld - without
            )

        def measure_all(groups: Sequence[TensorGroup], done: int, total: int) -> list[TensorCost]:
            costs = []
            for count, group in enumerate(groups, done + 1):
                if time.monotonic() >= end:
                    break
                costs.append(measure(group))
                progress(count, total)
            return sorted(costs, key=lambda cost: -cost.gain)

        most_layers = max((len(each) for each in layers.values()), default=0)
        kind_costs = measure_all(kinds, 0, len(kinds) + most_layers)
        inner = layers.get(kind_costs[0].tensor, []) if kind_costs else []
        layer_costs = measure_all(inner, len(kinds), len(kinds) + len(inner))
    complete = len(kind_costs) == len(kinds) and len(layer_costs) == len(inner)
    return TensorCosts(kld=kld, kinds=kind_costs, layers=layer_costs, complete=complete)


def tensor_groups(file: Path) -> tuple[list[TensorGroup], dict[str, list[TensorGroup]]]:
    """Return the kinds of quantized tensors, the largest first, and the layers of each, from both ends inwards."""
    alone: list[TensorGroup] = []
    layers: dict[str, list[TensorGroup]] = {}
    for entry in reader.read(file).tensors:
        type_, weights = entry.type.lower(), math.prod(entry.shape)
        if type_ in _NOT_QUANTIZED:
            continue
        match = _LAYER.fullmatch(entry.name)
        if match is None:
            alone.append(TensorGroup(entry.name, type_, weights))
        else:
            layers.setdefault(f"blk.*.{match[2]}", []).append(TensorGroup(entry.name, type_, weights, int(match[1])))
    kinds = [
        TensorGroup(name, "/".join(sorted({each.types for each in found})), sum(each.weights for each in found))
        for name, found in layers.items()
    ]
    ordered = sorted([*alone, *kinds], key=lambda group: -group.weights)
    return ordered, {name: _from_both_ends(found) for name, found in layers.items() if len(found) > 1}


def _from_both_ends(layers: Sequence[TensorGroup]) -> list[TensorGroup]:
    inwards = sorted(layers, key=lambda group: group.layer or 0)
    return [inwards.pop(0 if turn % 2 == 0 else -1) for turn in range(len(inwards))]


@dataclass(frozen=True)
class _Variants:
    """Exports of a file again, each with one group of tensors in 16 bits."""

    base_request: ExportRequest
    """With the merge base and the importance matrix of the file."""
    recipe: str
    overrides: Mapping[str, Sequence[str]]
    """The types set by hand when the file was exported: option -> values."""

    @classmethod
    def of(cls, request: ExportRequest, file: Path) -> _Variants:
        """Read from the file how it was made. Raises RunDirectoryError if it does not state that."""
        metadata = reader.read(file).metadata
        recipe, merge_base = metadata.get(keys.RECIPE), metadata.get(keys.MERGE_BASE, ORIGINAL)
        if not isinstance(recipe, str) or merge_base not in MERGE_BASES:
            raise RunDirectoryError(
                f"{file} does not state how it was made, so it cannot be exported again with other types",
                "Give --locate a GGUF file that edgetune exported",
            )
        has_imatrix = any(key.startswith("quantize.imatrix") for key in metadata)
        if has_imatrix and not request.imatrix:
            raise RunDirectoryError(
                f"{file} was made with an importance matrix that the run's configuration does not name",
                "Set export.imatrix in the run's configuration, or export without one",
            )
        same = replace(
            request,
            adapter=request.adapter if request.adapter and request.adapter.is_dir() else None,
            merge_base=merge_base,
            imatrix=request.imatrix if has_imatrix else None,
            allow_fallback=True,
        )
        return cls(same, recipe, _overrides_by_option(metadata))

    def request(self, group: TensorGroup, path: Path) -> ExportRequest:
        """Return the request for the file with one group in 16 bits."""
        trial = self.base_request.for_trial(Target("gguf", self.recipe, path))
        return replace(trial, overrides=self._overrides(group))

    def _overrides(self, group: TensorGroup) -> Overrides:
        one = {option: next(iter(self.overrides.get(option, [])), None) for option in (_OUTPUT, _EMBEDDING)}
        named = _BY_NAME.get(group.name)
        if named:
            return overrides_of(self.overrides.get(_TENSOR, ()), **{_KEYWORDS[option]: one[option] for option in one}
                                | {_KEYWORDS[named]: UNQUANTIZED})  # fmt: skip
        first = f"{group.pattern}={UNQUANTIZED}"
        return overrides_of([first, *self.overrides.get(_TENSOR, ())], one[_OUTPUT], one[_EMBEDDING])


_TENSOR, _OUTPUT, _EMBEDDING = "--tensor-type", "--output-tensor-type", "--token-embedding-type"
_KEYWORDS = {_OUTPUT: "output_tensor_type", _EMBEDDING: "token_embedding_type"}
_BY_NAME = {"output.weight": _OUTPUT, "token_embd.weight": _EMBEDDING}  # these options go before a tensor's name


def _overrides_by_option(metadata: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    stated = metadata.get(keys.OVERRIDES)
    for override in stated if isinstance(stated, list) else []:
        option, _, value = str(override).partition(" ")
        found.setdefault(option, []).append(value)
    return found
