"""Readers of the rows of objectives: labelled answers, prompts, plain text, and what distillation takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from edgetune.data import key_names as names
from edgetune.data.chat_rows import ChatRow, Columns, Label, PlainText
from edgetune.data.formats import NoAnswerProblem, RowReader, read_beside
from edgetune.data.key_names import fold
from edgetune.data.messages import check_characters, is_empty
from edgetune.data.pair_reader import PairReader
from edgetune.data.problems import RowProblem
from edgetune.data.row_kinds import CONVERSATION, KINDS, LABELLED, PROMPT, TEXT, kinds_of
from edgetune.data.row_layouts import foreign_rows, formats_of
from edgetune.errors import ConfigError

_LABELS: Mapping[str, bool] = {
    **dict.fromkeys(
        ("true", "1", "1.0", "+1", "yes", "up", "thumbs_up", "👍", "good", "positive", "desirable", "liked", "like"),
        True,
    ),
    **dict.fromkeys(
        ("false", "0", "0.0", "-1", "-1.0", "no", "down", "thumbs_down", "👎", "bad", "negative", "undesirable",
         "disliked", "dislike"), False,
    ),
}  # fmt: skip
"""What labels of answers mean, as texts."""
_NEGATIVE = {fold(name) for name in names.NEGATIVE_LABEL_KEYS}


class LabelledReader(RowReader):
    """Converts rows to conversations whose last answer has a label."""

    kind: ClassVar[str] = LABELLED

    def read(self, row: Any, place: str = "") -> ChatRow:
        row, layout = self._find_layout(row)
        key = layout.keys.get("label")
        if key is None and self._asks_only(row, layout):
            raise foreign_rows(f"{layout.keys['messages']} without an answer", PROMPT, self.wanted)
        if key is None:
            raise foreign_rows(f"no label ({', '.join(names.LABEL_KEYS[:3])} ...)", CONVERSATION, self.wanted)
        label = _read_label(key, row[key])
        found = self._convert(row, layout, place)
        answers = [index for index, message in enumerate(found.messages) if message["role"] == "assistant"]
        found.untrained |= frozenset(answers[:-1])
        found.beside = Label(label)
        return found


def _read_label(key: str, value: Any) -> bool:
    text = str(value).strip().lower().replace(" ", "_")
    if not isinstance(value, bool | int | float | str) or text not in _LABELS:
        raise RowProblem(f"{key} is {value!r}, which is neither true nor false", "Write true for a good answer")
    return _LABELS[text] != (fold(key) in _NEGATIVE)


class PromptReader(RowReader):
    """Converts rows to prompts, with their other keys for the reward functions."""

    kind: ClassVar[str] = PROMPT

    def read(self, row: Any, place: str = "") -> ChatRow:
        row, layout = self._find_layout(row)
        keys = layout.keys
        if "messages" in keys:
            given = self._turns(row[keys["messages"]], keys["messages"])
        else:
            given = self._question(row, keys)
        if given[-1].message["role"] == "assistant":
            problem = foreign_rows(
                f"{keys.get('messages') or keys['user']} that end with an answer", CONVERSATION, self.wanted
            )
            raise RowProblem(
                str(problem),
                "End the prompt with the user's message, and give the answer as a key of the row: `answer`",
            )
        turns, ignored = self._join(row, keys, given)
        tools, options, _ = read_beside(row, layout)
        read = {*keys.values(), *self._finder.find(tuple(row)).keys.values()}  # keys without a value too
        columns = {key: value for key, value in row.items() if key not in read}
        check_characters([turn.message for turn in turns])
        check_characters(columns)
        unread = dict.fromkeys(f"{key} of a message" for turn in turns for key in turn.unread)
        return ChatRow(
            [turn.message for turn in turns],
            tools,
            frozenset(at for at, turn in enumerate(turns) if turn.message["role"] == "assistant"),
            place,
            options,
            (*unread, *ignored),
            {at: turn.calls for at, turn in enumerate(turns) if turn.calls},
            {at: turn.reasoning for at, turn in enumerate(turns) if turn.reasoning},
            Columns(columns),
        )


class TextReader(RowReader):
    """Converts rows to documents of plain text."""

    kind: ClassVar[str] = TEXT

    def describe(self) -> list[str]:
        count = self.tally["blank"]
        several = "s hold no text and are" if count > 1 else " holds no text and is"
        return [f"{count} row{several} left out"] if count else []

    def read(self, row: Any, place: str = "") -> ChatRow:
        if isinstance(row, str):
            row = {"text": row}
        row, layout = self._find_layout(row)
        key = layout.keys["text"]
        text = row[key]
        if not isinstance(text, str):
            raise RowProblem(f"{key} is not a text but {type(text).__name__}")
        check_characters(text)
        unread = tuple(name for name in row if name != key and not is_empty(row[name]))
        return ChatRow([], place=place, unread=unread, beside=PlainText(text))

    def read_all(self, row: Any, place: str = "") -> Iterator[ChatRow]:
        found = self.read(row, place)
        if isinstance(found.beside, PlainText) and found.beside.text.strip():
            yield found
        else:
            self.tally["blank"] += 1


class DistillationReader(RowReader):
    """Converts rows to conversations, and those without an answer to prompts."""

    def __init__(self, *given: Any, **options: Any) -> None:
        """Read rows; the arguments are those of RowReader."""
        super().__init__(*given, **options)
        self._prompts = PromptReader(*given, **options)

    def read(self, row: Any, place: str = "") -> ChatRow:
        try:
            return super().read(row, place)
        except NoAnswerProblem:
            pass
        found = self._prompts.read(row, place)
        self.formats |= self._prompts.formats
        return found

    def _unknown_row(self, row: Mapping[str, Any]) -> RowProblem:
        return NoAnswerProblem(str(super()._unknown_row(row)))


READERS: Mapping[tuple[str, ...], type[RowReader]] = {
    (CONVERSATION,): RowReader,
    (PairReader.kind,): PairReader,
    (LABELLED,): LabelledReader,
    (PROMPT,): PromptReader,
    (TEXT,): TextReader,
    (CONVERSATION, PROMPT): DistillationReader,
}
"""The reader of each set of kinds that an objective takes."""


def reader_for(
    objective: str, form: str, columns: Mapping[str, str] | None = None, roles: Mapping[str, str] | None = None
) -> RowReader:
    """Return the reader of an objective's rows.

    Args:
        objective: The value of `objective.kind`.
        form: The value of `data.format`.
        columns: What keys mean: meaning -> key.
        roles: Roles by hand: name -> role.

    Raises:
        ConfigError: If the format is that of another objective.
    """
    kinds = kinds_of(objective)
    known = [name for kind in kinds for name in formats_of(kind)]
    if form != "auto" and form not in known:
        what = " or ".join(KINDS[kind].description for kind in kinds)
        raise ConfigError(
            f"data.format is {form}, and the objective {objective} takes {what}",
            f"Set data.format to auto, or to one of {', '.join(known)}",
        )
    return READERS[kinds](form, columns, roles, f"the objective here is {objective}")
