"""Tokenize with the tokenizer files of an ONNX folder, with the same results as llama.cpp's vocabulary."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError, RuntimeProblem
from edgetune_converters.errors import TokenizerError
from edgetune_converters.tokenizers.beyond import tokens_beyond, without_tokens_beyond
from edgetune_converters.tokenizers.vocabulary import MARK, byte_value, looks_special


class OnnxVocabulary:
    """tokenizer.json, with the special tokens of the tokenizer's other files."""

    def __init__(self, directory: Path, size: int) -> None:
        """Open the tokenizer of a model with `size` logits. Raises RuntimeProblem if it does not belong to it."""
        try:
            self._tokenizer = _without_tokens_beyond(TextTokenizer.from_directory(directory), directory, size)
        except DataError as error:
            raise RuntimeProblem(error.message, "Put the tokenizer of the model into its folder") from None
        except TokenizerError as error:
            raise RuntimeProblem(error.message, "Put the tokenizer that belongs to the model into its folder") from None
        self.size = size
        self._added = self._tokenizer.backend.get_added_tokens_decoder()
        self._pieces = _Pieces(_decoders(self._tokenizer.backend))
        self.bos = self._tokenizer.bos_id
        self.stop_tokens = self._tokenizer.stop_ids

    def add_bos(self, *, adds: bool) -> None:
        """State whether a text begins with BOS, whatever the tokenizer's files say."""
        self._tokenizer = replace(self._tokenizer, declares_bos=adds)

    def tokenize(self, text: str) -> list[int]:
        """Return token ids as in training: BOS is added once if the model wants it, and not doubled."""
        whole = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        return self._tokenizer.encode(whole)[0]

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of a token, none for an unused id. Raises ValueError for an id outside the vocabulary."""
        if not 0 <= token < self.size:
            raise ValueError(f"{token} is not a token id; the vocabulary has {self.size}")
        added = self._added.get(token)
        if added is not None:
            if added.special or looks_special(added.content):
                return added.content.encode() if special else b""
            return self._pieces.decode_added(added.content)
        text = self._tokenizer.backend.id_to_token(token)
        return b"" if text is None else self._pieces.decode(text)


def _without_tokens_beyond(tokenizer: TextTokenizer, directory: Path, size: int) -> TextTokenizer:
    """Leave out added tokens that have no logit, as in a GGUF file. Raises TokenizerError."""
    added = tokenizer.backend.get_added_tokens_decoder()
    if max(tokenizer.backend.get_vocab_size() - 1, *added) < size:
        return tokenizer
    stated = json.loads(tokenizer.backend.to_str())
    by_number = {number: {"content": token.content} for number, token in added.items()}
    beyond = tokens_beyond(directory, stated["model"], by_number, size)
    return replace(tokenizer, backend=Tokenizer.from_str(json.dumps(without_tokens_beyond(stated, beyond))))


class _Pieces:
    """The decoders of tokenizer.json: from the spelling of a token in the vocabulary to its bytes."""

    def __init__(self, decoders: list[dict[str, Any]]) -> None:
        kinds = {decoder.get("type") for decoder in decoders}
        self._is_byte_level = "ByteLevel" in kinds
        self._has_bytes = "ByteFallback" in kinds
        self._replaced = [pair for decoder in decoders if (pair := _replacement(decoder))]

    def decode(self, text: str) -> bytes:
        if self._is_byte_level:
            alphabet = _byte_alphabet()
            return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in text)
        value = byte_value(text) if self._has_bytes else None
        return self.decode_added(text) if value is None else bytes([value])

    def decode_added(self, text: str) -> bytes:
        """Return the bytes of an added token: plain text, except for SentencePiece's spaces (as in Gemma)."""
        for old, new in self._replaced:
            text = text.replace(old, new)
        return text.encode()


def _replacement(decoder: dict[str, Any]) -> tuple[str, str] | None:
    """Return (old, new) of a decoder that replaces text."""
    if decoder.get("type") == "Metaspace":
        return str(decoder.get("replacement", MARK)), " "
    pattern = decoder.get("pattern")
    old = pattern.get("String") if isinstance(pattern, dict) else None
    return (old, str(decoder.get("content", ""))) if decoder.get("type") == "Replace" and old else None


def _decoders(backend: Any) -> list[dict[str, Any]]:
    """Return the decoders of a tokenizer in their order, as in tokenizer.json."""
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return list(decoder.get("decoders", [decoder]))


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's spelling of bytes: printable bytes as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
