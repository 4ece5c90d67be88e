"""From conversations to encoded rows, with counts of the rows that are cut, dropped or split."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgetune import console
from edgetune.config import DataConfig
from edgetune.data.chat import ChatTemplate
from edgetune.data.chat_rows import Pair, PlainText
from edgetune.data.encoded_split import EncodedSplit
from edgetune.data.formats import ChatRow, RowReader
from edgetune.data.objective_readers import reader_for
from edgetune.data.problems import RowProblem, RowProblems
from edgetune.data.row_encoder import RowEncoder
from edgetune.data.row_store import RowStore
from edgetune.data.sources import DataSource, read_sources
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError

__all__ = ["MAX_HELD_OUT", "EncodedSplit", "Splits", "encode_all", "hold_out", "read_part", "read_splits"]

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


def read_splits(config: DataConfig, seed: int, problems: RowProblems | None = None, objective: str = "sft") -> Splits:
    """Read all sources; without a validation source, hold out a share of the training rows.

    Without `problems`, raise DataError for problems of rows.

    Args:
        config: The section `data`.
        seed: Chooses the rows that are held out.
        problems: Where problems of rows are added.
        objective: The value of `objective.kind`, which says which kinds of rows are read. Test rows are conversations
            whatever the objective.
    """
    found = RowProblems(skip=config.on_bad_row == "skip") if problems is None else problems
    reader, test_reader = _row_reader(config, objective), _test_reader(config, objective)
    how: dict[str, Any] = {"split": config.split, "sample_by": config.sample_by, "problems": found}
    train = read_sources(config.train, reader=reader, **how)
    rows = _chat_rows(train)[: config.max_rows]
    test = read_sources(config.test or [], reader=test_reader, **how)
    held = read_sources(config.validation or [], reader=reader, **how)
    if found.failures:
        found.raise_all()
    reader.check_columns(test_reader)
    if problems is None:
        found.raise_if_any()
    if found.count and len(rows) < 2:
        found.raise_all()
    if config.validation:
        validation = _chat_rows(held)
    else:
        rows = split_document(rows, config.validation_fraction)
        rows, validation = hold_out(rows, config.validation_fraction, seed)
    sources = {"train": train, "validation": held, "test": test}
    notes = [note for each in sources.values() for source in each for note in source.notes]
    return Splits(
        rows,
        validation,
        _chat_rows(test),
        sorted({name for each in sources.values() for source in each for name in source.formats}),
        {name: [source.identity for source in each] for name, each in sources.items()},
        list(dict.fromkeys([*notes, *reader.describe()])),
    )


def _row_reader(config: DataConfig, objective: str) -> RowReader:
    return reader_for(objective, config.format, _columns(config), config.roles)


def _test_reader(config: DataConfig, objective: str) -> RowReader:
    """Return the reader of data.test: conversations, since an answer is compared."""
    if objective == "sft":
        return _row_reader(config, objective)
    return RowReader("auto", _columns(config), config.roles, "data.test takes conversations with an answer")


def _columns(config: DataConfig) -> dict[str, str]:
    return {meaning: key for meaning, key in config.columns.model_dump().items() if key is not None}


def read_part(
    config: DataConfig, part: str, problems: RowProblems, objective: str = "sft"
) -> tuple[RowStore, list[str], list[str]]:
    """Return the rows of data.train, data.validation or data.test, their formats, and what was not read.

    Raises:
        DataError: For problems of rows, unless they are skipped, and if the option is not set.
    """
    names = getattr(config, part)
    if not names:
        raise DataError(f"data.{part} is not set, so it has no rows", "Set it, or name another part with --of")
    reader = (_test_reader if part == "test" else _row_reader)(config, objective)
    sources = read_sources(names, reader=reader, split=config.split, sample_by=config.sample_by, problems=problems)
    if problems.failures:
        problems.raise_all()
    reader.check_columns()
    problems.raise_if_any()
    rows = _chat_rows(sources)
    notes = [note for source in sources for note in source.notes] + reader.describe()
    return rows[: config.max_rows] if part == "train" else rows, list(reader.formats), notes


def split_document(rows: RowStore, fraction: float) -> RowStore:
    """Return a single document of plain text as two rows, the second with a share of it; other rows unchanged."""
    if len(rows) != 1 or not isinstance(document := rows[0].beside, PlainText):
        return rows
    text = document.text
    middle = len(text) - max(1, round(len(text) * fraction))
    border = next(
        (at + len(mark) for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, middle // 2, middle)) >= 0), middle
    )
    parts = [replace(rows[0], beside=PlainText(part)) for part in (text[:border], text[border:]) if part.strip()]
    return RowStore(parts)


def hold_out(rows: RowStore, fraction: float, seed: int) -> tuple[RowStore, RowStore]:
    """Return (kept, held out): a random sample of at least one row, in the order of the rows.

    Preference pairs of one prompt are kept or held out together, if there are several prompts.
    """
    if len(rows) < 2:
        raise DataError(
            "there is one training row, so none can be held out for evaluation", "Give more rows, or data.validation"
        )
    count = min(MAX_HELD_OUT, len(rows) - 1, max(1, round(len(rows) * fraction)))
    groups = _rows_by_prompt(rows) if isinstance(rows[0].beside, Pair) else []
    if len(groups) > 1:
        chosen: set[int] = set()
        for group in random.Random(seed).sample(groups, len(groups) - 1):
            chosen |= set(group)
            if len(chosen) >= count:
                break
    else:
        chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return rows.select(index for index in range(len(rows)) if index not in chosen), rows.select(sorted(chosen))


def _rows_by_prompt(rows: RowStore) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        assert isinstance(row.beside, Pair)
        groups.setdefault(repr(row.messages[: row.beside.prompt]), []).append(index)
    return list(groups.values())


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
    encoder = RowEncoder(template, tokenizer, max_length, result)
    for given in _with_progress(rows):
        try:
            encoder.add(given)
        except DataError as error:
            found.add(given.place, error.message, error.hint)
        except RowProblem as problem:
            found.add(given.place, str(problem), problem.hint)
    encoder.finish()
    if problems is None:
        found.raise_if_any()
    if found.count and not result.chats and not result.rows:
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


def _check_supervision(result: EncodedSplit, tokenizer: TextTokenizer, max_length: int) -> None:
    if not result.rows:
        raise DataError(
            "0 % of the tokens would be trained on: no row has assistant tokens, for example "
            f"{result.dropped_example!r}",
            "Raise training.max_length if the prompts are longer than it; look at the rows with `edgetune preview`",
        )
    if result.prompts and len(result.prompts) != len(result.chats):
        raise DataError(
            f"{len(result.prompts)} of {len(result.chats)} rows have no answer: distillation takes prompts alone or "
            "conversations alone",
            "Give the two kinds to separate trainings, or remove the answers",
        )
    if result.prompts or result.texts:
        return
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
