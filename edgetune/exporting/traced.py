"""ONNX of families that edgetune has no graph for: transformers and torch.onnx.export trace the merged model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune import console
from edgetune.planning.export_checks import EXPORTER, check_if_traced

if TYPE_CHECKING:
    from edgetune.config import ExportConfig
    from edgetune_converters.onnx.traced_model import TracedModel
    from edgetune_converters.outputs.traced import Compare
    from edgetune_converters.provenance.receipts import Receipt
    from edgetune_converters.request import ExportRequest


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
