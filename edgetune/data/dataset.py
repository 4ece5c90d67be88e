"""From conversations to encoded rows, with counts of the rows that are cut, dropped or split."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgetune.config import DataConfig
from edgetune.data.chat import ChatTemplate
from edgetune.data.formats import Conversation
from edgetune.data.masks import EncodedRow, HistoryRewriteError, encode_conversation
from edgetune.data.sources import DataSource, read_sources
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError

MAX_HELD_OUT = 500


@dataclass(frozen=True)
class Splits:
    """The rows of a run as conversations."""

    train: list[Conversation]
    validation: list[Conversation]
    test: list[Conversation]
    formats: list[str]
    identity: dict[str, list[dict[str, object]]]
    """For the manifest: split -> what identifies each of its sources."""


@dataclass
class EncodedSplit:
    """The encoded rows of a split, and counts from the encoding."""

    rows: list[EncodedRow] = field(default_factory=list)
    truncated: int = 0
    longest_uncut: int = 0
    dropped: int = 0
    """Rows without a supervised token after the cut."""
    split: int = 0
    """Conversations that became one row per assistant turn, because the template rewrites history."""
    rewritten: str | None = None
    """The first such rewriting, in words."""
    dropped_example: str | None = None
    turn_ends: set[int] = field(default_factory=set)
    """Tokens that end the assistant's turns and are trained on."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def supervised(self) -> int:
        """Number of tokens that are trained on."""
        return sum(sum(row.supervised) for row in self.rows)

    @property
    def longest(self) -> int:
        """Length of the longest row."""
        return max((len(row.input_ids) for row in self.rows), default=0)

    @property
    def sha256(self) -> str:
        """Hash of everything that training sees: the token ids of each row, and which of them are trained on."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(array("q", [len(row.input_ids), *row.input_ids]).tobytes() + bytes(row.supervised))
        return digest.hexdigest()

    def summary(self) -> dict[str, int]:
        """Return the counts for the manifest."""
        return {
            "rows": len(self.rows), "tokens": self.tokens, "supervised_tokens": self.supervised,
            "longest": self.longest, "truncated": self.truncated, "dropped": self.dropped, "split": self.split,
        }  # fmt: skip


def read_splits(config: DataConfig, seed: int) -> Splits:
    """Read all sources; without a validation source, hold out a share of the training rows."""
    train = read_sources(config.train, form=config.format, split=config.split)
    rows = _conversations(train)[: config.max_rows]
    test = read_sources(config.test, form=config.format, split=config.split) if config.test else []
    if config.validation:
        held = read_sources(config.validation, form=config.format, split=config.split)
        validation = _conversations(held)
    else:
        held = []
        rows, validation = hold_out(rows, config.validation_fraction, seed)
    sources = {"train": train, "validation": held, "test": test}
    return Splits(
        rows,
        validation,
        _conversations(test),
        sorted({name for each in sources.values() for source in each for name in source.formats}),
        {name: [source.identity for source in each] for name, each in sources.items()},
    )


def hold_out(rows: Sequence[Conversation], fraction: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Return (kept, held out): a random sample of at least one row, in the order of the rows."""
    if len(rows) < 2:
        raise DataError(
            "there is one training row, so none can be held out for evaluation", "Give more rows, or data.validation"
        )
    count = min(MAX_HELD_OUT, len(rows) - 1, max(1, round(len(rows) * fraction)))
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    return kept, [row for index, row in enumerate(rows) if index in chosen]


def encode_all(
    template: ChatTemplate, tokenizer: TextTokenizer, conversations: Sequence[Conversation], max_length: int
) -> EncodedSplit:
    """Encode every conversation; cut rows at `max_length` tokens, and drop those without a supervised token.

    Raises:
        DataError: If no token or every token would be trained on, or if no row keeps its stop token.
    """
    result = EncodedSplit()
    for conversation in conversations:
        for row in _rows_of(template, tokenizer, conversation, result):
            _add_row(row, max_length, tokenizer, result)
    _check_supervision(result, tokenizer, max_length)
    return result


def _rows_of(
    template: ChatTemplate, tokenizer: TextTokenizer, conversation: Conversation, result: EncodedSplit
) -> list[EncodedRow]:
    """Return one row; or one per assistant turn, rendered as in use, if the template rewrites history."""
    try:
        return [encode_conversation(template, tokenizer, conversation)]
    except HistoryRewriteError as error:
        turns = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
        if len(turns) < 2:
            raise
        result.split += 1
        result.rewritten = result.rewritten or error.message
    return [encode_conversation(template, tokenizer, conversation[: index + 1], only_last=True) for index in turns]


def _add_row(row: EncodedRow, max_length: int, tokenizer: TextTokenizer, result: EncodedSplit) -> None:
    cut = row.cut(max_length)
    result.truncated += len(row.input_ids) > max_length
    result.longest_uncut = max(result.longest_uncut, len(row.input_ids))
    if cut.scored:
        result.rows.append(cut)
        result.turn_ends |= cut.endings & tokenizer.ending_ids
    else:
        result.dropped += 1
        result.dropped_example = result.dropped_example or tokenizer.decode(cut.input_ids)[:200]


def _check_supervision(result: EncodedSplit, tokenizer: TextTokenizer, max_length: int) -> None:
    if not result.rows:
        raise DataError(
            "0 % of the tokens would be trained on: no row has assistant tokens, for example "
            f"{result.dropped_example!r}",
            "Raise training.max_length if the prompts are longer than it; look at the rows with `edgetune preview`",
        )
    if all(all(row.supervised[1:]) for row in result.rows):
        raise DataError(
            f"100 % of the tokens would be trained on: no row has a prompt, for example "
            f"{tokenizer.decode(result.rows[0].input_ids)[:200]!r}",
            "Give rows with a prompt, or another data.chat_template; look at the rows with `edgetune preview`",
        )
    if not result.turn_ends:
        raise DataError(
            f"every row is cut at max_length ({max_length} tokens) before the assistant's turn ends, so the model "
            "would never learn to stop",
            f"Raise training.max_length; the longest row has {result.longest_uncut} tokens",
        )


def _conversations(sources: Sequence[DataSource]) -> list[Conversation]:
    return [conversation for source in sources for conversation in source.conversations]
