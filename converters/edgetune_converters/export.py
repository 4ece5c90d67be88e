"""From base and adapter to GGUF files in one pass: read a block, add the delta, quantize it for each file, write it.

Everything that can be known before the first weight is read is known: tensors matched, vocabulary converted, sizes
planned, room on the disk. The files appear together by renaming, or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetune_converters import merge, recipes, tokenizers
from edgetune_converters.adapters import Adapter, Change
from edgetune_converters.architectures import Bound, Family, ModelConfig, bind, family_of, slots, stored_turned, targets
from edgetune_converters.checkpoint import Checkpoint
from edgetune_converters.errors import AdapterError, EdgetuneError, RecipeError
from edgetune_converters.gguf.values import Scalar, Value, of_plain, string
from edgetune_converters.gguf_base import GgufBase, open_base
from edgetune_converters.importance import read_importance
from edgetune_converters.merge_base import ORIGINAL, MergeBase, merge_base_named
from edgetune_converters.outputs import Output, Summary, stream
from edgetune_converters.outputs import lora as lora_output
from edgetune_converters.outputs.base_stream import BaseTensor, base_tensors
from edgetune_converters.outputs.gguf import GgufOutput
from edgetune_converters.outputs.lora import LoraOutput
from edgetune_converters.outputs.safetensors import Documents, SafetensorsOutput, check_replaceable, check_type
from edgetune_converters.outputs.stream import Job, Progress
from edgetune_converters.overrides import NONE, Overrides
from edgetune_converters.receipts import Receipt, combined_hash, receipt_path, tool_versions
from edgetune_converters.recipes import Plan, Recipe


@dataclass(frozen=True)
class _Model:
    """A base with its adapter, matched and checked, nothing read yet."""

    checkpoint: Checkpoint
    adapter: Adapter | None
    family: Family
    config: ModelConfig
    tensors: list[merge.MergedTensor]
    bound: list[Bound]
    changes: dict[str, Change]
    merge_base: MergeBase

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output matrix."""
        return not any(tensor.slot == slots.OUTPUT for tensor in self.tensors)

    @cached_property
    def in_base_order(self) -> list[BaseTensor]:
        """The tensors under the base's names, each where the stream of GGUF tensors has read it first."""
        places = {name: index for index, tensor in reversed(list(enumerate(self.tensors))) for name in _sources(tensor)}
        tensors = base_tensors(self.family, self.checkpoint.tensors, self.tensors, self.bound, self.changes)
        return sorted(tensors, key=lambda tensor: places.get(tensor.source.name, len(places)))

    @property
    def shape(self) -> recipes.Shape:
        """What mixes depend on."""
        stated = {key: value.data for key, make in self.family.metadata if (value := make(self.config)) is not None}
        shared = stated.get("attention.head_count_kv")
        first = shared[0] if isinstance(shared, list) else shared
        experts = stated.get("expert_count", 0)
        assert isinstance(first, int)
        assert isinstance(experts, int)
        return recipes.Shape(self.config.layers, self.config.heads, first, self.family.gguf, experts)

    @property
    def planned(self) -> list[recipes.Tensor]:
        """The tensors as the planner sees them."""
        return [
            recipes.Tensor(tensor.slot, tensor.part, tensor.layer, tensor.gguf_name, tensor.shape, tensor.dtype.lower())
            for tensor in self.tensors
        ]

    @property
    def notes(self) -> list[str]:
        """What the family's GGUF form cannot say, and what is not certain about the base."""
        return [text for note in self.family.notes if (text := note(self.config))] + self.merge_base.notes


def plan_export(
    base: Path,
    types: Sequence[str],
    *,
    adapter: Path | None = None,
    overrides: Overrides = NONE,
    imatrix: Path | None = None,
) -> list[Plan]:
    """What `export` would write, one plan for each type; reads headers only and refuses nothing for its size."""
    chosen = [recipes.recipe_named(name) for name in types]
    model = _open(base, adapter, merge_base_named(ORIGINAL))
    return [recipes.plan(recipe, model.planned, model.shape, overrides, imatrix is not None) for recipe in chosen]


def export(
    base: Path,
    outputs: Mapping[str, Path],
    *,
    safetensors: Mapping[str, Path] | None = None,
    lora: Mapping[str, Path] | None = None,
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
    measure_survival: bool = False,
    merge_base: str = ORIGINAL,
    trained_on: Mapping[str, Any] | None = None,
) -> list[Receipt]:
    """Merge `adapter` into `base` and write one GGUF file for each storage type of `outputs`.

    `safetensors` maps bf16, f16, f32 or "base" (the types of the base) to directories of merged models, `lora` maps
    f32, f16 or bf16 to GGUF files of the adapter alone; one read feeds all. `tokenizer` is a directory (the base's own
    by default); `chat_template` replaces its template. `threads` 0 means all cores. `progress` is called with bytes
    read so far and in all. `expected_base` maps file names of the base to SHA-256, from the run that trained the
    adapter. `merge_base` is one of MERGE_BASES; for "nf4", `trained_on` is the `quantized` entry of the run's manifest
    (bitsandbytes' defaults without it). Receipts are returned in the order of the outputs (GGUF, safetensors, adapter),
    not yet written.
    Errors: EdgetuneError of the kind that names the part at fault. On any exception nothing is left behind.
    """
    directories, adapters = safetensors or {}, lora or {}
    _check_paths({**outputs}, {**directories}, {**adapters})
    chosen = [recipes.recipe_named(type_name) for type_name in outputs]
    model = _open(base, adapter, merge_base_named(merge_base, trained_on, threads))
    if directories and isinstance(model.checkpoint, GgufBase):
        raise RecipeError(
            f"{base} is a GGUF file: a safetensors directory cannot be made of it", "Give a model directory with --base"
        )
    plans = [_checked_plan(recipe, model, overrides, imatrix is not None, allow_fallback) for recipe in chosen]
    importance = None if imatrix is None else read_importance(imatrix)
    vocabulary = _vocabulary(model, tokenizer or base, chat_template) if outputs else None
    documents = Documents(base, model.config.raw, tokenizer or base, chat_template, model.tied)
    factors = _factors(model) if adapters else []
    identity = _identity(model, expected_base)
    general = _general(model, identity, name) | _plain(extra_metadata or {})
    metadata = general | _hyperparameters(model) | (vocabulary.metadata if vocabulary else {})
    with _write_errors(), ExitStack() as stack:
        files: list[Output] = [
            GgufOutput(
                plan,
                path,
                metadata,
                overrides=tuple(overrides.said),
                importance=importance,
                measure_survival=measure_survival,
                split_max_size=split_max_size,
            )
            for plan, path in zip(plans, outputs.values(), strict=True)
        ]
        merged: list[Output] = [
            SafetensorsOutput(path, check_type(type_name), model.in_base_order, documents, max_shard_size)
            for type_name, path in directories.items()
        ]
        alone: list[Output] = [
            LoraOutput(path, lora_output.check_type(type_name), factors, general)
            for type_name, path in adapters.items()
        ]
        made = [*files, *merged, *alone]
        _check_room(made)
        for output in made:
            stack.enter_context(output)
        stream.run(_jobs(model, files, merged), threads, progress)
        for output in made:
            output.verify()
        return [_receipt(model, vocabulary, identity, _published(output)) for output in made]


# -- before the first weight -------------------------------------------------------------------------------------------


def _check_paths(*outputs: Mapping[str, Path]) -> None:
    files, directories, adapters = outputs
    paths = [*files.values(), *directories.values(), *adapters.values()]
    if not paths:
        raise RecipeError("no storage type was given", f"Known: {', '.join(recipes.RECIPES)}")
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise EdgetuneError(f"two outputs would be written to {path}", "Give each type its own path")
    for path in (*files.values(), *adapters.values()):
        if path.is_dir():
            raise EdgetuneError(f"{path} is a directory", "Give the path of the file to be written")
    for path in directories.values():
        check_replaceable(path)


def _open(base: Path, adapter_path: Path | None, merge_base: MergeBase) -> _Model:
    checkpoint = open_base(base)
    config = ModelConfig(checkpoint.config)
    family = family_of(config)
    config = config.completed(family.defaults)
    bound = bind(family, config, checkpoint.tensors)
    adapter = None if adapter_path is None else Adapter(adapter_path)
    changes = {} if adapter is None else adapter.changes(targets(bound), family.renamed, stored_turned(bound))
    tensors = merge.merged_tensors(family, config, checkpoint, bound, changes)
    applied = merge_base.apply(tensors, family.renamed)
    return _Model(checkpoint, adapter, family, config, applied, bound, changes, merge_base)


def _factors(model: _Model) -> list[lora_output.Factor]:
    if model.adapter is None:
        raise AdapterError("there is no adapter to write as gguf-lora", "Give a run, or --adapter DIR")
    return lora_output.factors_of(model.bound, model.changes, model.checkpoint)


def _vocabulary(model: _Model, source: Path, chat_template: str | None) -> tokenizers.Vocabulary:
    """The tokenizer of a directory, or that of the GGUF file which is the base."""
    if isinstance(model.checkpoint, GgufBase) and source == model.checkpoint.path:
        return model.checkpoint.vocabulary(chat_template)
    return tokenizers.convert(source, model.config.vocab_size, model.config.raw, chat_template=chat_template)


def _checked_plan(recipe: Recipe, model: _Model, overrides: Overrides, measured: bool, allow_fallback: bool) -> Plan:
    plan = recipes.plan(recipe, model.planned, model.shape, overrides, measured)
    if not allow_fallback:
        recipes.check_fallback(plan, model.planned, model.shape, overrides, measured)
    return plan


@dataclass(frozen=True)
class _Identity:
    """Hashes of everything that went in."""

    base: dict[str, str]
    adapter: dict[str, str] | None


def _identity(model: _Model, expected: Mapping[str, str] | None) -> _Identity:
    found = model.checkpoint.identity()
    differing = [name for name, digest in (expected or {}).items() if found.get(name) != digest]
    if differing:
        raise AdapterError(
            f"{model.checkpoint.path} is not the base the adapter was trained on: {', '.join(sorted(differing))} "
            f"{'differs' if len(differing) == 1 else 'differ'}",
            "Give the base model that the run's manifest names",
        )
    return _Identity(found, model.adapter.identity() if model.adapter else None)


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
def _write_errors() -> Iterator[None]:
    """A full or read-only disk in one sentence."""
    try:
        yield
    except OSError as error:
        where = f" to {error.filename}" if error.filename else ""
        raise EdgetuneError(f"cannot write{where}: {error.strerror or error}") from error


# -- metadata ----------------------------------------------------------------------------------------------------------


def _general(model: _Model, identity: _Identity, name: str | None) -> dict[str, Value]:
    """What every GGUF file says first: readers expect the architecture early."""
    title = name or model.config.get("_name_or_path") or model.checkpoint.path.resolve().name
    general = {
        "general.architecture": string(model.family.gguf),
        "general.type": string("model"),
        "general.name": string(title),
    }
    return general | _proof(identity, model.merge_base.name)


def _hyperparameters(model: _Model) -> dict[str, Value]:
    found = {key: value for key, make in model.family.metadata if (value := make(model.config)) is not None}
    return {f"{model.family.gguf}.{key}": value for key, value in found.items()}


def _proof(identity: _Identity, merge_base: str) -> dict[str, Value]:
    proof = {
        "edgetune.version": string(tool_versions()["edgetune"]),
        "edgetune.merge_base": string(merge_base),
        "edgetune.base.sha256": string(combined_hash(identity.base)),
    }
    if identity.adapter is not None:
        proof["edgetune.adapter.sha256"] = string(combined_hash(identity.adapter))
    return proof


def _plain(extra: Mapping[str, Scalar]) -> dict[str, Value]:
    return {key: of_plain(value) for key, value in extra.items()}


# -- the pass ----------------------------------------------------------------------------------------------------------


def _jobs(model: _Model, files: Sequence[Output], directories: Sequence[Output]) -> list[Job]:
    """Each tensor for the GGUF files, and after it those of the base that were read for it."""
    jobs: list[Job] = []
    waiting = list(enumerate(model.in_base_order)) if directories else []
    for index, tensor in enumerate(model.tensors):
        if files:
            jobs.append(Job(index, tensor.shape, tensor.source_bytes, tensor.blocks(model.checkpoint), files))
        while waiting and waiting[0][1].source.name in _sources(tensor):
            jobs.append(_base_job(model, *waiting.pop(0), directories))
    return jobs + [_base_job(model, *item, directories) for item in waiting]


def _base_job(model: _Model, index: int, tensor: BaseTensor, directories: Sequence[Output]) -> Job:
    return Job(index, tensor.shape, tensor.source.bytes, tensor.blocks(model.checkpoint), directories)


def _sources(tensor: merge.MergedTensor) -> set[str]:
    """The base's tensors from which one is made."""
    return {part.piece.source.name for part in tensor.parts}


def _published(output: Output) -> Summary:
    """Rename; the receipt of an older artifact goes first, for it does not speak of this one."""
    receipt_path(output.path).unlink(missing_ok=True)
    return output.publish()


def _receipt(model: _Model, vocabulary: tokenizers.Vocabulary | None, identity: _Identity, made: Summary) -> Receipt:
    is_model = made.format == "gguf" and vocabulary is not None
    notes = model.notes + list(vocabulary.notes) if is_model and vocabulary else []
    if made.format == "safetensors":  # what GGUF cannot say does not concern it
        notes = list(model.merge_base.notes)
    own = made._asdict() | {
        "artifact": str(made.artifact),
        "overrides": list(made.overrides),
        "notes": notes + list(made.notes),
    }
    return Receipt(
        architecture=model.family.gguf,
        base=identity.base,
        adapter=identity.adapter,
        merge_base=model.merge_base.name,
        tokenizer={"model": vocabulary.model, "pre": vocabulary.pre} if is_model and vocabulary else {},
        versions=tool_versions(),
        **own,
    )
