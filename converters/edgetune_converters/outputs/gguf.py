"""A merged model as one GGUF file, or as several parts that llama.cpp loads through the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.gguf import keys
from edgetune_converters.gguf.layout import TensorSpec
from edgetune_converters.gguf.split import SplitPlan, SplitWriter
from edgetune_converters.gguf.values import Value, string, strings, u32
from edgetune_converters.merging.stream import RowBlock
from edgetune_converters.outputs.base import Output, OutputSummary, StreamedOutput, StreamTensor
from edgetune_converters.provenance.hashing import InputHashes
from edgetune_converters.quantization import recipes
from edgetune_converters.quantization.delta_survival import DeltaSurvival
from edgetune_converters.quantization.encode import encode_rows
from edgetune_converters.quantization.imatrix import ImportanceMatrix, check_needed
from edgetune_converters.quantization.recipes import StoragePlan

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


class StagedGguf(Output):
    """An output of GGUF files. The hashes in its metadata are placeholders until `finish`."""

    _writer: SplitWriter

    def __init__(self, files: SplitPlan) -> None:
        self._files = files

    @property
    def path(self) -> Path:
        return self._files.path

    @property
    def size(self) -> int:
        return self._files.size

    def __enter__(self) -> Self:
        self._writer = SplitWriter(self._files)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def finish(self, inputs: InputHashes) -> None:
        hashes = {keys.BASE_HASH: inputs.base_hash, keys.DATA_HASH: self._writer.data_hash()}
        self._writer.complete_header({key: string(value) for key, value in hashes.items()})

    def verify(self) -> None:
        self._writer.verify()

    def hash_files(self) -> None:
        self._writer.hash_files()


class GgufOutput(StagedGguf, StreamedOutput):
    """The file or parts of one plan."""

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
        """Lay out the file. `metadata` are the keys that do not depend on the plan.

        Raises:
            RecipeError: The importance matrix does not fit, or the plan needs one.
        """
        self._plan = plan
        self._tensors = tensors
        self._overrides = overrides
        self._importance = importance
        self._notes = _check_importance(plan, importance)
        specs = [TensorSpec(row.name, row.shape, recipes.storage_of(row)) for row in plan.rows]
        complete = _complete(metadata, plan, overrides) | (importance.metadata if importance else {})
        super().__init__(SplitPlan.of(path, complete, specs, split_max_size))
        self._survival = DeltaSurvival() if measure_survival else None

    @property
    def tensors(self) -> Sequence[StreamTensor]:
        return self._tensors

    def convert(self, index: int, block: RowBlock, threads: int) -> NDArray[Any]:
        row = self._plan.rows[index]

        def stored(rows: NDArray[Any]) -> NDArray[Any]:
            return self._store(index, block.first, rows, threads)

        written = stored(block.rows)
        if self._survival is not None and block.delta is not None:
            self._survival.add(row.name, row.type, block, written, stored)
        return written

    def append(self, rows: NDArray[Any]) -> None:
        self._writer.append(rows)

    def _store(self, index: int, first: int, rows: NDArray[Any], threads: int) -> NDArray[Any]:
        row = self._plan.rows[index]
        if self._importance is None or len(row.shape) < 2:
            return encode_rows(rows, row.type, row.name, threads)
        pieces = self._importance.pieces(row.name, row.shape, first, rows)
        stored = [encode_rows(piece, row.type, row.name, threads, weights) for piece, weights in pieces]
        return stored[0] if len(stored) == 1 else np.concatenate(stored)

    def publish(self) -> OutputSummary:
        files = self._writer.publish()
        plan = self._plan
        return OutputSummary(
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
    """Return the notes about the importance matrix."""
    if importance is None:
        check_needed((row.name, row.type) for row in plan.rows)
        return []
    return importance.check((row.name, row.shape, row.type) for row in plan.rows)


def _complete(metadata: Mapping[str, Value], plan: StoragePlan, overrides: tuple[str, ...]) -> dict[str, Value]:
    """Return the metadata of the file; the general keys come first, as readers expect the architecture early."""
    own = {
        "general.file_type": u32(plan.recipe.file_type),
        "general.quantization_version": u32(_QUANTIZATION_VERSION),
        keys.RECIPE: string(plan.recipe.name),
    }
    return {**metadata, **own, **({keys.OVERRIDES: strings(overrides)} if overrides else {})}
