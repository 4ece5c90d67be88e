"""Verify a conversion: llama.cpp loads the vocabulary, and its token ids are compared with the tokenizer's."""

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
from edgetune_converters.tokenizers.files import TokenizerFiles
from edgetune_converters.tokenizers.llama_special_tokens import SPECIAL_TEXTS
from edgetune_converters.tokenizers.normalization import Normalization
from edgetune_converters.tokenizers.vocabulary import MARK

# scripts, spaces, numbers, code, control characters, emoji, odd Unicode
TEXTS = (
    "",
    " ",
    "  ",
    "   leading and trailing   ",
    "\n",
    "\n\n\n",
    "\t\t x \t",
    "Hello, world! It's a test; we'll see what they've done. I'D SAY SO.",
    " The quick brown fox jumps over the lazy dog near CamelCase, snake_case and kebab-case words.",
    "tabs\tand\nnewlines\n\n\r\nand \r carriage returns\n \n  \n",
    "numbers 1 12 123 1234 12345678 3.14159 1,000,000 0x1F 1e-9 ½ ² ٣ １２３",
    "把卧室的灯调到三成亮，晚上七点。请打开窗帘！“好的”，她说。",
    "全角\u3000空格。\u3000（括号）～１２３，ＡＢＣ",
    "日本語のテスト、カタカナとひらがな。한국어도 있습니다.",
    "العربية من اليمين إلى اليسار، مَرْحَبًا بِالعَالَم ١٢٣",
    "עברית עם ניקוד: שָׁלוֹם עוֹלָם",
    "हिन्दी में परीक्षण, क्षत्रिय; বাংলা ভাষা; தமிழ்",
    "ภาษาไทยไม่มีช่องว่าง ລາວ កាន់តែពិសេសអាច",
    "Ελληνικά ΚΕΦΑΛΑΙΑ, Русский ПРОПИСЬ приветМир, Ünïcödé ÉCOLE naïveÉtude",
    "emoji 🙂 👩‍👩‍👧‍👦 🇩🇪🇨🇭 👍🏽 ☃ ❤️ 🏳️‍🌈 1️⃣",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)], \"b\": None}  # why?\n\n\n\tif x:\n\t\tpass\n",
    '<div class="x">&nbsp;</div> https://example.org/?q=1&r=%20#frag C:\\path\\to\\file',
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x7fff; } // SELECT * FROM t WHERE x != 'y';",
    "control \x00\x01\x07\x1b[31m\x7f\x85 characters",
    "zero width \u200b\u200d\ufeff and no-break\u00a0space, en\u2002space, ideographic\u3000space",
    "combining e\u0301 versus \u00e9, a\u0323\u0307, ﬁ ligature, Ⅻ, ①, \u1e69 s\u0323\u0307",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 beyond the first plane 𠜎𠜱 \U0010ffff \ufffd \ue000",
    "'s 'S 't 're 'RE n't 'll''d don't DON'T l'été",
    "___ --- ... !!! ??? @#$%^&*()_+ ~`| «quotes» “curly” ‘single’ — – …",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "a" + " " * 70 + "b" + "\n" * 9 + "c" + "\t" * 7 + "d" + "=" * 40 + " \n" * 5,
)


class IdDifference(NamedTuple):
    """A text with different ids in the tokenizer and in llama.cpp."""

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


class IdComparison(NamedTuple):
    """The result of a comparison. `stops_missed` are stop tokens at which llama.cpp would not stop."""

    compared: int
    differences: list[IdDifference]
    stops_missed: list[int]


def verify(
    files: TokenizerFiles, metadata: Mapping[str, Value], normalization: Normalization, stops: Sequence[int]
) -> IdComparison | None:
    """Compare ids on a corpus and on text with each added token. Return None where llama.cpp cannot be loaded."""
    library = _library()
    if library is None:
        return None
    texts = [*TEXTS, *_with_added_tokens(files)]
    with _vocabulary(library, metadata) as vocabulary:
        compared = [
            IdDifference(text, expected, _ids(library, vocabulary, normalization.apply(text)))
            for text, expected in zip(texts, files.encode(texts), strict=True)
            if files.beyond.keys().isdisjoint(expected)
        ]
        missed = [number for number in stops if not library.llama_vocab_is_eog(vocabulary, number)]
    return IdComparison(len(compared), [each for each in compared if each.expected != each.found], missed)


def adds_bos_and_eos(metadata: Mapping[str, Value]) -> tuple[bool, bool] | None:
    """Return whether llama.cpp adds BOS and EOS to a text with this vocabulary; None where it cannot be loaded."""
    library = _library()
    if library is None:
        return None
    with _vocabulary(library, metadata) as vocabulary:
        return bool(library.llama_vocab_get_add_bos(vocabulary)), bool(library.llama_vocab_get_add_eos(vocabulary))


def _with_added_tokens(files: TokenizerFiles) -> Iterator[str]:
    """Each added token between words, spaces, line ends and itself; its marks become the spaces they stand for.

    The texts that llama.cpp treats as special by itself are included.
    """
    for content in dict.fromkeys([*(entry["content"] for entry in files.added.values()), *SPECIAL_TEXTS]):
        token = content.replace(MARK, " ")
        yield f"one{token}two {token} three\n{token}\n{token}{token}  {token}."
        yield f"{token} begins,  {token}"


@cache
def _library() -> Any:
    """The module llama_cpp.llama_cpp with its log silenced; None where it cannot be loaded."""
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError):
        return None
    llama_cpp.llama_log_set(_silence(llama_cpp), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache
def _silence(llama_cpp: Any) -> Any:
    """libc's getpid as log callback: unlike a Python function, it cannot swallow a Ctrl-C."""
    return ctypes.cast(ctypes.CDLL(None).getpid, llama_cpp.llama_log_callback)


@contextmanager
def _vocabulary(library: Any, metadata: Mapping[str, Value]) -> Iterator[Any]:
    """Load the vocabulary in llama.cpp, from a file without tensors."""
    with tempfile.TemporaryDirectory(prefix="edgetune-") as directory:
        path = Path(directory) / "vocabulary.gguf"
        with GgufWriter.open(path, {"general.architecture": string("llama")} | dict(metadata), []) as writer:
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
    stated = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    return ", ".join(str(value.data) for value in stated if value) or "of no stated kind"


def _ids(library: Any, vocabulary: Any, text: str) -> list[int]:
    raw = text.encode()
    room = (ctypes.c_int32 * (4 * len(raw) + 8))()
    count = library.llama_tokenize(vocabulary, raw, len(raw), room, len(room), False, True)
    return list(room[: max(count, 0)])
