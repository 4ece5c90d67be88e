"""ONNX of families that edgetune has no graph for: transformers and torch.onnx.export trace the merged model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune import console
from edgetune.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from edgetune.config import ExportConfig
    from edgetune_converters.onnx.traced_model import TracedModel
    from edgetune_converters.outputs.traced import Compare
    from edgetune_converters.provenance.receipts import Receipt
    from edgetune_converters.request import ExportRequest

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


class TransformersTracer:
    """Traces models with torch.onnx.export, as transformers implements them."""

    name = EXPORTER

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that the graph depends on."""
        from edgetune.training import onnx_trace

        return onnx_trace.package_versions()

    def trace(self, merged: Path, family: str, context: int) -> tuple[TracedModel, Callable[[], Compare]]:
        """Trace a merged model; see `edgetune_converters.outputs.traced.Tracer`."""
        from edgetune.training import onnx_trace

        model, ask = onnx_trace.trace_model(merged, family, context)

        def run_model() -> Compare:
            probe = ask()
            return lambda graph: onnx_trace.check_graph(graph, probe, family)

        return model, run_model


def with_tracer(request: ExportRequest, config: ExportConfig) -> ExportRequest:
    """Return the request with the exporter of ONNX graphs, if one is needed. Raises as `check_if_traced`."""
    family = check_if_traced(request, config)
    if family is None:
        return request
    console.note(
        f"{family} has no graph of edgetune's own: transformers and torch.onnx.export draw it, which needs torch and "
        "memory for the whole model in f32, twice"
    )
    return replace(request, tracer=TransformersTracer())


def report_divergence(receipts: Sequence[Receipt]) -> None:
    """Print how far each traced graph is from the model that it was traced from."""
    for receipt in receipts:
        if receipt.exporter_kld is not None:
            name, kld = Path(receipt.artifact).name, receipt.exporter_kld
            console.note(f"{name}: mean KLD {kld:.1e} between the graph and transformers with the same weights")
