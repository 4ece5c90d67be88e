"""From base and adapter to GGUF and more in one pass: read a block, add the delta, quantize it for each, write it.

Everything that can be known before the first weight is read is known: tensors matched, vocabulary converted, sizes
planned, room on the disk. The files appear together by renaming, or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_converters import formats
from edgetune_converters.errors import EdgetuneError
from edgetune_converters.files.interrupts import deferred_sigint
from edgetune_converters.formats import Request
from edgetune_converters.gguf.values import Scalar
from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import open_model
from edgetune_converters.names import ORIGINAL
from edgetune_converters.outputs import stream
from edgetune_converters.outputs.base import Output, StreamedOutput, Summary
from edgetune_converters.outputs.stream import Progress
from edgetune_converters.provenance.hashing import InputHasher, InputHashes
from edgetune_converters.provenance.receipts import Receipt, receipt_path, tool_versions
from edgetune_converters.quantization import recipes
from edgetune_converters.quantization.imatrix import read_imatrix
from edgetune_converters.quantization.overrides import NONE, Overrides
from edgetune_converters.quantization.recipes import StoragePlan

if TYPE_CHECKING:
    from edgetune_converters.onnx.plan import OnnxPlan, OnnxSettings

Published = Callable[[Receipt], object]
"""Called with the receipt of an artifact that has just taken its name."""


def plan_export(
    base: Path,
    types: Sequence[str],
    *,
    adapter: Path | None = None,
    overrides: Overrides = NONE,
    imatrix: Path | None = None,
) -> list[StoragePlan]:
    """What `export` would write, one plan for each type; reads headers only and refuses nothing for its size."""
    chosen = [recipes.recipe_named(name) for name in types]
    model = open_model(base, adapter, merge_base_named(ORIGINAL))
    return [
        recipes.plan_storage(recipe, model.tensor_facts, model.facts, overrides, imatrix is not None)
        for recipe in chosen
    ]


def plan_onnx(
    base: Path, types: Sequence[str], settings: OnnxSettings | None = None, *, adapter: Path | None = None
) -> list[OnnxPlan]:
    """What `export` would write as ONNX, one plan for each type; reads headers only."""
    from edgetune_converters.onnx import model as onnx_model
    from edgetune_converters.onnx.plan import DEFAULT_SETTINGS, onnx_recipe

    chosen = [onnx_recipe(name) for name in types]
    model = open_model(base, adapter, merge_base_named(ORIGINAL))
    found = onnx_model.source_tensors(model.tensors)
    decoder = onnx_model.describe_model(model.family, model.config, found)
    return [onnx_model.DecoderGraph.of(decoder, found, kind, settings or DEFAULT_SETTINGS).plan for kind in chosen]


def export(
    base: Path,
    outputs: Mapping[str, Path],
    *,
    safetensors: Mapping[str, Path] | None = None,
    lora: Mapping[str, Path] | None = None,
    onnx: Mapping[str, Path] | None = None,
    onnx_settings: OnnxSettings | None = None,
    adapter: Path | None = None,
    tokenizer: Path | None = None,
    chat_template: str | None = None,
    overrides: Overrides = NONE,
    imatrix: Path | None = None,
    split_max_size: int | None = None,
    max_shard_size: int | None = None,
    allow_fallback: bool = False,
    threads: int = 0,
    name: str | None = None,
    extra_metadata: Mapping[str, Scalar] | None = None,
    progress: Progress | None = None,
    expected_base: Mapping[str, str] | None = None,
    expected_adapter: Mapping[str, str] | None = None,
    measure_survival: bool = False,
    merge_base: str = ORIGINAL,
    trained_on: Mapping[str, Any] | None = None,
    published: Published | None = None,
) -> list[Receipt]:
    """Merge `adapter` into `base` and write one GGUF file for each storage type of `outputs`.

    `safetensors` maps bf16, f16, f32 or "base" (the types of the base) to directories of merged models, `lora` maps
    f32, f16 or bf16 to GGUF files of the adapter alone, `onnx` maps int4, int8, f16 or f32 to directories; one read
    feeds all. `tokenizer` is a directory (the base's own by default); `chat_template` replaces its template. `threads`
    0 means all cores. `progress` is called with bytes read so far and in all. `expected_base` maps file names of the
    base to SHA-256, from the run that trained the adapter, and `expected_adapter` those of the adapter. `merge_base` is
    one of MERGE_BASES; for "nf4", `trained_on` is the `quantized` entry of the run's manifest (bitsandbytes' defaults
    without it). Receipts are returned in the order of the outputs (GGUF, safetensors, adapter, ONNX). All take their
    names together, with Ctrl-C held back for that moment; `published` gets each receipt at once, to write it.
    Errors: EdgetuneError of the kind that names the part at fault. On any exception nothing is left behind.
    """
    wanted = {"gguf": outputs, "safetensors": safetensors or {}, "gguf-lora": lora or {}, "onnx": onnx or {}}
    formats.check(wanted)
    model = open_model(base, adapter, merge_base_named(merge_base, trained_on, threads))
    with (
        InputHasher(model.checkpoint, model.adapter, expected_base, expected_adapter) as hashing,
        ThreadPoolExecutor(1) as background,
    ):
        request = Request(
            model=model,
            hashing=hashing,
            background=background,
            tokenizer=tokenizer or base,
            chat_template=chat_template,
            overrides=overrides,
            importance=None if imatrix is None else read_imatrix(imatrix),
            split_max_size=split_max_size,
            max_shard_size=max_shard_size,
            allow_fallback=allow_fallback,
            name=name,
            extra_metadata=extra_metadata or {},
            measure_survival=measure_survival,
            onnx_settings=onnx_settings,
        )
        try:
            return _write(formats.make(wanted, request), request, threads, progress, published)
        except formats.Revised:
            return _write(formats.make(wanted, request), request, threads, progress, published)


def _write(
    outputs: Sequence[Output], request: Request, threads: int, progress: Progress | None, published: Published | None
) -> list[Receipt]:
    """Feed all outputs from one read and give them their names. Errors: Revised."""

    def advanced(done: int, total: int) -> None:
        request.check()
        if progress is not None:
            progress(done, total)

    with write_errors(), ExitStack() as stack:
        _check_room(outputs)
        for output in outputs:
            stack.enter_context(output)
        streamed = [output for output in outputs if isinstance(output, StreamedOutput)]
        stream.run(streamed, request.model.checkpoint, threads, advanced)
        request.check(wait=True)
        identity = request.hashing.result()
        for output in outputs:
            output.finish(identity)
        for output in outputs:
            output.verify()
        for output in outputs:
            output.hash_files()
        with deferred_sigint():
            return [_publish(output, request, identity, published) for output in outputs]


def _publish(output: Output, request: Request, identity: InputHashes, published: Published | None) -> Receipt:
    """Rename; the receipt of an older artifact goes first, for it does not speak of this one."""
    receipt_path(output.path).unlink(missing_ok=True)
    receipt = _receipt(request, identity, output.publish())
    if published is not None:
        published(receipt)
    return receipt


def _check_room(outputs: Sequence[Output]) -> None:
    """Errors: EdgetuneError when the files do not fit on their disks."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for output in outputs:
        place = next(path for path in output.path.resolve().parents if path.exists())
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
    """A full or read-only disk in one sentence."""
    try:
        yield
    except OSError as error:
        where = f" to {error.filename}" if error.filename else ""
        raise EdgetuneError(f"cannot write{where}: {error.strerror or error}") from error


def _receipt(request: Request, identity: InputHashes, made: Summary) -> Receipt:
    model = request.model
    vocabulary = request.vocabulary.now if made.format == "gguf" else None
    notes = model.notes + list(vocabulary.notes) if vocabulary else []
    if made.format in ("safetensors", "onnx"):  # what GGUF cannot say does not concern it
        notes = list(model.merge_base.notes)
    own = made._asdict() | {
        "artifact": str(made.artifact),
        "overrides": list(made.overrides),
        "notes": notes + list(made.notes),
        "versions": tool_versions() | made.versions,
    }
    return Receipt(
        architecture=model.family.gguf,
        base=dict(identity.base),
        adapter=None if identity.adapter is None else dict(identity.adapter),
        merge_base=model.merge_base.name,
        tokenizer={"model": vocabulary.model, "pre": vocabulary.pre} if vocabulary else {},
        **own,
    )
