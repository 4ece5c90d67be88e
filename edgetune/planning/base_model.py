"""The base model: found on this machine or the hub, and checked, before torch is imported."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune import console
from edgetune.config import Config
from edgetune.errors import DataError, EnvironmentProblem
from edgetune.methods import TrainableTokens
from edgetune.planning.new_tokens import write_with_tokens
from edgetune.planning.other_tokenizer import write_with_tokenizer
from edgetune_converters.architectures import Family, ModelConfig, completed_config, targets
from edgetune_converters.architectures.new_biases import why_no_bias
from edgetune_converters.errors import ArchitectureError, CheckpointError
from edgetune_converters.files.contents import read_json
from edgetune_converters.merging.expanded_blocks import why_not_expanded
from edgetune_converters.names import ORIGINAL
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.reading.gguf_base import GgufBase, is_gguf, open_base
from edgetune_converters.reading.gguf_companions import write_companions

if TYPE_CHECKING:
    from edgetune_converters.model import Model

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_REST = ["*.json", "*.jinja", "tokenizer.model", "merges.txt"]
_CODE = ["*.py"]
_ALIBI = "attention.max_alibi_bias"


@dataclass(frozen=True)
class ExportableLayers:
    """The layers of a base that adapters may change."""

    family: Family
    targets: frozenset[str]
    """Names of the tensors that are exported, as the family spells them."""
    towers: Sequence[str]
    """Tensors of a multimodal model beside its text part."""
    without_lora_place: Mapping[str, str] = field(default_factory=dict)
    """Targets of which a gguf-lora file can hold no change, and why."""
    config: ModelConfig | None = None
    """config.json, completed."""
    slots: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Names of tensors, as the family spells them -> the slots of the architecture table that they fill."""
    directory: Path | None = None
    """The directory of the tokenizer."""

    def why_not_lora(self, tensor: str) -> str | None:
        """Return why a gguf-lora file cannot hold the change of a tensor; None if it can."""
        return self.without_lora_place.get(self.family.canonical_name(tensor))

    def slots_of(self, tensor: str) -> frozenset[str]:
        """Return the slots that a tensor of the transformers model fills, none for one that is not exported."""
        return self.slots.get(self.family.canonical_name(tensor), frozenset())

    def has(self, tensor: str) -> bool:
        """Whether a tensor of the transformers model is exported."""
        return self.family.canonical_name(tensor) in self.targets

    def token_ids(self, tokens: Sequence[str]) -> dict[str, int | None]:
        """Return the id of each token, None for one that the tokenizer does not have."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str((self.directory or Path()) / "tokenizer.json"))
        return {token: tokenizer.token_to_id(token) for token in tokens}

    def is_beside_text(self, tensor: str) -> bool:
        """Whether a tensor belongs to a part of a multimodal model that texts do not pass through."""
        return self.family.is_beside_text(tensor)

    def why_no_bias(self, module: str, formats: Sequence[str]) -> str | None:
        """Return why one of `formats` cannot hold a new bias of a module; None if all can."""
        reasons = (why_no_bias(self.family, module, format_) for format_ in formats)
        return next((reason for reason in reasons if reason), None)

    def why_not_expanded(self, sources: Sequence[int]) -> str | None:
        """Return why the base cannot have the blocks `sources` (numbers of its own); None if it can."""
        return None if self.config is None else why_not_expanded(self.family, self.config, sources)

    @property
    def excluded(self) -> str | None:
        """The pattern of the layers that are not adapted, None if there are none."""
        return "|".join(f"(?:{pattern})" for pattern in self.family.towers) if self.towers else None

    @property
    def notes(self) -> list[str]:
        """What is not adapted, in words."""
        parts = dict.fromkeys(name.removeprefix("model.").partition(".")[0] for name in self.towers)
        return [f"only the text part is adapted; {' and '.join(parts)} stay as they are"] if parts else []


@dataclass(frozen=True)
class ContextLimit:
    """The number of tokens that a base was made for."""

    tokens: int
    is_fixed: bool
    """Whether the model cannot compute at all beyond them: it has an embedding, or a fixed bias, for each position."""
    virtual: int = 0
    """Virtual tokens before every text, which are no part of `tokens`."""

    def __str__(self) -> str:
        if not self.virtual:
            return str(self.tokens)
        return f"{self.tokens + self.virtual}, of which adapter.tokens takes {self.virtual}"


@dataclass(frozen=True)
class Base:
    """The model to fine-tune: a local directory, or a GGUF file."""

    name: str
    """Its name in the configuration."""
    path: Path
    revision: str | None
    """The commit on the hub, None for a local directory."""
    new_tokens: tuple[str, ...] = ()
    """Tokens that its tokenizer gets for the training."""
    new_special_tokens: tuple[str, ...] = ()
    """The same, special ones."""
    tokenizer: Path | None = None
    """A directory whose tokenizer files take the place of its own."""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its tensors, checked. Raises CheckpointError for missing, damaged or pickled weights."""
        return open_base(self.path)

    @property
    def directory(self) -> Path:
        """The directory with config.json and the tokenizer, with new tokens if there are any.

        Of a GGUF file or with new tokens, one written for this process. Raises CheckpointError or TokenizerError for a
        GGUF file of which it cannot be rebuilt, ConfigError for new tokens that the base has.
        """
        return self._with_tokens if self.added_tokens else self.own_directory

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The tokens that its tokenizer gets for the training, in the order of their ids."""
        return (*self.new_tokens, *self.new_special_tokens)

    @property
    def own_directory(self) -> Path:
        """The same without new tokens."""
        return self._stored_directory if self.tokenizer is None else self._with_tokenizer[0]

    @property
    def _stored_directory(self) -> Path:
        return self._rebuilt[0] if is_gguf(self.path) else self.path

    @cached_property
    def _with_tokenizer(self) -> tuple[Path, list[str]]:
        """The directory with the files of another tokenizer, removed with this object, and remarks."""
        assert self.tokenizer is not None
        folder = self._temporary_directory()
        return folder, write_with_tokenizer(self._stored_directory, self.tokenizer, folder)

    @cached_property
    def _with_tokens(self) -> Path:
        folder = self._temporary_directory()
        write_with_tokens(self.own_directory, folder, self.new_tokens, self.new_special_tokens)
        return folder

    def _temporary_directory(self) -> Path:
        """Return a directory that is removed with this object."""
        folder = Path(tempfile.mkdtemp(prefix="edgetune-base-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    @property
    def notes(self) -> list[str]:
        """Remarks on what the base has that is not used, and on how it is used."""
        rebuilt = self._rebuilt[1] if is_gguf(self.path) else []
        return [*self.checkpoint.notes, *rebuilt, *(self._with_tokenizer[1] if self.tokenizer else [])]

    @cached_property
    def _rebuilt(self) -> tuple[Path, list[str]]:
        """The directory with the files that are rebuilt from a GGUF file, removed with this object, and remarks."""
        assert isinstance(self.checkpoint, GgufBase)
        folder = self._temporary_directory()
        return folder, write_companions(self.checkpoint, folder)

    @cached_property
    def rows(self) -> int | None:
        """The number of rows of its embedding; None if config.json does not give it."""
        try:
            return completed_config(read_json(self.directory / "config.json")).vocab_size
        except (ArchitectureError, CheckpointError):
            return None

    @cached_property
    def _model(self) -> Model:
        from edgetune_converters.merging.merge_base import merge_base_named
        from edgetune_converters.model import open_model

        return open_model(self.path, None, merge_base_named(ORIGINAL))

    @cached_property
    def layers(self) -> ExportableLayers:
        """Its layers that can be exported. Raises EdgetuneError of the part at fault."""
        from edgetune_converters.outputs.lora import targets_without_place

        model = self._model
        towers = [each.name for each in model.towers]
        without = targets_without_place(model.bound)
        slots: dict[str, set[str]] = {}
        for item in model.bound:
            for piece in item.pieces:
                slots.setdefault(piece.target, set()).add(item.slot)
        by_target = {target: frozenset(found) for target, found in slots.items()}
        return ExportableLayers(
            model.family, frozenset(targets(model.bound)), towers, without, model.config, by_target, self.directory
        )

    @cached_property
    def context(self) -> ContextLimit | None:
        """Its context, None if its files do not tell. Raises EdgetuneError of the part at fault."""
        model = self._model
        stated = {key: value.data for key, make in model.family.metadata if (value := make(model.config)) is not None}
        length = stated.get("context_length")
        learned = any(tensor.slot == "position_embedding" for tensor in model.tensors)
        return ContextLimit(length, learned or _ALIBI in stated) if isinstance(length, int) else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The `base` entry of the manifest: name, path, revision, and the SHA-256 of config.json and the weights.

        Reads all weights once.
        """
        files = self.checkpoint.identity()
        return {"name": self.name, "path": str(self.path), "revision": self.revision, "files": files}


def find_base(config: Config, *, weights: bool = True) -> Base:
    """Find the local directory or GGUF file that `config.base` names, or download a snapshot from the hub.

    Args:
        config: `base`, `revision` and `trust_remote_code` are used.
        weights: If false, fetch and check only tokenizer and configuration.

    Raises:
        CheckpointError: If there is no such model, or if its weights are already quantized.
    """
    path = Path(config.base).expanduser()
    if is_gguf(path):
        base = Base(config.base, path.absolute(), None)  # the target of a link may have another suffix
    elif path.exists() or config.base.startswith((".", "/", "~")):
        base = Base(config.base, path.resolve(), None)
    elif _HUB_NAME.fullmatch(config.base):
        base = _download(config, weights)
    else:
        raise CheckpointError(
            f"base: {config.base!r} is neither a directory or GGUF file nor the name of a model on the hub",
            "Set base: DIR, base: FILE.gguf or base: ORG/NAME",
        )
    if config.tokenizer is not None:
        base = replace(base, tokenizer=Path(config.tokenizer))
    if isinstance(config.adapter, TrainableTokens) and config.adapter.added:
        new = config.adapter
        base = replace(base, new_tokens=tuple(new.new_tokens), new_special_tokens=tuple(new.new_special_tokens))
    if weights and base.checkpoint.is_quantized and not base.checkpoint.is_packed:
        raise CheckpointError(
            f"the base {base.name} is already quantized; training quantizes the original weights itself",
            "Give the 16-bit or 32-bit model that it was made from, or dequantize this one first: "
            f"edgetune merge-export --base {base.name} --format safetensors -o DIR, then base: DIR",
        )
    if weights and base.checkpoint.lacks_index:
        raise CheckpointError(
            f"the base {base.name} has shards and no model.safetensors.index.json: transformers would not load it",
            "Fetch the index, or write the model again: edgetune merge-export --base DIR --format safetensors",
        )
    if weights and base.checkpoint.wrappers:
        raise CheckpointError(
            f"tensor names of the base {base.name} carry {' and '.join(base.checkpoint.wrappers)}, the name of a "
            "wrapper: transformers would load none of them",
            "Write it again under its own names: edgetune merge-export --base DIR --format safetensors",
        )
    return base


def _download(config: Config, weights: bool) -> Base:
    from huggingface_hub import snapshot_download

    patterns = [*(_WEIGHTS if weights else []), *_REST, *(_CODE if config.trust_remote_code else [])]
    try:
        folder = snapshot_download(config.base, revision=config.revision, allow_patterns=patterns)
    except Exception as error:  # noqa: BLE001 - the many errors of the hub need the same answer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"base: {config.base!r} is neither a directory here nor a model that can be fetched from the hub: {reason}",
            "Check the path, the name, the revision and the network (private models need `hf auth login`)",
        ) from None
    path = Path(folder)
    revision = path.name if _COMMIT.fullmatch(path.name) else config.revision
    console.note(f"base {config.base}, revision {revision}")
    return Base(config.base, path, revision)


def base_loading_error(name: str, error: Exception) -> Exception:
    """Return the error for a base that transformers cannot load, or only by running Python code of the base."""
    if "trust_remote_code" in str(error):
        return EnvironmentProblem(
            f"the base {name} needs Python code that comes with it, which is not run by default",
            "Read that code and set trust_remote_code: true, or use another base",
        )
    return DataError(f"the base {name} cannot be loaded: {str(error).strip().splitlines()[0]}", "Check its config.json")
