"""ONNX of families without a description: merge, let transformers draw the graph, compare, and rename into place.

Everything is made in a temporary directory beside the target. This needs torch.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune import console
from edgetune.errors import ConfigError, EnvironmentProblem
from edgetune.exporting.scratch import temporary_sibling

if TYPE_CHECKING:
    from edgetune.config import ExportConfig
    from edgetune_converters.model import Model
    from edgetune_converters.outputs.traced import TracedSettings, WeightSummary
    from edgetune_converters.provenance.receipts import Receipt
    from edgetune_converters.request import ExportRequest, Target

EXPORTER = "transformers/torch.onnx"
_NEEDED = ("torch", "transformers")


def check_if_traced(request: ExportRequest, config: ExportConfig) -> str | None:
    """Return the name of the family if its ONNX graph has to be traced, and check that the options allow it.

    Raises:
        ConfigError: An option does not apply to a traced graph.
        EnvironmentProblem: torch or transformers is missing.
    """
    if not request.paths("onnx"):
        return None
    from edgetune_converters.architectures import ModelConfig, family_of
    from edgetune_converters.reading.gguf_base import open_base

    family = family_of(ModelConfig(open_base(request.base).config))
    if family.onnx:
        return None
    _check(family.name, request, config)
    return family.name


def _check(family: str, request: ExportRequest, config: ExportConfig) -> None:
    from edgetune_converters.outputs.onnx import check_replaceable
    from edgetune_converters.outputs.traced import CODES

    paths = request.paths("onnx")
    quantized = [type_ for type_ in paths if type_ in CODES]
    for path in paths.values():
        check_replaceable(path)
    if (config.block_size or config.symmetric) and not quantized:
        raise ConfigError(
            f"{family} is written as ONNX in {' and '.join(paths)}, which have no blocks",
            "Leave out --block-size and --symmetric, or add -q int4",
        )
    if config.portable and quantized:
        raise ConfigError(
            f"{family} is written as ONNX by {EXPORTER}, and {quantized[0]} of it with ONNX Runtime's operators",
            "Leave out --portable, or take -q f32 or -q f16, whose operators are the standard's",
        )
    if config.search_types:
        raise ConfigError(
            f"--search-types chooses for graphs of edgetune's own, and that of {family} is drawn by {EXPORTER}",
            "Leave out --search-types; --block-size sets the blocks of all matrices",
        )
    if config.imatrix and quantized:
        console.warn(f"--imatrix is not used for {quantized[0]} in ONNX, as {EXPORTER} draws the graph of {family}")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"{family} is written as ONNX by {EXPORTER}, and {' and '.join(missing)} cannot be found",
            "pip install 'edgetune[train]', or write GGUF, which needs no torch: --format gguf",
        )


@dataclass(frozen=True)
class _Finished:
    """A finished directory that is not yet in its place."""

    folder: Path
    receipt: Receipt


@contextmanager
def prepared(family: str, request: ExportRequest) -> Iterator[Callable[[], list[Receipt]]]:
    """Make the directories of all ONNX targets under temporary names. The yielded function renames them into place.

    What was not renamed is removed at the end.
    """
    from edgetune_converters.exporting import write_errors

    console.note(
        f"{family} has no graph of edgetune's own: transformers and torch.onnx.export draw it, which needs torch and "
        "memory for the whole model in f32, twice"
    )
    with ExitStack() as stack:
        stack.enter_context(write_errors())
        finished = []
        for target in (each for each in request.targets if each.format == "onnx"):
            scratch = stack.enter_context(temporary_sibling(target.path))
            finished.append(_Finished(scratch / "model", _make(family, request, target, scratch)))
        yield lambda: _publish(finished, write_receipts=request.write_receipts)


def _publish(finished: list[_Finished], *, write_receipts: bool) -> list[Receipt]:
    from edgetune_converters.files import atomic
    from edgetune_converters.files.interrupts import deferred_sigint
    from edgetune_converters.provenance.receipts import receipt_path

    with deferred_sigint():
        for folder, receipt in ((each.folder, each.receipt) for each in finished):
            path = Path(receipt.artifact)
            receipt_path(path).unlink(missing_ok=True)
            atomic.replace_directory(folder, path)
            if write_receipts:
                receipt.write()
    return [each.receipt for each in finished]


def _make(family: str, request: ExportRequest, target: Target, scratch: Path) -> Receipt:
    """Merge, trace, write and compare, in the directory `scratch`."""
    from edgetune.training import onnx_trace
    from edgetune_converters.exporting import export
    from edgetune_converters.files.companions import CompanionFiles
    from edgetune_converters.outputs import traced
    from edgetune_converters.outputs.onnx import GRAPH_FILE
    from edgetune_converters.request import Target
    from edgetune_converters.tokenizers.special import special_token_ids

    model = _open(request)
    raw, tokenizer = model.config.raw, request.tokenizer or request.base
    ends = special_token_ids(tokenizer, raw, None, model.config.vocab_size)
    documents = CompanionFiles(request.base, raw, tokenizer, None, model.tied)
    folder, merged = scratch / "model", scratch / "merged"
    with console.byte_progress("export") as progress:
        (merge_receipt,) = export(request.for_trial(Target("safetensors", "f32", merged)), progress=progress)
    graph, ask = onnx_trace.trace_model(merged, family, _context(model))
    folder.mkdir()
    stated = _metadata(model, request, merge_receipt)
    stored = traced.write(folder, graph, _settings(target.type, request, model), documents, ends, stated)
    probe = ask()  # the answer of transformers with the weights as they were stored
    del graph, ask  # and with them the model: the next step loads the weights again
    shutil.rmtree(merged)
    divergence = onnx_trace.check_graph(folder / GRAPH_FILE, probe, family)
    console.note(
        f"{family}, {target.type}: mean KLD {divergence:.1e} between the graph and transformers with the same weights"
    )
    receipt = _receipt(merge_receipt, folder, stored)
    return replace(receipt, artifact=str(target.path), recipe=target.type, exporter_kld=divergence)


def _settings(type_: str, request: ExportRequest, model: Model) -> TracedSettings:
    from edgetune_converters.onnx import traced_weights
    from edgetune_converters.onnx.plan import DEFAULT_SETTINGS
    from edgetune_converters.outputs.traced import TracedSettings

    settings = request.onnx_settings or DEFAULT_SETTINGS
    return TracedSettings(type_, settings, traced_weights.slots_by_name(model.bound), request.allow_fallback)


def _receipt(merged: Receipt, folder: Path, stored: WeightSummary) -> Receipt:
    """Return the receipt of the merged model, with the figures of the ONNX directory in their place."""
    from edgetune.training import onnx_trace
    from edgetune_converters.files.contents import sha256_of
    from edgetune_converters.provenance.receipts import combined_hash

    hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    return replace(
        merged,
        sha256=combined_hash(hashes),
        size=sum(path.stat().st_size for path in folder.glob("model.onnx*")),
        format="onnx",
        types=stored.types,
        tensors=stored.tensors,
        weights=stored.weights,
        bits_per_weight=stored.bits_per_weight,
        fallback_share=round(stored.fallback_share, 4),
        files=hashes,
        exporter=EXPORTER,
        versions={**merged.versions, **onnx_trace.package_versions()},
    )


def _metadata(model: Model, request: ExportRequest, merged: Receipt) -> dict[str, str]:
    """Return the metadata of the graph."""
    from edgetune_converters.gguf import keys
    from edgetune_converters.provenance.metadata import provenance_keys
    from edgetune_converters.provenance.receipts import combined_hash

    own = {keys.MERGE_BASE: merged.merge_base, keys.EXPORTER: EXPORTER}
    return {
        **{key: str(value) for key, value in request.metadata.items()},
        **provenance_keys(model, combined_hash(merged.base), merged.adapter),
        **own,
    }


def _context(model: Model) -> int:
    """Return the context length, as it stands in the metadata of GGUF."""
    from edgetune_converters.provenance.metadata import hyperparameter_keys

    found = hyperparameter_keys(model)[f"{model.family.gguf}.context_length"].data
    assert isinstance(found, int)
    return found


def _open(request: ExportRequest) -> Model:
    from edgetune_converters.merging.merge_base import merge_base_named
    from edgetune_converters.model import open_model
    from edgetune_converters.names import ORIGINAL

    return open_model(request.base, request.adapter, merge_base_named(ORIGINAL))
