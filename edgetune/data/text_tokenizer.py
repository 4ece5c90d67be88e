"""From text to token ids with character offsets, with the tokenizer's own rule about BOS.

A thin layer over a Rust `tokenizers.Tokenizer`, which is read from tokenizer.json (without torch) or taken from a
tokenizer of transformers (training).
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgetune.data.answer_frame import TextPiece
from edgetune.data.chat import special_tokens
from edgetune.errors import DataError

Offset = tuple[int, int]
"""First and one past the last character of a token's text; (-1, -1) for a BOS that is not in the text."""

_LONGEST_KEPT_TAIL = 64
_KEPT_TAILS = 4096
_UNUSED = re.compile(r"pad|reserved|unused", re.IGNORECASE)


@dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer of a base, and its special tokens."""

    backend: Tokenizer
    named: dict[str, str]
    """Texts of the named special tokens: bos_token, eos_token, pad_token, ..."""
    declared_stops: tuple[int, ...] = ()
    """eos ids of generation_config.json, or of config.json where it states none."""
    declares_bos: bool | None = field(default=None)
    """Whether tokenizer_config.json wants a text to start with BOS; None: as the post-processor does."""
    rows: int | None = None
    """The number of rows of the model's embedding, where it is known."""

    @classmethod
    def from_directory(cls, directory: Path, rows: int | None = None) -> TextTokenizer:
        """Read tokenizer.json. Raises DataError if it is missing or damaged."""
        file = directory / "tokenizer.json"
        if not file.is_file():
            # readers of a SentencePiece model disagree about the text after a special token
            model = "tokenizer.model and " if (directory / "tokenizer.model").is_file() else ""
            raise DataError(
                f"the base in {directory} has {model}no tokenizer.json, which fixes the ids that are trained on",
                "Make one with transformers and sentencepiece: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )
        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - the Rust library raises plain Exception
            raise DataError(f"{file} is not a tokenizer: {error}", "Restore the base's files") from None
        return cls.of(backend, directory, rows)

    @classmethod
    def of(cls, backend: Tokenizer, directory: Path, rows: int | None = None) -> TextTokenizer:
        """Return a loaded tokenizer with the special tokens that the files of its directory declare."""
        backend.no_truncation()
        backend.no_padding()
        wanted = _read(directory / "tokenizer_config.json").get("add_bos_token")
        return cls(backend, special_tokens(directory), _declared_stops(directory), wanted, rows)

    @cached_property
    def bos_id(self) -> int | None:
        """The id of BOS, if there is one."""
        return self.id_of(self.named.get("bos_token"))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that stop generation: the tokenizer's EOS, and those that the configs of the base declare."""
        eos = self.id_of(self.named.get("eos_token"))
        return frozenset(self.declared_stops if eos is None else (*self.declared_stops, eos))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the added tokens that are special."""
        return frozenset(id_ for id_, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def ending_ids(self) -> frozenset[int]:
        """Tokens that may end a turn in a template: the stop tokens and all special tokens (`<|im_end|>`)."""
        return self.stop_ids | self.special_ids

    @cached_property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts of the stop tokens, which are one token wherever they occur."""
        added = self.backend.get_added_tokens_decoder()
        return tuple(added[id_].content for id_ in sorted(self.stop_ids) if id_ in added)

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """A pattern of the texts that become special tokens wherever they are written; None without such tokens."""
        added = self.backend.get_added_tokens_decoder()
        texts = {added[id_].content for id_ in self.ending_ids if id_ in added}
        longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts BOS before every text."""
        if self.bos_id is None:
            return False
        if self.declares_bos is not None:
            return self.declares_bos
        return self.backend.encode("a").ids[:1] == [self.bos_id]

    def id_of(self, token: str | None) -> int | None:
        """Return the id of a token given as text, None if it has none."""
        found: int | None = self.backend.token_to_id(token) if token is not None else None
        return found

    def encode(self, text: str) -> tuple[list[int], list[Offset]]:
        """Return ids and offsets of a rendered text. If the tokenizer adds BOS, it is there exactly once."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return self._with_bos(encoding.ids, encoding.offsets)

    def encode_document(self, text: str) -> list[int]:
        """Return the ids of a text with BOS, if the tokenizer adds it, without the cost of offsets."""
        return self._with_bos(self.encode_part(text), [])[0]

    def encode_part(self, text: str) -> list[int]:
        """Return the ids of a text alone, without BOS."""
        found: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return found

    def count_prompt_tokens(self, ids: Sequence[int], offsets: Sequence[Offset], prompt: str) -> int | None:
        """Return how many of the ids of a text are those of `prompt`, with which it begins; None if those differ.

        Text is divided at added tokens before anything else, so only what follows the last one is tokenized again.
        """
        last = bisect_left(offsets, len(prompt), key=lambda offset: offset[0]) - 1
        while last >= 0 and not (ids[last] in self._dividing_ids and 0 <= offsets[last][1] <= len(prompt)):
            last -= 1
        start = max(0, last)
        if last < 0:
            tail = self.encode(prompt)[0]
        elif len(rest := prompt[offsets[last][0] :]) > _LONGEST_KEPT_TAIL:
            tail = self.encode_part(rest)
        elif rest in self._tails:
            tail = self._tails[rest]
        else:
            if len(self._tails) >= _KEPT_TAILS:
                self._tails.clear()
            tail = self._tails[rest] = self.encode_part(rest)
        end = start + len(tail)
        return end if list(ids[start:end]) == tail else None

    @cached_property
    def _dividing_ids(self) -> frozenset[int]:
        """Added tokens that are found in any text, whatever stands before and behind them."""
        added = self.backend.get_added_tokens_decoder().items()
        return frozenset(
            id_ for id_, token in added
            if token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        )  # fmt: skip

    @cached_property
    def _tails(self) -> dict[str, list[int]]:
        """Ids of what follows the last special token of prompts; short ones, which recur."""
        return {}

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[Offset]]]:
        """Encode many texts on all cores."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [self._with_bos(each.ids, each.offsets) for each in encodings]

    def _with_bos(self, ids: list[int], offsets: list[Offset]) -> tuple[list[int], list[Offset]]:
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids], [(-1, -1), *offsets]
        return ids, offsets

    def has_row(self, id_: int) -> bool:
        """Whether the model's embedding has a row for this token, as far as its size is known."""
        return self.rows is None or id_ < self.rows

    def without_row(self, ids: Collection[int]) -> str | None:
        """Return what is wrong with ids of which the embedding has no row; None if it has all of them."""
        if not ids or self.has_row(max(ids)):
            return None
        found = next(id_ for id_ in ids if not self.has_row(id_))
        return f"holds {self.text_of(found)!r} (token {found}), and the model's embedding has only {self.rows} rows"

    def text_of(self, id_: int) -> str:
        """Return the token as the vocabulary spells it."""
        text: str | None = self.backend.id_to_token(id_)
        return f"<{id_}>" if text is None else text

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of token ids."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def pieces(self, ids: Sequence[int]) -> Iterator[TextPiece]:
        """Yield the text of token ids, with each run of special tokens apart."""
        done, text = 0, ""
        for is_special, run in groupby(id_ in self.special_ids for id_ in ids):
            done += len(list(run))
            upto = self.decode(ids[:done])
            yield TextPiece(upto[len(text) :], is_special)
            text = upto

    def choose_pad(self) -> tuple[int, str]:
        """Return the id of a padding token and the reason of the choice.

        It is never a stop token: masking the padding would then mask the end of every answer. Padding is masked in loss
        and attention, so any other token is correct; tokens that do not occur in text are preferred.
        """
        pad = self.id_of(self.named.get("pad_token"))
        if pad is None:
            reason = "the tokenizer has no pad token"
        elif not self.has_row(pad):
            reason = f"the embedding has no row for the tokenizer's pad token {self.text_of(pad)}"
        elif pad in self.stop_ids:
            reason = "the tokenizer's pad token is a stop token"
        else:
            return pad, f"{self.text_of(pad)} pads, the tokenizer's pad token"
        texts = {id_: self.text_of(id_) for id_ in sorted(self.special_ids - self.stop_ids)}
        unused = [id_ for id_, text in texts.items() if _UNUSED.search(text)]
        named = [self.id_of(self.named.get(name)) for name in ("unk_token", "bos_token")]
        candidates = [*unused, *named, *texts, *range(self.backend.get_vocab_size())]
        chosen = next(id_ for id_ in candidates if id_ is not None and id_ not in self.stop_ids and self.has_row(id_))
        return chosen, f"{reason}, so {self.text_of(chosen)} pads"


def _declared_stops(directory: Path) -> tuple[int, ...]:
    """The eos ids of generation_config.json; where it states none, those of config.json, as in transformers."""
    config = _read(directory / "config.json")
    text = config.get("text_config")
    for stated in (_read(directory / "generation_config.json"), config, text if isinstance(text, dict) else {}):
        value = stated.get("eos_token_id")
        if value is not None:
            listed = value if isinstance(value, list) else [value]
            return tuple(dict.fromkeys(id_ for id_ in listed if type(id_) is int))
    return ()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DataError(f"{path} is not valid JSON", "Restore the base's files") from None
    return value if isinstance(value, dict) else {}
