"""A merged model as a directory for ONNX Runtime: a small graph, its weights, tokenizer and genai_config.json.

The weights are written while the pass runs, the graph last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import onnx

from edgetune_converters.errors import ArtifactError
from edgetune_converters.files.companions import (
    CompanionFiles,
    check_tokenizer,
    copy_tokenizer,
    tokenizer_notes,
    write_json,
)
from edgetune_converters.gguf import keys
from edgetune_converters.merging.stream import MergedTensor, RowBlock
from edgetune_converters.onnx.genai import DecoderSizes, genai_config, set_tokenizer_class, tokenizer_remarks
from edgetune_converters.onnx.model import DATA_FILE, DecoderGraph
from edgetune_converters.onnx.weight_file import EncodedBlock, WeightEncoder, WeightFile
from edgetune_converters.outputs.base import OutputSummary, StreamedOutput, StreamTensor
from edgetune_converters.outputs.staging import DirectoryKind, DirectoryOutput
from edgetune_converters.provenance.hashing import InputHashes
from edgetune_converters.provenance.receipts import tool_versions
from edgetune_converters.quantization.imatrix import ImportanceMatrix
from edgetune_converters.tokenizers.special import SpecialTokenIds

GRAPH_FILE = "model.onnx"
CONFIG_FILE = "genai_config.json"


def _is_exported(path: Path) -> bool:
    try:
        graph = onnx.load(path / GRAPH_FILE, load_external_data=False)
    except Exception:  # noqa: BLE001 - protobuf has many ways to reject a file
        return False
    return any(entry.key == keys.VERSION for entry in graph.metadata_props)


ONNX_MODEL = DirectoryKind("an ONNX model", _is_exported)


class OnnxOutput(DirectoryOutput, StreamedOutput):
    """The directory of one storage type."""

    _weights: WeightFile

    def __init__(
        self,
        path: Path,
        graph: DecoderGraph,
        tensors: Sequence[MergedTensor],
        companions: CompanionFiles,
        provenance: Mapping[str, str],
        ends: SpecialTokenIds,
        importance: ImportanceMatrix | None = None,
        extra: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Plan the directory. `provenance` and `extra` are metadata of the graph.

        Raises:
            TokenizerError: There is no tokenizer to copy.
            RecipeError: The importance matrix does not fit.
        """
        super().__init__(path, ONNX_MODEL)
        check_tokenizer(companions.tokenizer)
        self._graph = graph
        self._proto = graph.proto(tool_versions()["edgetune"])
        self._companions = companions
        self._provenance = provenance
        self._extra = extra
        self._ends = ends
        self._importance = importance
        self._encoder = WeightEncoder(graph, tensors, importance)
        self._notes = [*companions.notes, *ends.notes, *tokenizer_notes(companions.tokenizer, companions.config)]
        self._notes += tokenizer_remarks(companions.tokenizer, companions.chat_template or "")
        self._notes += [] if importance is None else importance.check(self._encoder.quantized())

    @property
    def tensors(self) -> Sequence[StreamTensor]:
        return self._encoder.tensors

    @property
    def size(self) -> int:
        graph_bytes: int = self._proto.ByteSize()
        return self._graph.size + graph_bytes

    def _open_files(self) -> None:
        self._weights = WeightFile(self._staged.partial / DATA_FILE, self._graph, self._encoder.uses)

    def _close_files(self) -> None:
        self._weights.close()

    def convert(self, index: int, block: RowBlock, threads: int) -> EncodedBlock:
        return self._encoder.encode(index, block, threads)

    def append(self, rows: EncodedBlock) -> None:
        self._weights.append(rows)

    def finish(self, inputs: InputHashes) -> None:
        folder = self._staged.partial
        self._staged.hashes[DATA_FILE] = self._weights.finish()
        onnx.helper.set_model_props(self._proto, self._metadata(inputs))
        (folder / GRAPH_FILE).write_bytes(self._proto.SerializeToString())
        copy_tokenizer(self._companions, folder)
        set_tokenizer_class(folder)
        write_json(folder / CONFIG_FILE, genai_config(DecoderSizes.of(self._graph), self._ends))

    def verify(self) -> None:
        check_graph(self._staged.partial / GRAPH_FILE, infer_shapes=self._graph.settings.portable)

    def _metadata(self, inputs: InputHashes) -> dict[str, str]:
        plan = self._graph.plan
        return graph_metadata(
            {**self._provenance, keys.BASE_HASH: inputs.base_hash},
            {
                keys.RECIPE: plan.recipe.name,
                keys.CACHE: "in place" if self._graph.in_place else "grows",
                keys.DATA_SIZE: str(self._graph.size),
                keys.DATA_HASH: self._staged.hashes[DATA_FILE],
            },
            {"bits_per_weight": round(plan.bits_per_weight, 4), "types": plan.bytes_by_type},
            self._extra,
        )

    def _summary(self) -> OutputSummary:
        plan, search = self._graph.plan, self._graph.settings.type_search
        return OutputSummary(
            artifact=self.path,
            sha256=self._staged.sha256,
            size=self.size,
            format="onnx",
            recipe=plan.recipe.name,
            types=plan.bytes_by_type,
            tensors={row.name: row.type for row in plan.rows},
            weights=plan.weights,
            bits_per_weight=round(plan.bits_per_weight, 4),
            fallback_share=round(plan.fallback_share, 4),
            files=self._staged.hashes,
            notes=tuple(self._notes),
            type_search=None if search is None else dict(search),
            imatrix=None if self._importance is None else self._importance.receipt_entry,
        )


def graph_metadata(
    provenance: Mapping[str, str],
    contents: Mapping[str, str],
    figures: Mapping[str, object],
    extra: Mapping[str, str],
) -> dict[str, str]:
    """Return the metadata of a graph; the receipt in it repeats them with `figures`, for a folder that lost its own."""
    receipt = {**provenance, **contents, **figures}
    return {**extra, **provenance, **contents, keys.RECEIPT: json.dumps(receipt, ensure_ascii=False)}


def check_replaceable(path: Path) -> None:
    """Check that an export may write to `path`. Raises EdgetuneError."""
    ONNX_MODEL.check_replaceable(path)


def check_graph(path: Path, *, infer_shapes: bool) -> None:
    """Run onnx's checker; `infer_shapes` works only where all operators are the standard's.

    Raises:
        ArtifactError: The graph is not valid.
    """
    try:
        onnx.checker.check_model(str(path), full_check=infer_shapes)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"{path} is not a valid ONNX model: {error}") from error
