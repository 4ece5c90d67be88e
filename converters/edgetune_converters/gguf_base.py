"""A GGUF file as the base: its config, tensors and vocabulary read back, weights dequantized row by row.

What is read back is proven before it is used: the family's table must make of the config the very metadata that the
file has, and every tensor of the file must have its place. What cannot be undone (experts in one tensor, fused or
turned matrices, keys without a field) is refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.architectures import FAMILIES, Family, ModelConfig, slots
from edgetune_converters.architectures.operations import View
from edgetune_converters.architectures.table import TensorRow
from edgetune_converters.checkpoint import F32, Checkpoint, TensorInfo, sha256_of
from edgetune_converters.errors import ArchitectureError, ArtifactError, CheckpointError, TokenizerError
from edgetune_converters.gguf import GgufFile, TensorEntry, keys, read
from edgetune_converters.gguf.values import Plain, Value, as_read, booleans, f32s, i32s, of_plain, string, strings, u32
from edgetune_converters.tokenizers import Vocabulary

_HINT = "Give the Hugging Face model that the file was made from"
_TEMPLATE = "tokenizer.chat_template"
_OURS = (keys.NORMALIZER, keys.SPACE, keys.LSTRIP, keys.RSTRIP)

# key of the file, without the architecture -> field of config.json
_FIELDS: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "use_parallel_residual": "use_parallel_residual",
}
_ROPE_FIELDS: Mapping[str, str] = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# how the table refuses values that make no sense, or not without others
_UNREADABLE = (ArchitectureError, TypeError, ValueError, ArithmeticError, AttributeError, struct.error)
_TOKEN_FIELDS = {"tokenizer.ggml.bos_token_id": "bos_token_id", "tokenizer.ggml.eos_token_id": "eos_token_id"}


def open_base(path: Path) -> Checkpoint:
    """A model directory, or a GGUF file by its ending. Errors: CheckpointError."""
    return GgufBase(path) if path.suffix.lower() == ".gguf" and path.is_file() else Checkpoint(path)


class GgufBase(Checkpoint):
    """A GGUF file seen as a Hugging Face checkpoint.

    Errors: CheckpointError when it is damaged, split, of an unknown architecture, or holds what cannot be read back.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = read(path)
        except ArtifactError as error:
            raise CheckpointError(error.message, error.hint) from error
        if self.file.metadata.get("split.count", 1) not in (0, 1):
            raise CheckpointError(f"{path} is one part of a split file", "Join the parts with llama-gguf-split --merge")
        self.config, family = _config(self.file)
        found = _Tensors(self.file, family, ModelConfig(self.config).completed(family.defaults))
        self._files = {}
        self._decoders = {tensor.info.name: tensor for tensor in found.tensors}
        self.tensors = {name: decoder.info for name, decoder in self._decoders.items()}
        self.carried = found.carried

    def identity(self) -> dict[str, str]:
        """SHA-256 of the file, by its name."""
        return {self.path.name: sha256_of(self.path)}

    def vocabulary(self, chat_template: str | None) -> Vocabulary:
        """The tokenizer as the file has it. Errors: TokenizerError when it has none."""
        metadata = self.file.metadata
        carried = {
            key: _typed(value) for key, value in metadata.items() if key.startswith("tokenizer.") or key in _OURS
        }
        tokens, rows = metadata.get("tokenizer.ggml.tokens"), self.config["vocab_size"]
        if not isinstance(tokens, list) or len(tokens) != rows:
            count = len(tokens) if isinstance(tokens, list) else "no"
            raise TokenizerError(f"{self.path} holds {count} tokens for an embedding of {rows} rows", _HINT)
        if chat_template is not None:
            carried[_TEMPLATE] = string(chat_template)
        model, pre = (str(metadata.get(f"tokenizer.ggml.{key}", "default")) for key in ("model", "pre"))
        return Vocabulary(model, pre, rows, carried)


# -- config ------------------------------------------------------------------------------------------------------------


def _config(file: GgufFile) -> tuple[dict[str, Any], Family]:
    """A config.json that gives the metadata of the file, and the family that it is of."""
    arch = file.metadata.get("general.architecture")
    families = [family for family in FAMILIES if family.gguf == arch]
    if not families:
        raise CheckpointError(f"{file.path} is of the architecture {arch!r}, which is not known here", _HINT)
    own = {key.removeprefix(f"{arch}."): value for key, value in file.metadata.items() if key.startswith(f"{arch}.")}
    plain = _plain_config(file, own)
    reasons = []
    for family in families:
        config = plain | {"architectures": [family.hf[0]]}
        problems = list(_unlike(family, ModelConfig(config).completed(family.defaults), own))
        if not problems:
            return config, family
        reasons.append(problems)
    raise CheckpointError.of_many(f"keys of {file.path} that cannot be read back", min(reasons, key=len), _HINT)


def _plain_config(file: GgufFile, own: Mapping[str, Plain]) -> dict[str, Any]:
    """The fields of config.json that stand in the metadata."""
    names = {entry.name: entry for entry in file.tensors}
    config: dict[str, Any] = {field: own[key] for key, field in _FIELDS.items() if key in own}
    config |= {field: file.metadata[key] for key, field in _TOKEN_FIELDS.items() if key in file.metadata}
    rope = {field: own[key] for key, field in _ROPE_FIELDS.items() if key in own}
    # readers assume so where the file does not say
    config["rope_parameters"] = rope | {"rope_theta": own.get("rope.freq_base", 10000.0)}
    config.setdefault("num_key_value_heads", own.get("attention.head_count"))
    config |= _derived(own)
    embedding = names.get("token_embd.weight")
    config["vocab_size"] = own.get("vocab_size", embedding.shape[0] if embedding else None)
    config["tie_word_embeddings"] = "output.weight" not in names
    config["_name_or_path"] = file.metadata.get("general.name")
    return config


def _derived(own: Mapping[str, Plain]) -> dict[str, Any]:
    """Fields that are not simply a key."""
    found: dict[str, Any] = {}
    if "logit_scale" in own:
        found |= {"logit_scale": own["logit_scale"], "logits_scaling": own["logit_scale"]}
    pattern = own.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        found["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    rotated, width = own.get("rope.dimension_count"), own.get("attention.key_length")
    if type(rotated) is int and type(width) is int and 0 < rotated < width:
        found["partial_rotary_factor"] = rotated / width
    return found


def _unlike(family: Family, config: ModelConfig, own: Mapping[str, Plain]) -> Iterator[str]:
    """What the table makes of the config otherwise than the file has it; keys that are not written say nothing new."""
    made: dict[str, Plain] = {}
    for key, make in family.metadata:
        try:
            written = make(config)
            if written is not None:
                made[key] = as_read(written)
        except _UNREADABLE as error:
            yield f"{family.gguf}.{key}: {error}"
    for row in family.generated:
        try:
            row.compute(config)
        except _UNREADABLE as error:
            yield f"{slots.gguf_name(row.slot, None, 'weight')}: {error}"
    for key, value in own.items():
        single = value[0] if isinstance(value, list) and len(value) == 1 else value
        if key in made and made[key] not in (value, single):
            yield f"{family.gguf}.{key} is {value!r}, read back as {made[key]!r}"
        elif key not in made:
            yield f"{family.gguf}.{key} is {value!r}, for which there is no field"


# -- tensors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file in the order of rows that Hugging Face has."""

    info: TensorInfo
    stored: NDArray[np.uint8]
    type: str
    order: NDArray[np.intp] | None
    add: float
    parts: tuple[str, ...] = ()

    def rows(self, first: int, last: int) -> F32:
        """Rows first..last in f32; a vector is a column."""
        if len(self.info.shape) == 1:
            column = self._decoded(self.stored).reshape(-1, 1)
            return (column if self.order is None else column[self.order])[first:last] - np.float32(self.add)
        stored = self.stored[first:last] if self.order is None else self.stored[self.order[first:last]]
        return self._decoded(stored) - np.float32(self.add)

    def _decoded(self, stored: NDArray[np.uint8]) -> F32:
        rows = np.ascontiguousarray(stored)
        decoded: F32 = edgetune_native.dequantize(rows, self.type, self.info.shape[-1])
        return decoded


class _Tensors:
    """All tensors of a file under the names that the family's checkpoints have.

    `carried` are those that a config would give, if the file still had one: factors of RoPE, by slot.
    """

    def __init__(self, file: GgufFile, family: Family, config: ModelConfig) -> None:
        self._file = file
        self._config = config
        self._entries = {entry.name: entry for entry in file.tensors}
        self.tensors: list[_Tensor] = []
        self.carried: list[tuple[str, F32]] = []
        problems = [text for row in family.tensors for text in self._row(row)]
        self._carry([row.slot for row in family.generated])
        problems += [f"{name} has no place in the {family.name} family" for name in sorted(self._entries)]
        if problems:
            raise CheckpointError.of_many(f"tensors of {file.path} that cannot be read back", problems, _HINT)

    def _row(self, row: TensorRow) -> Iterator[str]:
        """Take the tensors of a row, or say which cannot be taken."""
        layers = range(self._config.layers) if "{layer}" in row.module else [None]
        for layer in layers:
            if not row.when(self._config, layer or 0):
                continue
            names = {"bias": row.bias_name, row.part: row.weight} if row.bias else {row.part: row.weight}
            for part, ending in names.items():
                entry = self._entries.pop(slots.gguf_name(row.slot, layer, part), None)
                if entry is None:
                    continue  # what is missing is said when the tensors are matched
                views = row.views(self._config)
                if row.stacked or len(views) != 1 or views[0].turn:
                    yield f"{entry.name} holds what checkpoints store otherwise, fused, turned or one by one"
                else:
                    yield from self._add(entry, row.module.format(layer=layer, n=0) + ending, views[0])

    def _add(self, entry: TensorEntry, name: str, view: View) -> Iterator[str]:
        rows = math.prod(entry.shape[:-1]) if len(entry.shape) > 1 else entry.shape[0]
        if text := view.problem(rows, entry.shape[-1]):
            yield f"{entry.name}: {text}"
            return
        order = _inverse(view, rows) if view.steps else None
        info = TensorInfo(name, entry.type.upper(), entry.shape, self._file.path, entry.offset, entry.bytes)
        tensor = _Tensor(info, self._file.tensor(entry.name), entry.type, order, view.add)
        try:
            tensor.rows(0, 1)
        except (ValueError, TypeError, IndexError) as error:
            yield f"{entry.name} cannot be dequantized: {error}"
        self.tensors.append(tensor)

    def _carry(self, wanted: Sequence[str]) -> None:
        for slot in wanted:
            entry = self._entries.get(name := slots.gguf_name(slot, None, "weight"))
            if entry is not None and entry.type == "f32" and len(entry.shape) == 1:
                self.carried.append((slot, self._file.tensor(name).view(np.float32).reshape(-1).copy()))
                del self._entries[name]


def _inverse(view: View, rows: int) -> NDArray[np.intp]:
    """Which row of the file is which row of the checkpoint; the steps of a single view only permute."""
    source: NDArray[np.intp] = np.arange(rows)
    for step in reversed(view.steps):
        source = step.source(source)
    return np.argsort(source)


# -- metadata that is carried over -------------------------------------------------------------------------------------


def _typed(value: Plain) -> Value:
    """A value of the tokenizer with the type that such values have."""
    if isinstance(value, list):
        return _array(value)
    if type(value) is int and value >= 0:
        return u32(value)
    return of_plain(value)


def _array(values: Sequence[Any]) -> Value:
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return booleans(values)
    if kinds == {int}:
        return i32s(values)
    return strings(values) if kinds <= {str} else f32s(values)
