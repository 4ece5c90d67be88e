"""Tokenize with the vocabulary of a GGUF file in llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from edgetune.errors import RuntimeProblem

_PIECE_BYTES = 256


class LlamaVocabulary:
    """llama.cpp's vocabulary of a loaded model."""

    def __init__(self, library: Any, model: Any) -> None:
        self._library = library
        self.pointer = library.llama_model_get_vocab(model)
        self.size: int = library.llama_vocab_n_tokens(self.pointer)
        bos = library.llama_vocab_bos(self.pointer)
        self.bos: int | None = bos if bos >= 0 else None
        self.adds_bos: bool = library.llama_vocab_get_add_bos(self.pointer)
        self.stop_tokens = frozenset(self._stop_tokens())

    def _stop_tokens(self) -> Iterator[int]:
        is_stop = self._library.llama_vocab_is_eog
        return (token for token in range(self.size) if is_stop(self.pointer, token))

    def tokenize(self, text: str) -> list[int]:
        """Return token ids as in training: BOS is added once if the model wants it, and not doubled."""
        raw = text.encode("utf-8", "surrogatepass")
        room = len(raw) + 8
        while True:
            ids = (self._library.llama_token * room)()
            count = self._library.llama_tokenize(self.pointer, raw, len(raw), ids, room, False, True)
            if count >= 0:
                break
            if -count <= room:
                raise RuntimeProblem(f"a text of {len(raw)} bytes is too long to be tokenized", "Split it")
            room = -count
        found: list[int] = list(ids[:count])
        if not self.adds_bos or self.bos is None or found[:1] == [self.bos]:
            return found
        return [self.bos, *found]

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of a token. Raises ValueError for an id outside the vocabulary; llama.cpp would abort."""
        if not 0 <= token < self.size:
            raise ValueError(f"{token} is not a token id; the vocabulary has {self.size}")
        to_piece = self._library.llama_token_to_piece
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)  # of each call: several threads ask at once
        count = to_piece(self.pointer, token, buffer, len(buffer), 0, special)
        if count < 0:  # longer than the buffer
            buffer = ctypes.create_string_buffer(-count)
            count = to_piece(self.pointer, token, buffer, len(buffer), 0, special)
        return buffer.raw[:count]
