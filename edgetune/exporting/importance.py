"""`--imatrix auto`: an importance matrix of the merged model, computed from the run's training rows.

The model is exported in 8 bits, whose own error is negligible here, and evaluated by llama.cpp. The matrix stays beside
the artifacts: llama-quantize reads it, and a further export of the same model takes it as it is.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import console
from edgetune.errors import ConfigError, EdgetuneError
from edgetune_converters.files.atomic import temporary_directory
from edgetune_converters.names import AUTO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgetune.config import ExportConfig
    from edgetune.exporting.source import Source
    from edgetune.runtime.llama.activations import ActivationSums
    from edgetune_converters.request import ExportRequest, Target

TRIAL_TYPE = "q8_0"
_VERSION = 1
_FORMATS = frozenset(("gguf", "onnx"))


def matrix_path(source: Source, config: ExportConfig, targets: Sequence[Target]) -> Path | None:
    """Return the file of the importance matrix: the given one, or where that of `auto` is; None for none."""
    if config.imatrix is None or (config.imatrix == AUTO and targets and not _is_used(targets)):
        return None
    if config.imatrix != AUTO:
        return Path(config.imatrix)
    folder = targets[0].path.parent if targets else source.default_folder
    return folder / f"{source.name}.imatrix"


def _is_used(targets: Sequence[Target]) -> bool:
    from edgetune_converters.quantization.imatrix import UNWEIGHTED

    return any(target.format in _FORMATS and target.type not in UNWEIGHTED for target in targets)


def check_importance(source: Source, config: ExportConfig, targets: Sequence[Target]) -> None:
    """Check that an importance matrix of `auto` can be computed, before anything is read.

    Raises:
        ConfigError: There is no run, or it keeps no training rows.
    """
    if config.imatrix != AUTO:
        return
    if not _is_used(targets):
        console.note("--imatrix auto: none of the storage types asked for is weighted, so nothing is computed")
        return
    if source.run is None:
        raise ConfigError(
            "--imatrix auto computes the importance matrix from the training rows of a run, and no run is given",
            "Give a run directory, or --imatrix FILE",
        )
    if not source.run.calibration.is_file():
        is_adopted = source.manifest.adopted is not None
        why = "its adapter was trained elsewhere" if is_adopted else "an earlier version of edgetune trained it"
        again = "Adopt it again with --set data.train=ROWS" if is_adopted else "Train it again"
        raise ConfigError(
            f"{source.run.path} keeps no training rows, as {why}",
            f"{again}, or make a matrix with llama-imatrix and give its file to --imatrix",
        )


def with_measured_importance(request: ExportRequest, source: Source, config: ExportConfig) -> ExportRequest:
    """Compute the importance matrix of `auto` where the request needs one that is not there yet; return the request.

    Raises:
        ConfigError: The file of the matrix exists, and edgetune did not write it.
    """
    if config.imatrix != AUTO or request.imatrix is None:
        return request
    from edgetune.reference.calibration import CalibrationRows

    assert source.run is not None  # check_importance
    calibration = CalibrationRows.read(source.run.calibration)
    rows = list(calibration.first(config.imatrix_tokens))
    made_of = _made_of(request, source, calibration.digest, sum(map(len, rows)))
    if _stated(request.imatrix) == made_of:
        console.note(f"{request.imatrix}: the importance matrix of an earlier export of this model")
        return request
    if not rows:
        raise ConfigError(f"{source.run.path} has no training rows to compute an importance matrix from", _HINT)
    _compute(request, rows, made_of, source)
    return request


_HINT = "Leave out --imatrix, or give it a file"


def _made_of(request: ExportRequest, source: Source, rows: str, tokens: int) -> str:
    """Return the hash of everything that the matrix follows from."""
    parts: dict[str, Any] = {
        "version": _VERSION, "base": source.expected_base, "adapter": source.expected_adapter, "rows": rows,
        "tokens": tokens, "merge_base": request.merge_base, "prompt_task": request.prompt_task, "type": TRIAL_TYPE,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()


def _stated(path: Path) -> str | None:
    """Return what an existing matrix was made of, None where there is none. Raises ConfigError for a foreign file."""
    from edgetune_converters.gguf import keys, reader

    if not path.exists():
        return None
    try:
        stated = reader.read(path).metadata.get(keys.IMATRIX_MADE_OF)
    except EdgetuneError:
        stated = None
    if not isinstance(stated, str):
        raise ConfigError(
            f"{path} exists and is no importance matrix that edgetune wrote", "Move it away, or name it with --imatrix"
        )
    return stated


def _compute(request: ExportRequest, rows: Sequence[NDArray[np.int32]], made_of: str, source: Source) -> None:
    from edgetune_converters.exporting import export
    from edgetune_converters.gguf import keys
    from edgetune_converters.gguf.values import string
    from edgetune_converters.quantization.imatrix import write_imatrix
    from edgetune_converters.quantization.overrides import NONE
    from edgetune_converters.request import Target

    assert request.imatrix is not None
    tokens = sum(map(len, rows))
    with (
        temporary_directory(request.imatrix.resolve(), ".model.partial") as folder,
        console.count_progress("importance matrix") as progress,
    ):
        trial = request.for_trial(Target("gguf", TRIAL_TYPE, folder / "model.gguf"))
        receipt = export(replace(trial, overrides=NONE, imatrix=None, allow_fallback=True))[0]
        sums = _add_up(Path(receipt.artifact), rows, request.threads, progress)
    dataset = f"{len(rows)} training rows of {source.name}"
    metadata = {keys.IMATRIX_MADE_OF: string(made_of)}
    write_imatrix(request.imatrix, sums, dataset=dataset, tokens=tokens, metadata=metadata)
    console.note(f"{request.imatrix}: importance matrix from {len(rows)} training rows, {tokens:,} tokens")


def _add_up(
    file: Path, rows: Sequence[NDArray[np.int32]], threads: int, progress: console.Progress
) -> dict[str, ActivationSums]:
    """Evaluate the rows in another thread, so that Ctrl-C takes effect in this one; it ends after the current row."""
    from edgetune.runtime.llama.runtime import LlamaRuntime

    is_stopped = threading.Event()

    def remaining() -> Iterator[NDArray[np.int32]]:
        for done, row in enumerate(rows):
            if is_stopped.is_set():
                return
            progress(done, len(rows))
            yield row

    longest = max(map(len, rows))
    with LlamaRuntime(file, threads=threads or None, context=longest) as runtime, ThreadPoolExecutor(1) as pool:
        future = pool.submit(runtime.add_up_activations, remaining())
        try:
            return future.result()
        finally:
            is_stopped.set()
