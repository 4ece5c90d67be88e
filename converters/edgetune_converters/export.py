"""From base and adapter to GGUF files in one pass: read a block, add the delta, quantize it for each file, write it.

Everything that can be known before the first weight is read is known: tensors matched, vocabulary converted, sizes
planned, room on the disk. The files appear together by renaming, or not at all.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters import merge, recipes, tokenizers
from edgetune_converters.adapters import Adapter
from edgetune_converters.architectures import Family, ModelConfig, bind, family_of
from edgetune_converters.checkpoint import F32, Checkpoint
from edgetune_converters.errors import AdapterError, EdgetuneError, RecipeError
from edgetune_converters.gguf.layout import TensorSpec
from edgetune_converters.gguf.values import Scalar, Value, of_plain, string, u32
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.receipts import Receipt, combined_hash, tool_versions
from edgetune_converters.recipes import Plan, Recipe
from edgetune_converters.survival import Survival

Progress = Callable[[int, int], None]
F16_MAX = 65504.0
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass(frozen=True)
class _Model:
    """A base with its adapter, matched and checked, nothing read yet."""

    checkpoint: Checkpoint
    adapter: Adapter | None
    family: Family
    config: ModelConfig
    tensors: list[merge.MergedTensor]

    @property
    def shape(self) -> recipes.Shape:
        """What mixes depend on."""
        config = self.config
        return recipes.Shape(config.layers, config.heads, config.kv_heads, self.family.gguf)

    @property
    def planned(self) -> list[recipes.Tensor]:
        """The tensors as the planner sees them."""
        return [
            recipes.Tensor(tensor.slot, tensor.part, tensor.layer, tensor.gguf_name, tensor.shape, tensor.dtype.lower())
            for tensor in self.tensors
        ]

    @property
    def notes(self) -> list[str]:
        """What the family's GGUF form cannot say."""
        return [text for note in self.family.notes if (text := note(self.config))]


@dataclass
class _Output:
    """One file being made."""

    plan: Plan
    writer: GgufWriter
    survival: Survival | None

    def append(self, index: int, block: merge.Block, threads: int) -> None:
        """Quantize a block of tensor `index` and write it."""
        row = self.plan.rows[index]
        stored = _store(block.rows, row.type, row.name, threads)
        self.writer.append(stored)
        if self.survival is not None and block.delta is not None:
            self.survival.add(row.name, row.type, block, stored, threads)


def _output(plan: Plan, path: Path, metadata: Mapping[str, Value], measure_survival: bool) -> _Output:
    writer = GgufWriter(path, _complete(metadata, plan), _specs(plan))
    return _Output(plan, writer, Survival() if measure_survival else None)


def plan_export(base: Path, types: Sequence[str], *, adapter: Path | None = None) -> list[Plan]:
    """What `export` would write, one plan for each type; reads headers only and refuses nothing for its size."""
    chosen = [recipes.recipe_named(name) for name in types]
    model = _open(base, adapter)
    return [recipes.plan(recipe, model.planned, model.shape) for recipe in chosen]


def export(
    base: Path,
    outputs: Mapping[str, Path],
    *,
    adapter: Path | None = None,
    tokenizer: Path | None = None,
    chat_template: str | None = None,
    allow_fallback: bool = False,
    threads: int = 0,
    name: str | None = None,
    extra_metadata: Mapping[str, Scalar] | None = None,
    progress: Progress | None = None,
    expected_base: Mapping[str, str] | None = None,
    measure_survival: bool = False,
) -> list[Receipt]:
    """Merge `adapter` into `base` and write one GGUF file for each storage type of `outputs`.

    `tokenizer` is a directory (the base's own by default); `chat_template` replaces its template. `threads` 0 means all
    cores. `progress` is called with bytes read so far and in all. `expected_base` maps file names of the base to
    SHA-256, from the run that trained the adapter. Receipts are returned in the order of `outputs`, not yet written.
    Errors: EdgetuneError of the kind that names the part at fault. On any exception no file is left behind.
    """
    plans = _named_recipes(outputs)
    model = _open(base, adapter)
    chosen = [_checked_plan(recipe, model, allow_fallback) for recipe in plans]
    vocabulary = tokenizers.convert(
        tokenizer or base, model.config.vocab_size, model.config.raw, chat_template=chat_template
    )
    identity = _identity(model, expected_base)
    metadata = _metadata(model, vocabulary, identity, name) | _plain(extra_metadata or {})
    with _write_errors(), ExitStack() as stack:
        made = [
            _output(plan, path, metadata, measure_survival) for plan, path in zip(chosen, outputs.values(), strict=True)
        ]
        _check_room([output.writer for output in made])
        for output in made:
            stack.enter_context(output.writer)
        _stream(model, made, threads, progress)
        for output in made:
            output.writer.verify()
        return [_receipt(model, vocabulary, identity, output, output.writer.publish()) for output in made]


# -- before the first weight -------------------------------------------------------------------------------------------


def _named_recipes(outputs: Mapping[str, Path]) -> list[Recipe]:
    if not outputs:
        raise RecipeError("no storage type was given", f"Known: {', '.join(recipes.RECIPES)}")
    resolved = [path.resolve() for path in outputs.values()]
    for path in resolved:
        if resolved.count(path) > 1:
            raise EdgetuneError(f"two outputs would be written to {path}", "Give each type its own path")
        if path.is_dir():
            raise EdgetuneError(f"{path} is a directory", "Give the path of the file to be written")
    return [recipes.recipe_named(name) for name in outputs]


def _open(base: Path, adapter_path: Path | None) -> _Model:
    checkpoint = Checkpoint(base)
    config = ModelConfig(checkpoint.config)
    family = family_of(config)
    bound = bind(family, config, checkpoint.tensors)
    adapter = None if adapter_path is None else Adapter(adapter_path)
    targets = {item.target: item.source.shape for item in bound}
    changes = {} if adapter is None else adapter.changes(targets)
    tensors = merge.merged_tensors(family, config, checkpoint, bound, changes)
    return _Model(checkpoint, adapter, family, config, tensors)


def _checked_plan(recipe: Recipe, model: _Model, allow_fallback: bool) -> Plan:
    plan = recipes.plan(recipe, model.planned, model.shape)
    if not allow_fallback:
        recipes.check_fallback(plan, model.planned, model.shape)
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


def _check_room(writers: Sequence[GgufWriter]) -> None:
    """Errors: EdgetuneError when the files do not fit on their disks."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for writer in writers:
        place = next(path for path in writer.path.resolve().parents if path.exists())
        device = place.stat().st_dev
        needed[device] = needed.get(device, 0) + writer.size
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


def _metadata(
    model: _Model, vocabulary: tokenizers.Vocabulary, identity: _Identity, name: str | None
) -> dict[str, Value]:
    """All keys that do not depend on the recipe."""
    arch = model.family.gguf
    hyper = {f"{arch}.{key}": value for key, make in model.family.metadata if (value := make(model.config)) is not None}
    title = name or model.config.get("_name_or_path") or model.checkpoint.path.resolve().name
    general = {"general.architecture": string(arch), "general.type": string("model"), "general.name": string(title)}
    return general | hyper | vocabulary.metadata | _proof(identity)


def _proof(identity: _Identity) -> dict[str, Value]:
    proof = {
        "edgetune.version": string(tool_versions()["edgetune"]),
        "edgetune.merge_base": string("original"),
        "edgetune.base.sha256": string(combined_hash(identity.base)),
    }
    if identity.adapter is not None:
        proof["edgetune.adapter.sha256"] = string(combined_hash(identity.adapter))
    return proof


def _plain(extra: Mapping[str, Scalar]) -> dict[str, Value]:
    return {key: of_plain(value) for key, value in extra.items()}


def _complete(metadata: Mapping[str, Value], plan: Plan) -> dict[str, Value]:
    """The metadata of one file: general keys first, as readers expect the architecture early."""
    own = {
        "general.file_type": u32(plan.recipe.file_type),
        "general.quantization_version": u32(_QUANTIZATION_VERSION),
        "edgetune.recipe": string(plan.recipe.name),
    }
    return {**metadata, **own}


def _specs(plan: Plan) -> list[TensorSpec]:
    return [TensorSpec(row.name, row.shape, recipes.storage_of(row)) for row in plan.rows]


# -- the pass ----------------------------------------------------------------------------------------------------------


def _stream(model: _Model, outputs: Sequence[_Output], threads: int, progress: Progress | None) -> None:
    total = sum(tensor.source_bytes for tensor in model.tensors)
    done = 0
    for index, tensor in enumerate(model.tensors):
        weights = math.prod(tensor.shape)
        read = 0
        for block in tensor.blocks(model.checkpoint, model.config.head_dim):
            for output in outputs:
                output.append(index, block, threads)
            read += block.rows.size
            if progress is not None:
                progress(done + tensor.source_bytes * read // weights, total)
        done += tensor.source_bytes


def _store(rows: F32, type_name: str, tensor: str, threads: int) -> NDArray[Any]:
    """A block in its storage type, bytes in file order. Errors: RecipeError where f16 would overflow."""
    if type_name == "f32":
        return rows
    if type_name == "f16" and max(float(rows.max()), -float(rows.min())) > F16_MAX:
        raise RecipeError(
            f"{tensor} holds weights beyond {F16_MAX:.0f}, the largest that f16 can store", "Use bf16, q8_0 or f32"
        )
    stored: NDArray[np.uint8] = edgetune_native.quantize(rows, type_name, threads=threads)
    return stored


def _receipt(
    model: _Model, vocabulary: tokenizers.Vocabulary, identity: _Identity, output: _Output, digest: str
) -> Receipt:
    plan = output.plan
    return Receipt(
        artifact=str(output.writer.path),
        sha256=digest,
        size=output.writer.size,
        format="gguf",
        recipe=plan.recipe.name,
        architecture=model.family.gguf,
        base=identity.base,
        adapter=identity.adapter,
        merge_base="original",
        types=plan.bytes_by_type,
        tensors={row.name: row.type for row in plan.rows},
        weights=plan.weights,
        bits_per_weight=round(plan.bits_per_weight, 4),
        fallback_share=round(plan.fallback_share, 4),
        tokenizer={"model": vocabulary.model, "pre": vocabulary.pre},
        notes=model.notes + list(vocabulary.notes),
        survival=output.survival.ratios() if output.survival else None,
        versions=tool_versions(),
    )
