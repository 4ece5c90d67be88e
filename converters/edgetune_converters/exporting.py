"""Export in one pass: read a block, add the delta, quantize it for each output, write it.

Everything that can be checked is checked before the first weight is read: tensors, vocabulary, sizes, disk space. The
artifacts are renamed into place together, or not at all.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edgetune_converters import formats
from edgetune_converters.errors import EdgetuneError
from edgetune_converters.files import atomic
from edgetune_converters.files.interrupts import deferred_sigint
from edgetune_converters.files.writable import existing_parent, why_not_writable
from edgetune_converters.inputs import ExportInputs, VocabularyChanged, open_request
from edgetune_converters.merging import prefix_state
from edgetune_converters.outputs import stream
from edgetune_converters.outputs.base import Output, OutputSummary, StreamedOutput
from edgetune_converters.outputs.staging import DirectoryOutput
from edgetune_converters.outputs.stream import Progress
from edgetune_converters.provenance.hashing import InputHasher, InputHashes
from edgetune_converters.provenance.metadata import combination_record
from edgetune_converters.provenance.receipts import Receipt, receipt_path, tool_versions
from edgetune_converters.quantization.imatrix import read_imatrix
from edgetune_converters.request import ExportRequest


def export(request: ExportRequest, *, progress: Progress | None = None) -> list[Receipt]:
    """Merge the adapter into the base and write every target of the request in one pass.

    Args:
        request: What is read and written.
        progress: Called with the bytes read so far and in all.

    Returns:
        The receipt of each target, in the order of the request.

    Raises:
        EdgetuneError: Of the kind that names the part at fault. On any exception nothing is left behind.
    """
    formats.check(request.targets)
    with ExitStack() as stack:
        rebuilt = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgetune-"))
        model = open_request(request, Path(rebuilt))
        hashing = stack.enter_context(
            InputHasher(model.checkpoint, model.adapter, request.expected_base, request.expected_adapter)
        )
        background = stack.enter_context(ThreadPoolExecutor(1))
        importance = None if request.imatrix is None else read_imatrix(request.imatrix)
        inputs = ExportInputs(request, model, importance, hashing, background, Path(rebuilt))
        try:
            return _write(formats.make(inputs), inputs, progress)
        except VocabularyChanged:
            return _write(formats.make(inputs), inputs, progress)


def _write(outputs: Sequence[Output], inputs: ExportInputs, progress: Progress | None) -> list[Receipt]:
    """Feed all outputs from one read and rename them into place. Raises VocabularyChanged."""

    def advanced(done: int, total: int) -> None:
        inputs.check()
        if progress is not None:
            progress(done, total)

    with write_errors(), ExitStack() as stack:
        _check_disk_space(outputs)
        for output in outputs:
            stack.enter_context(output)
        streamed = [output for output in outputs if isinstance(output, StreamedOutput)]
        stream.run(streamed, inputs.model.checkpoint, inputs.request.threads, advanced)
        inputs.check(wait=True)
        identity = inputs.hashing.result()
        for output, target in zip(outputs, inputs.request.targets, strict=True):
            output.finish(identity)
            _write_prefix(output, target.format, inputs)
        for output in outputs:
            output.verify()
        for output in outputs:
            output.hash_files()
        with deferred_sigint():
            return [_publish(output, inputs, identity) for output in outputs]


def _write_prefix(output: Output, format_: str, inputs: ExportInputs) -> None:
    """Write the prefix beside the artifact, before the artifact gets its name."""
    content = inputs.prefix(format_)
    if content is None:
        return
    if isinstance(output, DirectoryOutput):
        (output.partial / prefix_state.IN_FOLDER).write_bytes(content)
        return
    with atomic.replacing(prefix_state.path_beside(output.path)) as partial:
        partial.write_bytes(content)


def _publish(output: Output, inputs: ExportInputs, identity: InputHashes) -> Receipt:
    """Rename the artifact into place. The receipt of the artifact that it replaces is removed first."""
    receipt_path(output.path).unlink(missing_ok=True)
    receipt = _receipt(inputs, identity, output.publish())
    if inputs.request.write_receipts:
        receipt.write()
    return receipt


def _check_disk_space(outputs: Sequence[Output]) -> None:
    """Raise EdgetuneError if the files cannot be written, or do not fit on their disks."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for output in outputs:
        why = why_not_writable(output.path.resolve().parent)
        if why:
            raise EdgetuneError(f"{output.path} cannot be written: {why}", "Choose another output directory")
        place = existing_parent(output.path.resolve().parent)
        device = place.stat().st_dev
        needed[device] = needed.get(device, 0) + output.size
        places[device] = place
    for device, size in needed.items():
        free = shutil.disk_usage(places[device]).free
        if size > free:
            raise EdgetuneError(
                f"no space left: the export needs {size / 1e6:,.0f} MB, {places[device]} has {free / 1e6:,.0f} MB",
                "Free some space or choose another output directory",
            )


@contextmanager
def write_errors() -> Iterator[None]:
    """Turn an OSError, such as of a full or read-only disk, into an EdgetuneError."""
    try:
        yield
    except OSError as error:
        where = f" to {error.filename}" if error.filename else ""
        raise EdgetuneError(f"cannot write{where}: {error.strerror or error}") from error


def _receipt(inputs: ExportInputs, identity: InputHashes, made: OutputSummary) -> Receipt:
    model, kld = inputs.model, inputs.request.merge_base_kld
    vocabulary = inputs.vocabulary.current if made.format == "gguf" else None
    notes = model.notes + list(vocabulary.notes) if vocabulary else []
    if made.format in ("safetensors", "onnx"):  # the notes on what GGUF cannot express do not apply
        notes = list(model.merge_base.notes)
    if made.format == "onnx":
        notes = model.notes_of_runnable_files + notes
    own = made._asdict() | {
        "artifact": str(made.artifact),
        "overrides": list(made.overrides),
        "notes": inputs.notes(made.format) + notes + list(made.notes),
        "versions": tool_versions() | made.versions,
    }
    return Receipt(
        architecture=model.family.gguf,
        base=dict(identity.base),
        adapter=None if identity.adapter is None else dict(identity.adapter),
        combination=combination_record(model, identity.adapter),
        merge_base=model.merge_base.name,
        merge_base_kld=None if kld is None else dict(kld),
        tokenizer={"model": vocabulary.model, "pre": vocabulary.pre} if vocabulary else {},
        **own,
    )
