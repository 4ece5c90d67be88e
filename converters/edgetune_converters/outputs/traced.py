"""A graph that another exporter traced, as a directory for ONNX Runtime: for families that edgetune has no graph for.

The exporter reads the merged model from a temporary safetensors directory. Its graph has the weights as inputs, so that
no protobuf ever holds them. Here each weight gets its storage type and its place in the file of weights, and the graph
the names and metadata of edgetune's own graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray
from onnx import helper

from edgetune_converters.files.companions import CompanionFiles, copy_tokenizer, tokenizer_notes, write_json
from edgetune_converters.files.contents import sha256_of
from edgetune_converters.gguf import keys
from edgetune_converters.merging.stream import RowBlock
from edgetune_converters.model import Model
from edgetune_converters.onnx.genai import genai_config, set_tokenizer_class, tokenizer_remarks
from edgetune_converters.onnx.model import DATA_FILE
from edgetune_converters.onnx.traced_model import TracedModel, TracedSettings, WeightSummary, write_weights
from edgetune_converters.outputs.base import OutputSummary, StreamedOutput, StreamTensor
from edgetune_converters.outputs.onnx import CONFIG_FILE, GRAPH_FILE, ONNX_MODEL, check_graph, graph_metadata
from edgetune_converters.outputs.safetensors import SafetensorsOutput
from edgetune_converters.outputs.staging import DirectoryOutput
from edgetune_converters.provenance.hashing import InputHashes
from edgetune_converters.provenance.metadata import hyperparameter_keys
from edgetune_converters.tokenizers.special import SpecialTokenIds

CODES = ("int8", "int4")
Compare = Callable[[Path], float]
"""Returns the mean KL divergence (nats) of a written graph from the exporter's own model with the same weights."""


class Tracer(Protocol):
    """An exporter that traces models. edgetune passes transformers with torch.onnx.export."""

    @property
    def name(self) -> str:
        """Name for metadata and receipts."""

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that the graph depends on."""

    def trace(self, merged: Path, family: str, context: int) -> tuple[TracedModel, Callable[[], Compare]]:
        """Trace the merged model in a safetensors directory, for `context` positions.

        Returns:
            The graph, and a function that runs the model with the weights as they are then.

        Raises:
            ArchitectureError: The model cannot be traced.
        """


class TracedOutput(DirectoryOutput, StreamedOutput):
    """The directory of one storage type. The pass writes the merged model for the exporter; `finish` traces it."""

    _summary_of_weights: WeightSummary
    _compare: Compare
    _kld: float

    def __init__(
        self,
        path: Path,
        tracer: Tracer,
        model: Model,
        companions: CompanionFiles,
        provenance: Mapping[str, str],
        ends: SpecialTokenIds,
        settings: TracedSettings,
        extra: Mapping[str, str],
    ) -> None:
        """Plan the directory. `provenance` and `extra` are metadata of the graph.

        Raises:
            TokenizerError: There is no tokenizer to copy.
        """
        super().__init__(path, ONNX_MODEL)
        self._tracer = tracer
        self._model = model
        self._companions = companions
        self._provenance = {**provenance, keys.EXPORTER: tracer.name}
        self._ends = ends
        self._settings = settings
        self._extra = extra
        merged = path.with_name(path.name + ".merged")
        self._merged = SafetensorsOutput(merged, "f32", model.in_base_order, companions, None)

    @property
    def tensors(self) -> Sequence[StreamTensor]:
        return self._merged.tensors

    @property
    def size(self) -> int:
        return self._merged.size

    def _open_files(self) -> None:
        self._merged.__enter__()

    def _close_files(self) -> None:
        self._merged.__exit__(None, None, None)

    def convert(self, index: int, block: RowBlock, threads: int) -> NDArray[Any]:
        return self._merged.convert(index, block, threads)

    def append(self, rows: NDArray[Any]) -> None:
        self._merged.append(rows)

    def finish(self, inputs: InputHashes) -> None:
        self._merged.finish(inputs)
        self._merged.verify()
        traced, run_model = self._tracer.trace(self._merged.partial, self._model.family.name, self._context)
        self._summary_of_weights = self._write(traced, inputs)
        self._compare = run_model()  # with the weights as they were stored
        del traced, run_model  # and with them the model: the comparison loads the weights again
        self._close_files()

    def verify(self) -> None:
        graph = self._staged.partial / GRAPH_FILE
        check_graph(graph, infer_shapes=False)
        self._kld = self._compare(graph)

    @property
    def _context(self) -> int:
        found = hyperparameter_keys(self._model)[f"{self._model.family.gguf}.context_length"].data
        assert isinstance(found, int)
        return found

    def _write(self, traced: TracedModel, inputs: InputHashes) -> WeightSummary:
        folder = self._staged.partial
        weights = write_weights(folder / DATA_FILE, traced, self._settings)
        self._staged.hashes[DATA_FILE] = sha256_of(folder / DATA_FILE)
        metadata = graph_metadata(
            {**self._provenance, keys.BASE_HASH: inputs.base_hash},
            {
                keys.RECIPE: self._settings.type,
                keys.CACHE: "grows",
                keys.DATA_SIZE: str((folder / DATA_FILE).stat().st_size),
                keys.DATA_HASH: self._staged.hashes[DATA_FILE],
            },
            {"bits_per_weight": weights.bits_per_weight, "types": weights.types},
            self._extra,
        )
        helper.set_model_props(traced.graph, metadata)
        (folder / GRAPH_FILE).write_bytes(traced.graph.SerializeToString())
        copy_tokenizer(self._companions, folder)
        set_tokenizer_class(folder)
        write_json(folder / CONFIG_FILE, genai_config(traced.sizes, self._ends))
        return weights

    def _summary(self) -> OutputSummary:
        weights = self._summary_of_weights
        return OutputSummary(
            artifact=self.path,
            sha256=self._staged.sha256,
            size=sum((self.path / name).stat().st_size for name in (GRAPH_FILE, DATA_FILE)),
            format="onnx",
            recipe=self._settings.type,
            types=weights.types,
            tensors=weights.tensors,
            weights=weights.weights,
            bits_per_weight=weights.bits_per_weight,
            fallback_share=round(weights.fallback_share, 4),
            files=self._staged.hashes,
            notes=(
                *self._ends.notes,
                *tokenizer_notes(self._companions.tokenizer, self._companions.config),
                *tokenizer_remarks(self._companions.tokenizer, self._companions.chat_template or ""),
            ),
            exporter=self._tracer.name,
            exporter_kld=self._kld,
            versions=self._tracer.versions(),
        )
