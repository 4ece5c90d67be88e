"""The formats that an export can write: a row each, with how an output of it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgetune_converters.errors import EdgetuneError, RecipeError, TokenizerError
from edgetune_converters.files.companions import CompanionFiles
from edgetune_converters.gguf import keys
from edgetune_converters.gguf.values import Scalar, Value
from edgetune_converters.model import Model
from edgetune_converters.outputs import lora, safetensors
from edgetune_converters.outputs.base import Output
from edgetune_converters.outputs.gguf import GgufOutput
from edgetune_converters.provenance import metadata
from edgetune_converters.provenance.hashing import InputHasher
from edgetune_converters.quantization import recipes
from edgetune_converters.quantization.imatrix import ImportanceMatrix
from edgetune_converters.quantization.overrides import Overrides
from edgetune_converters.quantization.recipes import StoragePlan
from edgetune_converters.reading.gguf_base import GgufBase
from edgetune_converters.tokenizers import convert
from edgetune_converters.tokenizers.special import special_token_ids

if TYPE_CHECKING:
    from edgetune_converters.onnx.plan import OnnxSettings


class Revised(Exception):
    """The proof of a vocabulary has shown that another one is to be written."""


class Vocabulary:
    """A vocabulary, of which the proof may still be going on while the pass has begun with it."""

    def __init__(self, likely: convert.Vocabulary, proof: Future[convert.Vocabulary] | None = None) -> None:
        self.now = likely
        self._proof = proof

    def check(self, *, wait: bool = False) -> None:
        """Look at the proof if it is there. Errors: TokenizerError; Revised when `now` has become another one."""
        if self._proof is None or not (wait or self._proof.done()):
            return
        before, self.now, self._proof = self.now, self._proof.result(), None
        if self.now.metadata != before.metadata:
            raise Revised


@dataclass(frozen=True)
class Request:
    """What outputs are made from. The tokenizer is converted when the first of them asks for it."""

    model: Model
    hashing: InputHasher
    background: Executor
    tokenizer: Path
    chat_template: str | None
    overrides: Overrides
    importance: ImportanceMatrix | None
    split_max_size: int | None
    max_shard_size: int | None
    allow_fallback: bool
    name: str | None
    extra_metadata: Mapping[str, Scalar]
    measure_survival: bool
    onnx_settings: OnnxSettings | None = None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer of a directory, or that of the GGUF file which is the base. Errors: TokenizerError."""
        model, source = self.model, self.tokenizer
        if isinstance(model.checkpoint, GgufBase) and source == model.checkpoint.path:
            return Vocabulary(model.checkpoint.vocabulary(self.chat_template))
        size, config = model.config.vocab_size, model.config.raw
        conversion = convert.Conversion(source, size, config, self.chat_template)
        return Vocabulary(conversion.likely, self.background.submit(conversion.verified))

    def check(self, *, wait: bool = False) -> None:
        """Look at what is found out during the pass, or wait for it.

        Errors: AdapterError when the base is not the one that was expected, TokenizerError; Revised.
        """
        if "vocabulary" in self.__dict__:  # no output may have asked for it
            self.vocabulary.check(wait=wait)
        self.hashing.check()

    @cached_property
    def documents(self) -> CompanionFiles:
        """What a directory for Hugging Face holds beside the weights."""
        model = self.model
        return CompanionFiles(model.checkpoint.path, model.config.raw, self.tokenizer, self.chat_template, model.tied)

    @cached_property
    def proof(self) -> dict[str, str]:
        """What every artifact says of its origin; where the hash of the base is not known yet, a place for it."""
        base_hash = self.hashing.promised or keys.HASH_PLACEHOLDER
        return metadata.provenance_keys(self.model, base_hash, self.hashing.adapter)

    @cached_property
    def general(self) -> dict[str, Value]:
        """The keys of every GGUF file."""
        stated = {**self.proof, keys.DATA_HASH: keys.HASH_PLACEHOLDER, **self.extra_metadata}
        return metadata.general_keys(self.model, self.name) | metadata.plain_keys(stated)

    def plan(self, type_name: str) -> StoragePlan:
        """The types of the tensors. Errors: RecipeError when too much would be in other types than asked for."""
        recipe, measured = recipes.recipe_named(type_name), self.importance is not None
        plan = recipes.plan_storage(recipe, self.model.tensor_facts, self.model.facts, self.overrides, measured)
        if not self.allow_fallback:
            recipes.check_fallback(plan, self.model.tensor_facts, self.model.facts, self.overrides, measured)
        return plan


class Format(NamedTuple):
    """What is said of a type and of a path that an output of this format cannot have, and how one is made."""

    check_type: Callable[[str], object]
    check_path: Callable[[Path], None]
    make: Callable[[Request, str, Path], Output]


def _gguf(request: Request, type_name: str, path: Path) -> Output:
    plan = request.plan(type_name)
    known = (
        request.general | metadata.size_keys(request.model, request.name) | metadata.hyperparameter_keys(request.model)
    )
    stated = known | request.vocabulary.now.metadata
    return GgufOutput(
        plan,
        request.model.tensors,
        path,
        stated,
        overrides=tuple(request.overrides.texts),
        importance=request.importance,
        measure_survival=request.measure_survival,
        split_max_size=request.split_max_size,
    )


def _safetensors(request: Request, type_name: str, path: Path) -> Output:
    if isinstance(request.model.checkpoint, GgufBase):
        raise RecipeError(
            f"{request.model.checkpoint.path} is a GGUF file: a safetensors directory cannot be made of it",
            "Give a model directory with --base",
        )
    kind = safetensors.check_type(type_name)
    return safetensors.SafetensorsOutput(
        path, kind, request.model.in_base_order, request.documents, request.max_shard_size
    )


def _lora(request: Request, type_name: str, path: Path) -> Output:
    factors = lora.lora_factors_of_model(request.model)
    return lora.LoraOutput(path, lora.check_type(type_name), factors, request.general)


def _onnx(request: Request, type_name: str, path: Path) -> Output:
    from edgetune_converters.onnx import model as onnx_model
    from edgetune_converters.onnx.plan import DEFAULT_SETTINGS, check_fallback, onnx_recipe
    from edgetune_converters.outputs.onnx import OnnxOutput

    model, documents = request.model, request.documents
    if documents.tokenizer.is_file():
        raise TokenizerError(
            f"{documents.tokenizer} is a GGUF file, which holds none of the tokenizer files of an ONNX folder",
            "Give a model directory with --base, or a run, or an adapter with its tokenizer beside it",
        )
    extra = {key: str(value) for key, value in request.extra_metadata.items()}
    ends = special_token_ids(documents.tokenizer, model.config.raw, documents.chat_template, model.config.vocab_size)
    found = onnx_model.source_tensors(model.tensors)
    decoder = onnx_model.describe_model(model.family, model.config, found)
    drawn = onnx_model.DecoderGraph.of(
        decoder, found, onnx_recipe(type_name), request.onnx_settings or DEFAULT_SETTINGS
    )
    if not request.allow_fallback:
        check_fallback(drawn.plan)
    return OnnxOutput(path, drawn, model.in_hf_row_order, documents, request.proof, ends, request.importance, extra)


def _check_onnx_type(name: str) -> object:
    from edgetune_converters.onnx.plan import onnx_recipe

    return onnx_recipe(name)


def _check_onnx_path(path: Path) -> None:
    from edgetune_converters.outputs.onnx import check_replaceable

    check_replaceable(path)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise EdgetuneError(f"{path} is a directory", "Give the path of the file to be written")


# onnx is imported where it is asked for: it takes longer to load than all of this package
FORMATS: Mapping[str, Format] = {
    "gguf": Format(recipes.recipe_named, _check_file, _gguf),
    "safetensors": Format(safetensors.check_type, safetensors.check_replaceable, _safetensors),
    "gguf-lora": Format(lora.check_type, _check_file, _lora),
    "onnx": Format(_check_onnx_type, _check_onnx_path, _onnx),
}

Wanted = Mapping[str, Mapping[str, Path]]  # format -> type -> where it is to be


def check(wanted: Wanted) -> None:
    """Errors: EdgetuneError for types and paths that no output can have."""
    asked = [(FORMATS[kind], type_, path) for kind, paths in wanted.items() for type_, path in paths.items()]
    if not asked:
        raise RecipeError("no storage type was given", f"Known: {', '.join(recipes.RECIPES)}")
    resolved = [path.resolve() for _, _, path in asked]
    for path in resolved:
        if resolved.count(path) > 1:
            raise EdgetuneError(f"two outputs would be written to {path}", "Give each type its own path")
    for format_, type_, path in asked:
        format_.check_path(path)
        format_.check_type(type_)


def make(wanted: Wanted, request: Request) -> list[Output]:
    """The outputs, nothing of them written yet."""
    return [FORMATS[kind].make(request, type_, path) for kind, paths in wanted.items() for type_, path in paths.items()]
