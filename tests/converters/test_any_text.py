"""Any Unicode text: the ids of the runtime are those of the tokenizer, for each kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from edgetune_converters import gguf
from edgetune_converters.gguf.values import string
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.tokenizers import convert as tokenizers
from edgetune_converters.tokenizers import pretokenizers
from edgetune_converters.tokenizers.normalization import Normalization
from tests.converters import corpus, runtime, vocabularies
from tests.profiles import scaled


class Pair(NamedTuple):
    """A tokenizer, and its vocabulary as llama.cpp has it."""

    tokenizer: Tokenizer
    vocabulary: runtime.Vocabulary
    normalization: Normalization


def _metaspace(directory: Path) -> Tokenizer:
    tokenizer = vocabularies.sentencepiece(directory)
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def _composed(directory: Path) -> Tokenizer:
    tokenizer = vocabularies.byte_level(directory, "qwen2")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def _by_rank(directory: Path) -> Tokenizer:
    """Merges of which one is missing cannot be scores; none of them crosses a line end."""
    vocabularies.sentencepiece(directory, over_lines=False)
    return vocabularies.without_a_merge(directory)


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    **{row.name: partial(vocabularies.cut_by, row=row) for row in reversed(pretokenizers.TABLE) if not row.limits},
    "composed": _composed,
    "pieces": vocabularies.sentencepiece,
    "pieces after a space": lambda directory: vocabularies.sentencepiece(directory, prefix=True),
    "pieces with metaspace": _metaspace,
    "pieces by rank": _by_rank,
    "unigram": vocabularies.unigram,
}

_SPACES = st.text(" \n\t\r\u00a0\u3000\u2028\x85", min_size=1, max_size=12)
_SCRIPTS = st.text(
    "abcXYZ 0189'sStrevml.,!?-_/\\(){}[]<>|#\n中文日本語にカ한국العربيةעבריתनमस्तेไทยΕλληνικάРусскийé\u0301\u0323½²Ⅻ"
    "🙂👩‍👧🇩🇪👍🏽\u200b\u200d\ufeff\x00\x07\x1b\x7f",
    max_size=40,
)
_SNIPPETS = st.sampled_from(
    [
        "<tool>",
        "<|im_end|>",
        "</s>",
        "<s>",
        "it's",
        " we'LL",
        "def f(x):\n    return x\n",
        "3.14159",
        "1,000",
        "把卧室的灯",
    ]
)
# what the tokenizers have long tokens for
_WORDS = st.sampled_from(sorted({word for text in corpus.TEXTS for word in text.split(" ") if word}))
# A lone surrogate is no text: the tokenizers library refuses it before anything is compared. Of characters that this
# Python does not know, some are letters to the tokenizers library (Unicode 16) and not yet to llama.cpp (15.1).
_CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
_TEXT = st.lists(_SPACES | _SCRIPTS | _WORDS | _SNIPPETS | st.text(_CHARACTERS, max_size=30), max_size=6).map("".join)


@cache
def _pair(kind: str, directory: Path) -> Pair:
    tokenizer = KINDS[kind](directory)
    metadata = tokenizers.convert_tokenizer(directory, 3000, {}).metadata
    path = directory / "vocab.gguf"
    with GgufWriter.open(path, {"general.architecture": string("llama")} | metadata, []) as writer:
        writer.publish()
    return Pair(tokenizer, runtime.Vocabulary(path), Normalization.from_metadata(gguf.read(path).metadata))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


_EXAMPLES = [pytest.param(scaled(1), id="few"), pytest.param(scaled(25), id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("examples", _EXAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_any_text_are_those_of_the_tokenizer(kind: str, examples: int, directory: Path) -> None:
    pair = _pair(kind, directory / kind)

    @settings(max_examples=examples)
    @given(text=_TEXT)
    def check(text: str) -> None:
        expected: list[int] = pair.tokenizer.encode(text, add_special_tokens=False).ids
        assert pair.vocabulary.ids(pair.normalization.apply(text)) == expected

    check()


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2", "pieces", "pieces by rank"])
def test_the_bytes_of_the_ids_are_the_text(kind: str, directory: Path) -> None:
    pair = _pair(kind, directory / kind)

    @given(text=_TEXT)
    def check(text: str) -> None:
        assert pair.vocabulary.text(pair.vocabulary.ids(text)).decode() == text

    check()


def test_a_lone_surrogate_is_refused(directory: Path) -> None:
    pair = _pair("qwen2", directory / "qwen2")
    broken: Any = "a\ud800b"
    with pytest.raises((TypeError, UnicodeEncodeError)):
        pair.tokenizer.encode(broken)
