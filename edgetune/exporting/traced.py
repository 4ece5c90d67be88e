"""ONNX of families without a description: merged by our own stream, traced by torch, compared, and given their names.

Everything happens in a directory beside the target, NAME.partial, which goes in every case.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune import console
from edgetune.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from edgetune.commands.merge_export import Source
    from edgetune.config import ExportConfig
    from edgetune.exporting.targets import Outputs
    from edgetune_converters.exporting import Published
    from edgetune_converters.model import Model
    from edgetune_converters.outputs import traced
    from edgetune_converters.outputs.traced import WeightSummary
    from edgetune_converters.provenance.receipts import Receipt

EXPORTER = "transformers/torch.onnx"
_NEEDED = ("torch", "transformers")

Merge = Callable[[Path], "Receipt"]
"""Write the merged model as a safetensors directory in f32."""
Publish = Callable[["Published"], "list[Receipt]"]
"""Give all folders their names; each receipt goes to the argument at once."""


def family_to_trace(source: Source, outputs: Outputs) -> str | None:
    """The family's name if ONNX is asked for and the table does not describe its decoder."""
    if not outputs.onnx:
        return None
    from edgetune_converters.architectures import ModelConfig, family_of
    from edgetune_converters.reading.gguf_base import open_base

    family = family_of(ModelConfig(open_base(source.base).config))
    return None if family.onnx else family.name


def check(family: str, outputs: Outputs, config: ExportConfig) -> None:
    """Errors: ConfigError for what a traced graph cannot have; EnvironmentProblem without torch."""
    from edgetune_converters.outputs.onnx import check_replaceable
    from edgetune_converters.outputs.traced import CODES

    coded = [kind for kind in outputs.onnx if kind in CODES]
    for path in outputs.onnx.values():
        check_replaceable(path)
    if (config.block_size or config.symmetric) and not coded:
        raise ConfigError(
            f"{family} is written as ONNX in {' and '.join(outputs.onnx)}, which have no blocks",
            "Leave out --block-size and --symmetric, or add -q int4.",
        )
    if config.portable and coded:
        raise ConfigError(
            f"{family} is written as ONNX by {EXPORTER}, and {coded[0]} of it with ONNX Runtime's operators",
            "Leave out --portable, or take -q f32 or -q f16, whose operators are the standard's.",
        )
    if config.tune:
        raise ConfigError(
            f"--tune chooses for graphs of edgetune's own, and that of {family} is drawn by {EXPORTER}",
            "Leave out --tune; --block-size sets the blocks of all matrices.",
        )
    if config.imatrix and coded:
        console.warn(f"--imatrix is not used for {coded[0]} in ONNX, as {EXPORTER} draws the graph of {family}")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"{family} is written as ONNX by {EXPORTER}, and {' and '.join(missing)} cannot be found",
            "pip install 'edgetune[train]', or write GGUF, which needs no torch: --format gguf",
        )


@contextmanager
def prepared(
    family: str, source: Source, onnx: Mapping[str, Path], config: ExportConfig, merge: Merge
) -> Iterator[Publish]:
    """All folders, finished under other names; what is yielded gives them theirs. Leaving removes the rest."""
    from edgetune_converters.exporting import write_errors
    from edgetune_converters.files import atomic

    console.note(
        f"{family} has no graph of edgetune's own: transformers and torch.onnx.export draw it, which needs torch and "
        "memory for the whole model in f32, twice"
    )
    with ExitStack() as stack:
        stack.enter_context(write_errors())
        made: list[tuple[Path, Path, Receipt]] = []
        for kind, path in onnx.items():
            place = stack.enter_context(_beside(path))
            made.append((place / "model", path, _made(family, source, kind, config, place, merge)))

        def publish(published: Published) -> list[Receipt]:
            from edgetune_converters.files.interrupts import deferred_sigint
            from edgetune_converters.provenance.receipts import receipt_path

            receipts = [replace(receipt, artifact=str(path)) for _, path, receipt in made]
            with deferred_sigint():
                for (folder, path, _), receipt in zip(made, receipts, strict=True):
                    receipt_path(path).unlink(missing_ok=True)
                    atomic.replace_directory(folder, path)
                    published(receipt)
            return receipts

        yield publish


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A directory beside the target that goes in every case; that of a pass that was killed goes first."""
    folder = path.with_name(path.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _made(family: str, source: Source, kind: str, config: ExportConfig, place: Path, merge: Merge) -> Receipt:
    """Merge, trace, write and compare, in `place`."""
    from edgetune.training import onnx_trace
    from edgetune_converters.files.companions import CompanionFiles
    from edgetune_converters.outputs import traced
    from edgetune_converters.outputs.onnx import GRAPH_FILE
    from edgetune_converters.tokenizers.special import special_token_ids

    model = _opened(source)
    stated = model.config
    ends = special_token_ids(source.tokenizer, stated.raw, None, stated.vocab_size)
    documents = CompanionFiles(source.base, stated.raw, source.tokenizer, None, model.tied)
    folder, merged = place / "model", place / "merged"
    receipt = merge(merged)
    drawn, ask = onnx_trace.trace_model(merged, family, _context(model))
    folder.mkdir()
    stored = traced.write(folder, drawn, _wanted(kind, config, model), documents, ends, _stated(model, source, receipt))
    probe = ask()  # what transformers says with the weights as they were stored
    del drawn, ask  # and with them the model: the next step loads the weights again
    shutil.rmtree(merged)
    divergence = onnx_trace.check_graph(folder / GRAPH_FILE, probe, family)
    console.note(
        f"{family}, {kind}: mean KLD {divergence:.1e} between the graph and transformers with the same weights"
    )
    return replace(_receipt(receipt, folder, stored), recipe=kind, exporter_kld=divergence)


def _wanted(kind: str, config: ExportConfig, model: Model) -> traced.TracedSettings:
    from edgetune.exporting.onnx import settings_of
    from edgetune_converters.onnx import traced_weights
    from edgetune_converters.outputs import traced

    return traced.TracedSettings(
        kind, settings_of(config), traced_weights.slots_by_name(model.bound), config.allow_fallback
    )


def _receipt(merged: Receipt, folder: Path, stored: WeightSummary) -> Receipt:
    """That of the merged model, with what the folder holds in its place."""
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


def _stated(model: Model, source: Source, merged: Receipt) -> dict[str, str]:
    """The metadata of the graph."""
    from edgetune_converters.gguf import keys
    from edgetune_converters.provenance.metadata import provenance_keys
    from edgetune_converters.provenance.receipts import combined_hash

    own = {keys.MERGE_BASE: merged.merge_base, keys.EXPORTER: EXPORTER}
    return {**source.carried, **provenance_keys(model, combined_hash(merged.base), merged.adapter), **own}


def _context(model: Model) -> int:
    """Positions, as the family's table has them for GGUF."""
    from edgetune_converters.provenance.metadata import hyperparameter_keys

    found = hyperparameter_keys(model)[f"{model.family.gguf}.context_length"].data
    assert isinstance(found, int)
    return found


def _opened(source: Source) -> Model:
    """Headers only."""
    from edgetune_converters.merging.merge_base import merge_base_named
    from edgetune_converters.model import open_model
    from edgetune_converters.names import ORIGINAL

    return open_model(source.base, source.adapter, merge_base_named(ORIGINAL))
