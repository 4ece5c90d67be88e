"""Rows of a file as prompts: messages, pairs, instructions or plain text, in any format of training data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data.chat import Message
from edgetune.data.chat_rows import ChatRow, Pair, PlainText
from edgetune.data.formats import RowReader
from edgetune.data.objective_readers import DistillationReader, LabelledReader, TextReader
from edgetune.data.pair_reader import PairReader
from edgetune.data.problems import LISTED_ROWS, RowProblem, RowProblems
from edgetune.data.row_files import RowFile
from edgetune.errors import DataError, RuntimeProblem
from edgetune.runtime import Runtime

GENERATED = "generated"
"""Key of a row of answers: the text. Further keys begin with it."""
_WANTED = "prompts are answered here"
_FORMATS_HINT = "docs/data.md lists the formats"
_SKIP_HINT = "Correct these rows, or leave them out with --skip-bad-rows"


@dataclass(frozen=True)
class PromptRow:
    """A row, and the prompt in it.

    Attributes:
        place: Place of the row for messages: 'rows.jsonl, line 3'.
        source: The row as it is given; a text alone is its `prompt`.
        messages: Conversation up to the answer; None for plain text.
        tools: JSON schemas of the tools of the row.
        options: Template options, of the row and of all rows.
        ids: Token ids of the prompt.
    """

    place: str
    source: Mapping[str, Any]
    messages: Sequence[Message] | None
    tools: Sequence[Mapping[str, Any]] | None
    options: Mapping[str, Any]
    ids: NDArray[np.int32]


class RowPrompts:
    """Reads rows as prompts for one model."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        max_tokens: int,
        raw: bool = False,
        system: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Read prompts.

        Args:
            runtime: The model.
            max_tokens: Maximum number of tokens of an answer, for messages about prompts that are too long.
            raw: Whether prompts are plain text, without the chat template.
            system: System message of rows that have none.
            options: Template options of rows that do not set them.
        """
        self._runtime, self._max_tokens, self._raw = runtime, max_tokens, raw
        self._system, self._options = system, dict(options or {})
        self._text = TextReader(wanted=_WANTED)
        self._conversations: list[RowReader] = [
            kind(wanted=_WANTED) for kind in (DistillationReader, PairReader, LabelledReader)
        ]
        self.own_system = 0
        """Rows whose own system message was used in place of that of all rows."""

    def read_file(self, path: Path, problems: RowProblems, name: str | None = None) -> Iterator[PromptRow]:
        """Yield the prompts of a file, and add the rows that have none, or one that the model cannot take.

        Args:
            path: The file.
            problems: Where bad rows are added.
            name: What messages call the file; its path by default.
        """
        if not path.is_file():
            raise DataError(f"there is no file {path}", "Give a file of rows, for instance .jsonl, .csv or .txt")
        for place, row in RowFile(path, name or str(path), sample_by="line").rows():
            try:
                if isinstance(row, RowProblem):
                    raise row
                yield self._read(row, place)
            except RowProblem as problem:
                problems.add(place, str(problem), problem.hint)
            except (DataError, RuntimeProblem) as error:
                problems.add(place, error.message, error.hint)

    def _read(self, row: Any, place: str) -> PromptRow:
        source = {"prompt": row} if isinstance(row, str) else {"messages": row} if isinstance(row, list) else row
        if not isinstance(source, dict):
            raise RowProblem(f"is {type(row).__name__}, not an object or a text", _FORMATS_HINT)
        taken = next((key for key in source if str(key).startswith(GENERATED)), None)
        if taken is not None:
            raise RowProblem(f"has the key {taken!r}, which answers have", "Rename the key")
        if self._raw:
            ids = self._runtime.tokenize(self._plain_text(source, place))
            return PromptRow(place, source, None, None, {}, self._checked(ids))
        found = self._conversation(source, place)
        messages = self._with_system(_before_answer(found))
        options = {**self._options, **found.options}
        ids = self._runtime.tokenize_chat(messages, tools=found.tools, template_options=options)
        return PromptRow(place, source, messages, found.tools, options, self._checked(ids))

    def _checked(self, ids: Sequence[int]) -> NDArray[np.int32]:
        return self._runtime.check_prompt(ids, self._max_tokens)

    def _plain_text(self, row: dict[str, Any], place: str) -> str:
        if isinstance(row.get("prompt"), str):
            return str(row["prompt"])
        found = self._text.read(row, place).beside
        assert isinstance(found, PlainText)
        return found.text

    def _conversation(self, row: dict[str, Any], place: str) -> ChatRow:
        """Return the row by the first reader that knows its keys; the problem is that of the first reader."""
        first: RowProblem | None = None
        for reader in self._conversations:
            try:
                return reader.read(row, place)
            except RowProblem as problem:
                first = first or problem
        if isinstance(row.get("text"), str):
            return ChatRow([{"role": "user", "content": row["text"]}], place=place)
        assert first is not None
        raise first

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self._system is None:
            return messages
        if messages[0]["role"] == "system":
            self.own_system += 1
            return messages
        return [{"role": "system", "content": self._system}, *messages]


def _before_answer(row: ChatRow) -> list[Message]:
    """Return the messages before the answers at the end of a row."""
    end = row.beside.prompt if isinstance(row.beside, Pair) else len(row.messages)
    while end and row.messages[end - 1]["role"] == "assistant":
        end -= 1
    if not any(message["role"] != "system" for message in row.messages[:end]):
        raise RowProblem("has no message to answer", "Give a message of the user")
    return list(row.messages[:end])


def raise_problems(problems: RowProblems) -> None:
    """Raise one DataError that names every bad row with its line, unless they are skipped."""
    if problems.count and not problems.skip:
        raise DataError.of_many(
            "rows cannot be answered", problems.rows[:LISTED_ROWS], _SKIP_HINT, total=problems.count
        )


def format_row(row: Mapping[str, Any]) -> str:
    """Return a row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace").decode() + "\n"
