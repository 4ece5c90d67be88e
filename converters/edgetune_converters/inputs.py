"""The opened inputs of an export, from which the outputs of all formats are made."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetune_converters.adapters.soft_prompt import SoftPromptAdapter
from edgetune_converters.errors import AdapterError, TokenizerError
from edgetune_converters.files.companions import CompanionFiles
from edgetune_converters.files.contents import read_json
from edgetune_converters.gguf import keys
from edgetune_converters.gguf.values import Value
from edgetune_converters.merging import prefix_state
from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import Model, open_model
from edgetune_converters.provenance import metadata
from edgetune_converters.provenance.hashing import InputHasher
from edgetune_converters.quantization import recipes
from edgetune_converters.quantization.imatrix import ImportanceMatrix
from edgetune_converters.quantization.recipes import StoragePlan
from edgetune_converters.reading.gguf_base import GgufBase
from edgetune_converters.reading.gguf_companions import stated_config, write_stops_and_templates, write_tokenizer
from edgetune_converters.request import ExportRequest
from edgetune_converters.tokenizers import convert
from edgetune_converters.tokenizers.beside_adapter import TokenizerDirectory, combine, over_vocabulary
from edgetune_converters.tokenizers.chat_files import copied_template_files
from edgetune_converters.tokenizers.soft_tokens import SoftTokens, count_tokens, write_with_soft_tokens

_CHECKPOINT = re.compile(r"(checkpoint|epoch|step|iter)[-_]?\d+")


_GENERATION = "generation_config.json"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class VocabularyChanged(Exception):
    """The verification of the vocabulary found that another one must be written: the pass has to start again."""


class PendingVocabulary:
    """The vocabulary of a GGUF file, whose verification may still run in the background."""

    def __init__(self, likely: convert.Vocabulary, verified: Future[convert.Vocabulary] | None = None) -> None:
        self.current = likely
        self._verified = verified

    def check(self, *, wait: bool = False) -> None:
        """Poll the verification, or wait for it.

        Raises:
            TokenizerError: No vocabulary reproduces the token ids of the tokenizer.
            VocabularyChanged: `current` has been replaced.
        """
        if self._verified is None or not (wait or self._verified.done()):
            return
        before, self.current, self._verified = self.current, self._verified.result(), None
        if self.current.metadata != before.metadata:
            raise VocabularyChanged


@dataclass(frozen=True)
class TokenizerSource:
    """Where the tokenizer of an export comes from: the one place that chooses between base, adapter and request."""

    request: ExportRequest
    model: Model
    rebuilt: Path
    """A directory for files that are made of those of base and adapter."""

    @property
    def adapter(self) -> Path | None:
        """The directory of the adapter's files, where the request leaves the choice."""
        asked = self.request.tokenizer is not None
        return None if asked or self.model.adapter is None else self.model.adapter.path

    @property
    def training(self) -> Path | None:
        """The directory in which the training left tokenizer files, where the request leaves the choice."""
        return None if self.adapter is None else self._beside(self.adapter)[0].path

    @property
    def path(self) -> Path:
        """The directory of the tokenizer files, or the GGUF file that is the base. Raises TokenizerError."""
        return self._found[0] if self.soft_tokens is None else self._soft_directory

    @property
    def notes(self) -> list[str]:
        """Notes on what the files of base and adapter lack, and on which of them is taken. Raises TokenizerError."""
        soft = () if self.soft_tokens is None else self.soft_tokens.notes
        return [*self._found[1], *self._rows_without_tokens, *soft]

    @property
    def chat_template(self) -> str | None:
        """The chat template that replaces that of `path`."""
        return None if self.soft_tokens is not None else self.request.chat_template

    @property
    def _soft_directory(self) -> Path:
        return self.rebuilt / "soft"

    @cached_property
    def soft_tokens(self) -> SoftTokens | None:
        """The tokens of a soft prompt, whose files are written here; None without one. Raises TokenizerError."""
        soft = self.model.soft_prompt
        if soft is None:
            return None
        config, template = self.model.config, self.request.chat_template
        return write_with_soft_tokens(
            self._found[0], self._soft_directory, config.raw, config.vocab_size, soft.count, template
        )

    def count_tokens(self) -> int:
        """Return the number of tokens before any soft token. Raises TokenizerError."""
        if isinstance(self.model.checkpoint, GgufBase):
            raise TokenizerError(
                f"{self.request.base} is a GGUF file, to which a soft prompt cannot add tokens",
                "Give the model directory that it was made of with --base",
            )
        return count_tokens(self._found[0], self.model.config.raw, self.model.config.vocab_size)

    @cached_property
    def _found(self) -> tuple[Path, list[str]]:
        adapter, base = self.adapter, self.request.base
        if adapter is None:
            return self.request.tokenizer or base, []
        beside, notes = self._beside(adapter)
        adapter, checkpoint = beside.path, self.model.checkpoint
        folder = self.rebuilt / "tokenizer"
        if isinstance(checkpoint, GgufBase):
            if not beside.has_vocabulary:
                return base, notes
            base = self.rebuilt / "stated"
            write_stops_and_templates(checkpoint, base)
        return (base, []) if beside.is_empty else (folder, [*notes, *combine(base, adapter, folder)])

    def _beside(self, adapter: Path) -> tuple[TokenizerDirectory, list[str]]:
        """The tokenizer files of the training: beside the adapter, or beside the directory of its checkpoint."""
        beside = TokenizerDirectory(adapter)
        inside = self.request.adapter is not None and adapter.resolve() != self.request.adapter.resolve()
        if beside.is_empty and (inside or _CHECKPOINT.fullmatch(adapter.name)):
            above = TokenizerDirectory(adapter.parent)
            if not above.is_empty:
                return above, [f"the tokenizer files are those of {above.path}, beside the checkpoint {adapter.name}"]
        return beside, []

    @property
    def _rows_without_tokens(self) -> list[str]:
        """Note that an adapter with more rows of embeddings than the base brings no tokens for them."""
        resized = self.model.resized
        if self.model.adapter is None or resized is None or resized.rows <= resized.rows_before:
            return []
        if self._beside(self.model.adapter.path)[0].has_vocabulary:
            return []
        if self.request.tokenizer not in (None, self.request.base):
            return []
        return ["there is no tokenizer beside the adapter: the new rows of embeddings have no tokens"]

    def of_file(self) -> convert.Vocabulary | None:
        """Return the vocabulary of a GGUF base, None where the tokenizer is one of files. Raises TokenizerError."""
        checkpoint = self.model.checkpoint
        if not isinstance(checkpoint, GgufBase) or self.path != checkpoint.path:
            return None
        found = checkpoint.vocabulary(None, self.model.config.vocab_size)
        if self.adapter is not None:
            found = over_vocabulary(found, self._beside(self.adapter)[0].path)
        return found.with_template(self.chat_template)

    def conversion(self) -> convert.Conversion:
        """Convert the tokenizer of a directory. Raises TokenizerError."""
        config = self.model.config
        return convert.Conversion(self.path, config.vocab_size, config.raw, self.chat_template)


def open_request(request: ExportRequest, rebuilt: Path) -> Model:
    """Open base and adapter of a request; a soft prompt gets its place behind the tokens of the tokenizer.

    Args:
        request: The request.
        rebuilt: A directory for files that are made of those of base and adapter.

    Raises:
        EdgetuneError: Of the kind that names the part at fault.
    """
    merge_base = merge_base_named(request.merge_base, request.bnb_record, request.threads)
    model = open_model(request.base, request.adapter, merge_base, request.prompt_task, request.combination)
    model = replace(model, score_head=request.score_head)
    if not isinstance(model.adapter, SoftPromptAdapter):
        return model
    return model.with_soft_prompt(TokenizerSource(request, model, rebuilt).count_tokens())


@dataclass(frozen=True)
class ExportInputs:
    """The request with its model opened. The tokenizer is converted when the first output needs it."""

    request: ExportRequest
    model: Model
    importance: ImportanceMatrix | None
    hashing: InputHasher
    background: Executor
    rebuilt: Path
    """A directory for files beside the weights that are made of those of base and adapter."""

    @cached_property
    def tokenizer(self) -> TokenizerSource:
        """The source of the tokenizer."""
        return TokenizerSource(self.request, self.model, self.rebuilt)

    @cached_property
    def vocabulary(self) -> PendingVocabulary:
        """Convert the tokenizer of a directory, or take that of a GGUF base. Raises TokenizerError."""
        found = self.tokenizer.of_file()
        if found is not None:
            return PendingVocabulary(found)
        conversion = self.tokenizer.conversion()
        return PendingVocabulary(conversion.likely, self.background.submit(conversion.verified))

    def notes(self, format_: str) -> list[str]:
        """Return notes on what base, adapter and tokenizer have that is not used, or lack."""
        runnable = format_ in ("gguf", "onnx")
        of_tokenizer = [] if format_ == "gguf-lora" else self.tokenizer.notes
        return (
            self.model.input_notes + of_tokenizer + ([*self._sampling_notes, *self._prefix_notes] if runnable else [])
        )

    @property
    def _prefix_notes(self) -> list[str]:
        """Note that programs other than edgetune do not read a prefix."""
        adapter = self.model.prefix
        if adapter is None:
            return []
        return [
            f"the prefix of {adapter.count} keys and values lies beside the model (*{prefix_state.SUFFIX}): edgetune "
            "puts it before every text; other programs run the base alone, as if it had not been trained"
        ]

    @cached_property
    def _sampling_notes(self) -> list[str]:
        """The sampling settings of generation_config.json, which runtimes do not take from the file."""
        places = (self.tokenizer.path, self.model.checkpoint.path)
        stated = next((place / _GENERATION for place in places if (place / _GENERATION).is_file()), None)
        found = {} if stated is None else read_json(stated)
        settings = [f"{key} {found[key]:g}" for key in _SAMPLING if type(found.get(key)) in (int, float)]
        if not settings or found.get("do_sample") is False:
            return []
        return [f"{_GENERATION} asks for {', '.join(settings)}: runtimes take their own settings unless told"]

    def check(self, *, wait: bool = False) -> None:
        """Poll what is verified during the pass, or wait for it.

        Raises:
            AdapterError: The base is not the expected one.
            TokenizerError: The vocabulary cannot be verified.
            VocabularyChanged: The outputs have to be made again.
        """
        if "vocabulary" in self.__dict__:  # not every output needs it
            self.vocabulary.check(wait=wait)
        self.hashing.check()

    @cached_property
    def companions(self) -> CompanionFiles:
        """Return what a model directory holds besides the weights; of a GGUF base it is rebuilt."""
        model, template, tokenizer, notes = self.model, self.tokenizer.chat_template, self.tokenizer.path, list[str]()
        base, config = model.checkpoint.path, model.config_json
        if isinstance(model.checkpoint, GgufBase):
            base = self.rebuilt / "base"
            base.mkdir(exist_ok=True)
            config = {**stated_config(model.checkpoint), "vocab_size": config["vocab_size"]}
            notes = write_tokenizer(model.checkpoint, base)
            tokenizer = base if tokenizer == model.checkpoint.path else tokenizer
            if tokenizer == base and self.tokenizer.training is not None:
                tokenizer = self.rebuilt / "tokenizer"
                notes += combine(base, self.tokenizer.training, tokenizer)
        path = tokenizer / "tokenizer_config.json"
        stated = read_json(path) if path.is_file() else {}
        files = copied_template_files(tokenizer, stated, template)
        return CompanionFiles(base, config, tokenizer, template, model.tied, files, tuple(notes))

    @cached_property
    def provenance(self) -> dict[str, str]:
        """Return the metadata of provenance; the hash of the base is a placeholder while it is being computed."""
        base_hash = self.hashing.expected_base_hash or keys.HASH_PLACEHOLDER
        return metadata.provenance_keys(self.model, base_hash, self.hashing.adapter) | self._soft_prompt_key

    @cached_property
    def _prefixes(self) -> dict[str, bytes]:
        """The file of the prefix by format."""
        adapter = self.model.prefix
        if adapter is None:
            return {}
        return {
            format_: prefix_state.content(adapter, self.model.bound, format_) for format_ in prefix_state.FORMATS
        }  # fmt: skip

    def prefix(self, format_: str) -> bytes | None:
        """Return the file of a prefix that goes beside a model of a format; None without one.

        Raises:
            AdapterError: A prefix cannot lie beside a model of the format.
        """
        model = self.model
        if model.prefix is None:
            return None
        if why := prefix_state.why_not_beside(format_, model.family, model.config):
            others = [
                each
                for each in prefix_state.FORMATS
                if prefix_state.why_not_beside(each, model.family, model.config) is None
            ]
            raise AdapterError(why, f"Export {' or '.join(others)}; transformers loads the adapter itself, with PEFT")
        return self._prefixes.get(format_)

    def prefix_key(self, format_: str) -> dict[str, str]:
        """Return the metadata by which edgetune's runtimes find a prefix. Raises AdapterError as `prefix`."""
        found, adapter = self.prefix(format_), self.model.prefix
        if found is None or adapter is None:
            return {}
        return {keys.PREFIX_STATE: json.dumps({"tokens": adapter.count, "sha256": hashlib.sha256(found).hexdigest()})}

    @property
    def _soft_prompt_key(self) -> dict[str, str]:
        """The key by which edgetune's runtimes find a soft prompt."""
        soft, tokens = self.model.soft_prompt, self.tokenizer.soft_tokens
        if soft is None or tokens is None:
            return {}
        found: dict[str, Any] = {
            "first": soft.first,
            "count": soft.count,
            "added": soft.added,
            "adds_bos": tokens.adds_bos,
        }
        found |= {"with_bos": tokens.with_bos} if tokens.with_bos else {}
        return {keys.SOFT_PROMPT: json.dumps(found)}

    @cached_property
    def general(self) -> dict[str, Value]:
        """Return the metadata of every GGUF file."""
        found = {**self.provenance, keys.DATA_HASH: keys.HASH_PLACEHOLDER, **self.request.metadata}
        found |= {} if self.model.score_head is None else {keys.SCORE_HEAD: self.model.score_head.text}
        return metadata.general_keys(self.model, self.request.name) | metadata.plain_keys(found)

    def plan(self, type_name: str) -> StoragePlan:
        """Plan a GGUF file. Raises RecipeError if too many bytes would get another type than the recipe's."""
        recipe, overrides = recipes.recipe_named(type_name), self.request.overrides
        measured = self.importance is not None
        plan = recipes.plan_storage(recipe, self.model.tensor_facts, self.model.facts, overrides, measured)
        if not self.request.allow_fallback:
            recipes.check_fallback(plan, self.model.tensor_facts, self.model.facts, overrides, measured)
        return plan
