"""A GGUF file as the base: its config, tensors and vocabulary read back, weights dequantized row by row.

What is read back is verified first: the family's table must reproduce the file's metadata from the config, and every
tensor of the file must have a slot. What cannot be inverted is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune_converters.architectures import ModelConfig
from edgetune_converters.errors import ArtifactError, CheckpointError, TokenizerError
from edgetune_converters.gguf import keys
from edgetune_converters.gguf.joined import read_joined
from edgetune_converters.gguf.values import (
    Plain,
    Value,
    ValueKind,
    booleans,
    f32s,
    i32s,
    string,
    strings,
    u32,
    value_of,
)
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.reading.gguf_config import HINT, config_of
from edgetune_converters.reading.gguf_tensors import GgufTensors
from edgetune_converters.tensors import ALL, F32, RowIndex, TensorInfo
from edgetune_converters.tokenizers.convert import Vocabulary

_TEMPLATE = "tokenizer.chat_template"
_CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
_OURS = (keys.NORMALIZER, keys.SPACE, keys.LSTRIP, keys.RSTRIP, keys.STOPS)


def open_base(path: Path) -> Checkpoint:
    """Open a model directory, or a GGUF file (by its suffix). Raises CheckpointError."""
    return GgufBase(path) if is_gguf(path) else Checkpoint(path)


def is_gguf(path: Path) -> bool:
    """Whether a path is that of an existing file with the suffix of GGUF."""
    return path.suffix.lower() == ".gguf" and path.is_file()


class GgufBase(Checkpoint):
    """A GGUF file, or the first of several parts, read as a Hugging Face checkpoint.

    Raises CheckpointError when it is damaged, of an unknown architecture, or cannot be read back.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = read_joined(path)
        except ArtifactError as error:
            raise CheckpointError(error.message, error.hint) from error
        self.config, family = config_of(self.file)
        self.family = family
        read_back = GgufTensors(self.file, family, ModelConfig(self.config).completed(family.defaults))
        if read_back.problems:
            raise CheckpointError.of_many(f"tensors of {path} that cannot be read back", read_back.problems, HINT)
        self._files, self._substitutes = {}, {}
        self._decoders = {**read_back.found}
        self._assembled = read_back.found
        self.tensors = {name: tensor.info for name, tensor in read_back.found.items()}
        self.carried = read_back.carried
        self.zero_biases = set()
        self.notes, self.wrappers, self.has_outdated_quantization = [], (), False

    @property
    def is_packed(self) -> bool:
        """Whether transformers needs the weights dequantized: always."""
        return True

    def rows(self, tensor: str | TensorInfo, rows: RowIndex, columns: RowIndex = ALL) -> F32:
        """Return rows of a tensor as a fresh f32 array [n, columns]; a vector is one column."""
        name = tensor if isinstance(tensor, str) else tensor.name
        if name in self._substitutes:
            return super().rows(tensor, rows, columns)
        return self._assembled[name].read(rows, columns)

    def renumber(self, names: Callable[[str], Sequence[str]]) -> None:
        """Give each tensor the names that `names` returns for its own: several are copies."""
        super().renumber(names)
        self._assembled = {new: tensor for name, tensor in self._assembled.items() for new in names(name)}

    @property
    def identity_files(self) -> list[Path]:
        """The file, or all of its parts."""
        return [part.path for part in self.file.files]

    def vocabulary(self, chat_template: str | None, rows: int | None = None) -> Vocabulary:
        """Return the file's vocabulary for an embedding of `rows` rows (the file's own by default).

        Raises TokenizerError when it has none, or more tokens than rows.
        """
        metadata = self.file.metadata
        carried = typed_vocabulary(metadata)
        tokens, own = metadata.get("tokenizer.ggml.tokens"), self.config["vocab_size"]
        rows = rows or own
        if not isinstance(tokens, list) or len(tokens) != own or own > rows:
            count = len(tokens) if isinstance(tokens, list) else "no"
            raise TokenizerError(f"{self.path} holds {count} tokens for an embedding of {rows} rows", HINT)
        carried |= _padding(metadata, own, rows)
        if chat_template is not None:
            carried[_TEMPLATE] = string(chat_template)
        model, pre = (str(metadata.get(f"tokenizer.ggml.{key}", "default")) for key in ("model", "pre"))
        return Vocabulary(model, pre, rows, carried)


_UNUSED = 5  # the type of a row without a token
_PADDING_SCORE = -10000.0


def _padding(metadata: Mapping[str, Any], count: int, rows: int) -> dict[str, Value]:
    """The keys that have an entry for each token, with entries for the rows that have none."""
    if count == rows:
        return {}
    tokens = metadata["tokenizer.ggml.tokens"]
    types, scores = (metadata.get(f"tokenizer.ggml.{key}") for key in ("token_type", "scores"))
    found = {"tokenizer.ggml.tokens": strings([*tokens, *(f"[PAD{number}]" for number in range(count, rows))])}
    if isinstance(types, list):
        found["tokenizer.ggml.token_type"] = i32s([*types, *[_UNUSED] * (rows - count)])
    if isinstance(scores, list):
        found["tokenizer.ggml.scores"] = f32s([*scores, *[_PADDING_SCORE] * (rows - count)])
    return found


# -- metadata that is carried over -------------------------------------------------------------------------------------


def typed_vocabulary(metadata: Mapping[str, Plain]) -> dict[str, Value]:
    """Return the keys that a vocabulary consists of, with the GGUF types that llama.cpp reads them in."""
    chosen = {key: value for key, value in metadata.items() if key.startswith("tokenizer.") or key in _OURS}
    return {key: _bytes(value) if key == _CHARSMAP else _typed(value) for key, value in chosen.items()}


def _bytes(value: Plain) -> Value:
    """Bytes, which some writers type as signed. Anything else is refused by llama.cpp, and is carried as it is."""
    listed = value if isinstance(value, list) else []
    numbers = [each & 255 for each in listed if type(each) is int and -128 <= each < 256]
    return Value(ValueKind.ARRAY, numbers, ValueKind.U8) if numbers and len(numbers) == len(listed) else _typed(value)


def _typed(value: Plain) -> Value:
    if isinstance(value, list):
        return _array(value)
    if type(value) is int and value >= 0:
        return u32(value)
    return value_of(value)


def _array(values: Sequence[Any]) -> Value:
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return booleans(values)
    if kinds == {int}:
        return i32s(values)
    return strings(values) if kinds <= {str} else f32s(values)
