"""Text normalization that edgetune's runtime applies before llama.cpp tokenizes, because llama.cpp cannot.

Unicode normal forms, white space stripped by tokens (lstrip, rstrip), and prefix spaces. The converter writes it into
the file, the runtime applies it, and so does the verification of the conversion.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from edgetune_converters.gguf import keys
from edgetune_converters.gguf.values import Value, string, strings

NormalForm = Literal["", "NFC", "NFD", "NFKC", "NFKD"]
Space = Literal["", "first", "each", "spare", "plain"]
"""first: a space before a text that begins with neither a space nor an added token. each: the same before each piece
between added tokens. spare: one space fewer before each such piece, as llama.cpp adds one of its own. plain: every
white space is a space."""

_MARK = "\u2581"
_WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")  # Unicode's White_Space
_ADDED = (2, 3, 4)  # types that are matched in text: unknown, control, user-defined


@dataclass(frozen=True)
class Normalization:
    """Normalization of a text. `added` are the texts of the added tokens; some strip spaces beside them."""

    form: NormalForm = ""
    space: Space = ""
    lstrip: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Normalization:
        """Read the normalization of a GGUF file; unknown values are ignored."""
        form, space = metadata.get(keys.NORMALIZER, ""), metadata.get(keys.SPACE, "")
        tokens, types = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
        return cls(
            form if form in get_args(NormalForm) else "",
            space if space in get_args(Space) else "",
            tuple(metadata.get(keys.LSTRIP, ())),
            tuple(metadata.get(keys.RSTRIP, ())),
            tuple(text for text, kind in zip(tokens, types, strict=False) if kind in _ADDED) if space else (),
        )

    def metadata(self) -> dict[str, Value]:
        """Return the GGUF keys; none for a text that is left unchanged."""
        found = {keys.NORMALIZER: self.form, keys.SPACE: self.space}
        stripping = {keys.LSTRIP: self.lstrip, keys.RSTRIP: self.rstrip}
        return {key: string(text) for key, text in found.items() if text} | {
            key: strings(texts) for key, texts in stripping.items() if texts
        }

    def apply(self, text: str) -> str:
        """Return the text that llama.cpp is to tokenize."""
        if self._eaten:
            text = self._eaten.sub(lambda match: str(match[match.lastindex or 0]), text)
        if self.form:
            text = unicodedata.normalize(self.form, text)
        return _SPACING[self.space](self, text) if self.space else text

    @cached_property
    def _eaten(self) -> re.Pattern[str] | None:
        """Tokens together with the spaces that they strip; the token is the one group that matches."""
        both = [text for text in self.lstrip if text in self.rstrip]
        left = [text for text in self.lstrip if text not in both]
        right = [text for text in self.rstrip if text not in both]
        sides = ((both, "{0}*({1}){0}*"), (left, "{0}*({1})"), (right, "({1}){0}*"))
        patterns = [pattern.format(_WHITE_SPACE.pattern, _either(texts)) for texts, pattern in sides if texts]
        return re.compile("|".join(patterns)) if patterns else None

    @cached_property
    def _pieces(self) -> re.Pattern[str]:
        return re.compile(f"({_either(self.added)})") if self.added else re.compile("((?!))")

    def _first(self, text: str) -> str:
        return text if not text or self._pieces.match(text) else _spaced(text)

    def _each(self, text: str) -> str:
        return "".join(part if i % 2 else _spaced(part) for i, part in enumerate(self._pieces.split(text)))

    def _spare(self, text: str) -> str:
        parts = self._pieces.split(text)
        return "".join(part if i % 2 or part[:1] != " " or part == " " else part[1:] for i, part in enumerate(parts))

    def _plain(self, text: str) -> str:
        return _WHITE_SPACE.sub(" ", text)


def _either(texts: tuple[str, ...] | list[str]) -> str:
    """A pattern for the longest of some texts."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


def _spaced(text: str) -> str:
    return text if not text or text[0] in f" {_MARK}" else " " + text


_SPACING: dict[str, Callable[[Normalization, str], str]] = {
    "first": Normalization._first,
    "each": Normalization._each,
    "spare": Normalization._spare,
    "plain": Normalization._plain,
}
