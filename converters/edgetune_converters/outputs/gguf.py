"""A model as one GGUF file, or as several that llama.cpp loads through the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.gguf import keys
from edgetune_converters.gguf.layout import TensorSpec
from edgetune_converters.gguf.split import SplitWriter
from edgetune_converters.gguf.values import Value, string, strings, u32
from edgetune_converters.merging.stream import RowBlock
from edgetune_converters.outputs.base import StreamTensor, Summary
from edgetune_converters.outputs.gguf_files import StagedGguf
from edgetune_converters.quantization import recipes
from edgetune_converters.quantization.delta_survival import DeltaSurvival
from edgetune_converters.quantization.encode import encode_rows
from edgetune_converters.quantization.imatrix import ImportanceMatrix, check_needed
from edgetune_converters.quantization.recipes import StoragePlan

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


class GgufOutput(StagedGguf):
    """The file or files of one plan. `metadata` are the keys that do not depend on the plan."""

    def __init__(
        self,
        plan: StoragePlan,
        tensors: Sequence[StreamTensor],
        path: Path,
        metadata: Mapping[str, Value],
        *,
        overrides: tuple[str, ...] = (),
        importance: ImportanceMatrix | None = None,
        measure_survival: bool = False,
        split_max_size: int | None = None,
    ) -> None:
        self._plan = plan
        self._tensors = tensors
        self._overrides = overrides
        self._importance = importance
        self._notes = _check_importance(plan, importance)
        specs = [TensorSpec(row.name, row.shape, recipes.storage_of(row)) for row in plan.rows]
        complete = _complete(metadata, plan, overrides) | (importance.metadata if importance else {})
        super().__init__(SplitWriter(path, complete, specs, split_max_size, settled=False))
        self._survival = DeltaSurvival() if measure_survival else None

    @property
    def tensors(self) -> Sequence[StreamTensor]:
        """Those of the model, in the order of the plan."""
        return self._tensors

    def convert(self, index: int, block: RowBlock, threads: int) -> NDArray[Any]:
        """A block of tensor `index` of the plan, quantized."""
        row = self._plan.rows[index]

        def stored(rows: NDArray[Any]) -> NDArray[Any]:
            return self._store(index, block.first, rows, threads)

        written = stored(block.rows)
        if self._survival is not None and block.delta is not None:
            self._survival.add(row.name, row.type, block, written, stored)
        return written

    def _store(self, index: int, first: int, rows: NDArray[Any], threads: int) -> NDArray[Any]:
        row = self._plan.rows[index]
        if self._importance is None or len(row.shape) < 2:
            return encode_rows(rows, row.type, row.name, threads)
        pieces = self._importance.pieces(row.name, row.shape, first, rows)
        stored = [encode_rows(piece, row.type, row.name, threads, weights) for piece, weights in pieces]
        return stored[0] if len(stored) == 1 else np.concatenate(stored)

    def publish(self) -> Summary:
        """Rename, the first file last."""
        files = self._writer.publish()
        plan = self._plan
        return Summary(
            artifact=self.path,
            sha256=files[self.path.name],
            size=self.size,
            format="gguf",
            recipe=plan.recipe.name,
            types=plan.bytes_by_type,
            tensors={row.name: row.type for row in plan.rows},
            weights=plan.weights,
            bits_per_weight=round(plan.bits_per_weight, 4),
            fallback_share=round(plan.fallback_share, 4),
            survival=self._survival.ratios() if self._survival else None,
            files=files if len(files) > 1 else {},
            overrides=self._overrides,
            notes=tuple(self._notes),
            imatrix=None if self._importance is None else self._importance.receipt_entry,
        )


def _check_importance(plan: StoragePlan, importance: ImportanceMatrix | None) -> list[str]:
    """What is to be said of the importance matrix. Errors: RecipeError when it does not fit, or is needed."""
    if importance is None:
        check_needed((row.name, row.type) for row in plan.rows)
        return []
    return importance.check((row.name, row.shape, row.type) for row in plan.rows)


def _complete(metadata: Mapping[str, Value], plan: StoragePlan, overrides: tuple[str, ...]) -> dict[str, Value]:
    """The metadata of one file: general keys first, as readers expect the architecture early."""
    own = {
        "general.file_type": u32(plan.recipe.file_type),
        "general.quantization_version": u32(_QUANTIZATION_VERSION),
        keys.RECIPE: string(plan.recipe.name),
    }
    return {**metadata, **own, **({keys.OVERRIDES: strings(overrides)} if overrides else {})}
