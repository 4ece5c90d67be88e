"""Proof of a conversion: llama.cpp itself is given the vocabulary, and its ids are compared with the tokenizer's."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from edgetune_converters.errors import TokenizerError
from edgetune_converters.gguf.values import Value, string
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.tokenizers import corpus
from edgetune_converters.tokenizers.files import TokenizerFiles
from edgetune_converters.tokenizers.llama_special_tokens import SPECIAL_TEXTS
from edgetune_converters.tokenizers.normalization import Normalization
from edgetune_converters.tokenizers.vocabulary import MARK


class Difference(NamedTuple):
    """A text that the tokenizer and llama.cpp cut differently."""

    text: str
    expected: list[int]
    found: list[int]

    def __str__(self) -> str:
        first = next(
            (i for i, pair in enumerate(zip(self.expected, self.found, strict=False)) if pair[0] != pair[1]),
            min(len(self.expected), len(self.found)),
        )
        here = slice(max(0, first - 2), first + 4)
        return f"{self.text!r}: from token {here.start} {self.expected[here]} against {self.found[here]} in llama.cpp"


class Verification(NamedTuple):
    """What comparing has shown. `stops_missed` are stop tokens at which llama.cpp would not stop."""

    compared: int
    differences: list[Difference]
    stops_missed: list[int]


def verify(
    files: TokenizerFiles, metadata: Mapping[str, Value], normalization: Normalization, stops: Sequence[int]
) -> Verification | None:
    """Compare ids on the corpus and on text with each added token. None when there is no llama.cpp to ask."""
    library = _library()
    if library is None:
        return None
    texts = [*corpus.TEXTS, *_with_added_tokens(files)]
    with _vocabulary(library, metadata) as vocabulary:
        compared = [
            Difference(text, expected, _ids(library, vocabulary, normalization.apply(text)))
            for text, expected in zip(texts, files.encode(texts), strict=True)
        ]
        missed = [number for number in stops if not library.llama_vocab_is_eog(vocabulary, number)]
    return Verification(len(texts), [each for each in compared if each.expected != each.found], missed)


def _with_added_tokens(files: TokenizerFiles) -> Iterator[str]:
    """Each added token between words, spaces, line ends and itself; marks in it as the spaces that they stand for.

    So also those that llama.cpp takes for special ones unasked.
    """
    for content in dict.fromkeys([*(entry["content"] for entry in files.added.values()), *SPECIAL_TEXTS]):
        token = content.replace(MARK, " ")
        yield f"one{token}two {token} three\n{token}\n{token}{token}  {token}."
        yield f"{token} begins,  {token}"


@cache
def _library() -> Any:
    """The module llama_cpp.llama_cpp, silenced; None where it cannot be loaded."""
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError):
        return None
    llama_cpp.llama_log_set(_silence(llama_cpp), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache
def _silence(llama_cpp: Any) -> Any:
    """libc's getpid as a log callback: unlike a Python function, it cannot swallow a Ctrl-C."""
    return ctypes.cast(ctypes.CDLL(None).getpid, llama_cpp.llama_log_callback)


@contextmanager
def _vocabulary(library: Any, metadata: Mapping[str, Value]) -> Iterator[Any]:
    """The vocabulary as llama.cpp reads it from a file without tensors."""
    with tempfile.TemporaryDirectory(prefix="edgetune-") as directory:
        path = Path(directory) / "vocabulary.gguf"
        with GgufWriter(path, {"general.architecture": string("llama")} | dict(metadata), []) as writer:
            writer.publish()
        parameters = library.llama_model_default_params()
        parameters.vocab_only = True
        model = library.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise TokenizerError(f"llama.cpp refuses the vocabulary of the tokenizer ({_name(metadata)})")
    try:
        yield library.llama_model_get_vocab(model)
    finally:
        library.llama_model_free(model)


def _name(metadata: Mapping[str, Value]) -> str:
    return ", ".join(str(metadata[f"tokenizer.ggml.{key}"].data) for key in ("model", "pre"))


def _ids(library: Any, vocabulary: Any, text: str) -> list[int]:
    raw = text.encode()
    room = (ctypes.c_int32 * (4 * len(raw) + 8))()
    count = library.llama_tokenize(vocabulary, raw, len(raw), room, len(room), False, True)
    return list(room[: max(count, 0)])
