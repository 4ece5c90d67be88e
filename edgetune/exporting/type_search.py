"""`merge-export --search-types`: the storage type of every int4 matrix of ONNX, chosen by measured errors."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune import console
from edgetune.errors import ConfigError
from edgetune_converters.files.atomic import temporary_directory

if TYPE_CHECKING:
    from edgetune.exporting.source import Source
    from edgetune.reference.scored_rows import ScoredRows
    from edgetune.sensitivity.onnx.search import Subject
    from edgetune_converters.onnx.plan import OnnxSettings
    from edgetune_converters.request import ExportRequest

_TYPE = "int4"


def with_searched_types(request: ExportRequest, source: Source) -> ExportRequest:
    """Return the request with the ONNX settings that the search has chosen.

    Raises:
        ConfigError: There is no run to measure on.
    """
    if source.run is None:
        raise ConfigError(
            "--search-types measures on the held-out rows of a run, and no run is given",
            "Give a run directory",
        )
    from edgetune.reference.store import Reference
    from edgetune.sensitivity.onnx import search

    subject = search_subject(request, Reference.open(source.run.reference).main_rows)
    with (
        temporary_directory(request.paths("onnx")[_TYPE].resolve(), ".search.partial") as folder,
        console.count_progress("search types") as progress,
    ):
        return replace(request, onnx_settings=search.search_types(subject, folder, progress))


def search_subject(request: ExportRequest, rows: ScoredRows) -> Subject:
    """Open the model of a request for the search, with its plans and a function that exports it."""
    from edgetune.sensitivity.onnx.search import Subject
    from edgetune_converters.exporting import export
    from edgetune_converters.inputs import open_request
    from edgetune_converters.onnx.plan import OnnxSettings
    from edgetune_converters.planning import plan_onnx
    from edgetune_converters.quantization.imatrix import read_imatrix
    from edgetune_converters.request import Target

    def export_trial(settings: OnnxSettings, folder: Path) -> None:
        export(replace(request.for_trial(Target("onnx", _TYPE, folder)), onnx_settings=settings))

    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        model = open_request(request, Path(folder))
    return Subject(
        model=model,
        plan=plan_onnx(model, _TYPE),
        separate_plan=plan_onnx(model, _TYPE, OnnxSettings(apart=True)),
        export=export_trial,
        rows=rows,
        importance=None if request.imatrix is None else read_imatrix(request.imatrix),
        threads=request.threads,
    )
