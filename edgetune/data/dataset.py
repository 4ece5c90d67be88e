"""From conversations to encoded rows, with counts of the rows that are cut, dropped or split."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune import console
from edgetune.config import DataConfig
from edgetune.data.chat import ChatTemplate
from edgetune.data.encoded_rows import EncodedRows
from edgetune.data.fitting import KeyUsage, fit_to_template
from edgetune.data.formats import ChatRow, RowReader
from edgetune.data.masks import EncodedRow, encode_conversation
from edgetune.data.objective_rows import LabelledRows, PairRows, PromptRows
from edgetune.data.problems import RowProblem, RowProblems
from edgetune.data.row_store import RowStore
from edgetune.data.sources import DataSource, read_sources
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.data.trailing import TrailingTurns
from edgetune.data.written_tokens import WrittenTokens
from edgetune.errors import DataError

MAX_HELD_OUT = 500
_MANY_ROWS = 2000


@dataclass(frozen=True)
class Splits:
    """The rows of a run as conversations."""

    train: Sequence[ChatRow]
    validation: Sequence[ChatRow]
    test: Sequence[ChatRow]
    formats: list[str]
    identity: dict[str, list[dict[str, object]]]
    """For the manifest: split -> what identifies each of its sources."""
    notes: list[str] = field(default_factory=list)
    """What of the sources was not read."""


@dataclass
class EncodedSplit:
    """The encoded rows of a split, and counts from the encoding.

    `rows` and `chats` hold good answers whatever the objective, so that reference, golden conversations and ladder are
    the same for all: of pairs the chosen answers, of labelled answers the desirable ones, of prompts the answers that
    their columns state, of plain text the blocks.
    """

    rows: EncodedRows = field(default_factory=EncodedRows)
    chats: RowStore = field(default_factory=RowStore)
    """The rows without a problem, as the template renders them."""
    pairs: PairRows = field(default_factory=PairRows)
    """Preference pairs; empty for other objectives."""
    labelled: LabelledRows = field(default_factory=LabelledRows)
    """Labelled answers; empty for other objectives."""
    prompts: PromptRows = field(default_factory=PromptRows)
    """Prompts that are answered during training; empty for other objectives."""
    usage: KeyUsage = field(default_factory=KeyUsage)
    untrained_turns: int = 0
    """Assistant turns that flags of the rows exclude from the loss."""
    truncated: int = 0
    longest_uncut: int = 0
    dropped: int = 0
    """Rows without a supervised token after the cut."""
    split: int = 0
    """Conversations that became one row per assistant turn."""
    completed: int = 0
    """Answers whose prompt opens a thought that the template leaves out of the answer, and that is ended there."""
    blank: int = 0
    """Answers that are white space only, and are not tool calls or reasoning."""
    blank_example: str = ""
    """The place of the first of them."""
    split_reason: str | None = None
    """Why the first of them did, in words."""
    trailing: TrailingTurns = field(default_factory=TrailingTurns)
    written: WrittenTokens = field(default_factory=WrittenTokens)
    """Special tokens that messages hold as text."""
    dropped_example: str | None = None
    turn_ends: set[int] = field(default_factory=set)
    """Tokens that end the assistant's turns and are trained on."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.rows.tokens

    @property
    def supervised(self) -> int:
        """Number of tokens that are trained on."""
        return self.rows.trained

    @property
    def longest(self) -> int:
        """Length of the longest row."""
        return self.rows.longest

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


def read_splits(config: DataConfig, seed: int, problems: RowProblems | None = None) -> Splits:
    """Read all sources; without a validation source, hold out a share of the training rows.

    Without `problems`, raise DataError for problems of rows.
    """
    found = RowProblems(skip=config.on_bad_row == "skip") if problems is None else problems
    reader = _row_reader(config)
    train = read_sources(config.train, reader=reader, split=config.split, problems=found)
    rows = _chat_rows(train)[: config.max_rows]
    test = read_sources(config.test or [], reader=reader, split=config.split, problems=found)
    held = read_sources(config.validation or [], reader=reader, split=config.split, problems=found)
    if found.failures:
        found.raise_all()
    reader.check_columns()
    if problems is None:
        found.raise_if_any()
    if found.count and len(rows) < 2:
        found.raise_all()
    if config.validation:
        validation = _chat_rows(held)
    else:
        rows, validation = hold_out(rows, config.validation_fraction, seed)
    sources = {"train": train, "validation": held, "test": test}
    return Splits(
        rows,
        validation,
        _chat_rows(test),
        sorted({name for each in sources.values() for source in each for name in source.formats}),
        {name: [source.identity for source in each] for name, each in sources.items()},
        list(dict.fromkeys(note for each in sources.values() for source in each for note in source.notes)),
    )


def _row_reader(config: DataConfig) -> RowReader:
    columns = {meaning: key for meaning, key in config.columns.model_dump().items() if key is not None}
    return RowReader(config.format, columns, config.roles)


def read_part(config: DataConfig, part: str, problems: RowProblems) -> tuple[RowStore, list[str], list[str]]:
    """Return the rows of data.train, data.validation or data.test, their formats, and what was not read.

    Raises:
        DataError: For problems of rows, unless they are skipped, and if the option is not set.
    """
    names = getattr(config, part)
    if not names:
        raise DataError(f"data.{part} is not set, so it has no rows", "Set it, or name another part with --of")
    reader = _row_reader(config)
    sources = read_sources(names, reader=reader, split=config.split, problems=problems)
    if problems.failures:
        problems.raise_all()
    reader.check_columns()
    problems.raise_if_any()
    rows = _chat_rows(sources)
    notes = [note for source in sources for note in source.notes]
    return rows[: config.max_rows] if part == "train" else rows, list(reader.formats), notes


def hold_out(rows: RowStore, fraction: float, seed: int) -> tuple[RowStore, RowStore]:
    """Return (kept, held out): a random sample of at least one row, in the order of the rows."""
    if len(rows) < 2:
        raise DataError(
            "there is one training row, so none can be held out for evaluation", "Give more rows, or data.validation"
        )
    count = min(MAX_HELD_OUT, len(rows) - 1, max(1, round(len(rows) * fraction)))
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return rows.select(index for index in range(len(rows)) if index not in chosen), rows.select(sorted(chosen))


def encode_all(
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    rows: Sequence[ChatRow],
    max_length: int,
    problems: RowProblems | None = None,
) -> EncodedSplit:
    """Encode every row; cut rows at `max_length` tokens, and drop those without a supervised token.

    Rows that the template refuses are added to `problems`; without it, they are raised together.

    Raises:
        DataError: If no token or every token would be trained on, or if no row keeps its stop token.
    """
    template.check_syntax()
    found = RowProblems() if problems is None else problems
    result = EncodedSplit()
    for given in _with_progress(rows):
        try:
            row = fit_to_template(template, result.trailing.leave_out(given), result.usage)
            encoded = encode_conversation(
                template.with_options(row.options), tokenizer, row.messages, tools=row.tools,
                untrained=row.untrained, following=given.messages[len(row.messages) :],
            )  # fmt: skip
            check_ids(tokenizer, encoded.rows)
        except DataError as error:
            found.add(given.place, error.message, error.hint)
            continue
        except RowProblem as problem:
            found.add(given.place, str(problem))
            continue
        result.chats.append(row)
        result.written.count(tokenizer, row)
        if blank := sum(_is_blank(row.messages[index]) for index in row.answers):
            result.blank_example = result.blank_example or row.place
            result.blank += blank
        result.untrained_turns += len(row.untrained)
        if encoded.split_reason:
            result.split += 1
            where = f"; for example {given.place}" if given.place else ""
            result.split_reason = result.split_reason or encoded.split_reason + where
        result.completed += encoded.completed
        for each in encoded.rows:
            _add_row(each, max_length, tokenizer, result)
    if problems is None:
        found.raise_if_any()
    if found.count and not result.chats:
        found.raise_all()
    if found.skip or not found.count:  # otherwise the caller raises
        _check_supervision(result, tokenizer, max_length)
    return result


def _with_progress(rows: Sequence[ChatRow]) -> Iterator[ChatRow]:
    """Yield the rows, and show a bar if they are many."""
    if len(rows) < _MANY_ROWS:
        yield from rows
        return
    with console.count_progress("rendering and tokenizing rows") as update:
        for number, row in enumerate(rows):
            if number % 100 == 0:
                update(number, len(rows))
            yield row


def check_ids(tokenizer: TextTokenizer, encoded: Sequence[EncodedRow]) -> None:
    """Raise RowProblem for a token without a row in the model's embedding."""
    for row in encoded:
        if problem := tokenizer.without_row(row.input_ids):
            raise RowProblem(problem)


def _is_blank(message: Mapping[str, Any]) -> bool:
    """Whether a message says nothing: white space beside no other key with a value."""
    return not any(
        value.strip() if isinstance(value, str) else value for key, value in message.items() if key != "role"
    )


def _add_row(row: EncodedRow, max_length: int, tokenizer: TextTokenizer, result: EncodedSplit) -> None:
    cut = row.cut(max_length)
    result.truncated += len(row.input_ids) > max_length
    result.longest_uncut = max(result.longest_uncut, len(row.input_ids))
    if True in cut.supervised:
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


def _chat_rows(sources: Sequence[DataSource]) -> RowStore:
    return sources[0].rows if len(sources) == 1 else RowStore(row for source in sources for row in source.rows)
