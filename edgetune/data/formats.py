"""From rows of the common fine-tuning formats to conversations.

row_layouts.py finds which key of a row means what. All problems of a file are reported together, each with its place.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from edgetune.data import key_names as names
from edgetune.data.chat_rows import ChatRow
from edgetune.data.key_names import KeyFinder, fold
from edgetune.data.messages import (
    Content,
    Conversation,
    MessageReader,
    Turn,
    check_characters,
    is_empty,
    is_unicode,
    parse_call_text,
    parse_json_text,
    parse_objects,
    read_content,
    read_flag,
)
from edgetune.data.problems import RowProblem, RowProblems
from edgetune.data.row_kinds import CONVERSATION, KINDS, LABELLED, PAIR, PROMPT, TEXT
from edgetune.data.row_layouts import BESIDE, FORMATS, LayoutFinder, RowLayout, foreign_rows
from edgetune.errors import DataError
from edgetune_converters.chat_template import RESERVED

__all__ = ["COLUMNS", "FORMATS", "ChatRow", "Conversation", "RowReader", "convert_rows", "detect_format", "to_chat_row"]

COLUMNS = (
    "messages", "role", "content", "user", "input", "assistant", "system", "tools", "chosen", "rejected", "label",
    *("text", "task"),
)  # fmt: skip
"""What data.columns can give a name of its own."""
SHOWN_KEYS = 20
_COLUMNS_HINT = (
    "Rename the keys, or name them with data.columns, such as {user: question, assistant: reply} or "
    "{messages: talk, role: who, content: said}; docs/data.md lists the known ones"
)


class NoAnswerProblem(RowProblem):
    """The problem of a conversation without an answer."""


class RowReader:
    """Converts rows to conversations, and counts the formats and columns that it meets."""

    kind: ClassVar[str] = CONVERSATION
    """The kind of rows that it reads (row_kinds.py)."""

    def __init__(
        self,
        form: str = "auto",
        columns: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        wanted: str = "the objective here is sft",
    ) -> None:
        """Read rows of a format, or of any ("auto"), with keys and roles that are named by hand.

        Args:
            form: The format.
            columns: What keys mean: meaning -> key.
            roles: Roles by hand: name -> role.
            wanted: What messages about rows of another kind say is wanted.
        """
        self._form = form
        self._columns = dict(columns or {})
        self._roles = dict(roles or {})
        self.wanted = wanted
        self._origin = "data.columns"
        self._derived: list[RowReader] = []
        self._finder = LayoutFinder(form, self._columns, self.kind)
        self._messages = MessageReader(self._columns.get("role"), self._columns.get("content"), roles)
        self.formats: dict[str, None] = {}
        """The formats of the rows, in order of first occurrence."""
        self.tally: Counter[str] = Counter()
        """Numbers for notes about what became of the rows."""

    def describe(self) -> list[str]:
        """Return notes about what became of the rows."""
        return []

    def derive(self, columns: Mapping[str, str], roles: Mapping[str, str], origin: str) -> RowReader:
        """Return a reader with further columns and roles, whose counts are those of this one.

        Args:
            columns: What keys mean: meaning -> key. Those of this reader come first.
            roles: Roles by name; those of this reader come first.
            origin: What messages call the columns: 'dataset_info.json, identity'.
        """
        derived = type(self)(self._form, {**columns, **self._columns}, {**roles, **self._roles}, self.wanted)
        derived.tally, derived._origin = self.tally, origin
        self._derived.append(derived)
        return derived

    def read_all(self, row: Any, place: str = "") -> Iterator[ChatRow]:
        """Yield what a row becomes: one row, or several of a list of ranked answers. Raises RowProblem."""
        yield self.read(row, place)

    def check_columns(self, *others: RowReader) -> None:
        """Raise DataError for entries of data.columns whose key no row had, of this reader or of others."""
        for derived in self._derived:
            derived.check_columns(self, *others)
        readers = (self, *others, *self._derived)
        seen = {key for reader in readers for key in reader._finder.seen | reader._messages.seen}
        unseen = {meaning: key for meaning, key in self._columns.items() if key not in seen}
        if not unseen:
            return
        keys = [*dict.fromkeys(key for reader in readers for key in reader._finder.known_keys)]
        of_messages = self._messages.known_keys if unseen.keys() & {"role", "content"} else []
        raise DataError(
            f"{self._origin} names {', '.join(f'{key!r} ({meaning})' for meaning, key in unseen.items())}, "
            "which no row has",
            f"The keys of the rows are {', '.join(keys[:SHOWN_KEYS]) or 'none'}"
            + (f", and of the messages {', '.join(of_messages[:SHOWN_KEYS])}" if of_messages else ""),
        )

    def read(self, row: Any, place: str = "") -> ChatRow:
        """Convert a row to a conversation with at least one assistant message. Raises RowProblem."""
        row, layout = self._find_layout(row)
        found = self._read(row, layout, place)
        key = layout.keys.get("task")
        return found if key is None else replace(found, task=str(row[key]))

    def _read(self, row: Mapping[str, Any], layout: RowLayout, place: str) -> ChatRow:
        plain = None
        if layout.plain_messages is not None:
            given = row[layout.plain_messages]
            plain = self._messages.read_plain(given) if type(given) is list else None
        elif layout.is_pair:
            plain = _plain_pair(row, layout.keys)
        if plain is None:
            return self._convert(row, layout, place)
        if len(layout.keys) > 1 and "messages" in layout.keys:
            tools, options, unread = read_beside(row, layout)
            return ChatRow(plain, tools, place=place, options=options, unread=unread)
        return ChatRow(plain, place=place, unread=_unread(row, layout))

    def _find_layout(self, row: Any) -> tuple[Mapping[str, Any], RowLayout]:
        """Return a row and what its keys mean. Raises RowProblem for a row of another kind or in no known format."""
        if type(row) is not dict:
            row = _as_row(row)
        layout = self._choose_layout(row)
        for check, keys in layout.checks:
            check(row, keys, self.wanted)
        if layout.form is None:
            raise self._unknown_row(row)
        if layout.form not in self.formats:
            self.formats[layout.form] = None
        return row, layout

    def _choose_layout(self, row: Mapping[str, Any]) -> RowLayout:
        """Return what the keys that are not empty mean; or, where that is nothing, those that are not null."""
        if self._columns:  # a key that is empty in every row is there
            self._finder.seen.update(key for key in self._columns.values() if key in row)
        filled = tuple(row) if all(row.values()) else tuple([k for k, v in row.items() if v or _is_number(v)])
        layout = self._finder.find(filled)
        if layout.form is None:
            return self._finder.find(tuple([key for key, value in row.items() if value is not None]))
        key = layout.keys.get("messages")
        if key is None or key == self._columns.get("messages") or self._may_be_messages(row[key]):
            return layout
        others = self._finder.find_without(key, tuple([k for k, v in row.items() if v is not None]))
        return layout if others.form is None else others

    def _may_be_messages(self, value: Any) -> bool:
        """Whether a value is a list of messages or can be read as one; not so is `turns: 3` beside other keys."""
        if type(value) is list:
            return bool(value) and type(value[0]) is dict and self._messages.has_role(value[0])
        return isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip()[:1] in ("[", "{"))

    def _convert(self, row: Mapping[str, Any], layout: RowLayout, place: str) -> ChatRow:
        turns, ignored = self._all_turns(row, layout.keys)
        if not any(turn.message["role"] == "assistant" for turn in turns):
            answers = [key for key in layout.unread if fold(key) in _ANSWERS and not is_empty(row[key])]
            more = f"; {', '.join(answers)} beside the messages is no part of them" if answers else ""
            raise NoAnswerProblem(f"has no assistant message, so there is nothing to learn from it{more}")
        row_is_trained, flags = read_weights(row, layout.weights)
        tools, options, beside = read_beside(row, layout)
        messages = [turn.message for turn in turns]
        check_characters(messages)
        unread = [key for key in beside if key not in flags]
        unread += [f"{key} of a message" for key in dict.fromkeys(key for turn in turns for key in turn.unread)]
        untrained = [
            i for i, t in enumerate(turns) if t.message["role"] == "assistant" and not (t.trained and row_is_trained)
        ]
        calls = {i: turn.calls for i, turn in enumerate(turns) if turn.calls}
        reasoning = {i: turn.reasoning for i, turn in enumerate(turns) if turn.reasoning}
        return ChatRow(messages, tools, frozenset(untrained), place, options, (*unread, *ignored), calls, reasoning)

    def _all_turns(self, row: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[list[Turn], list[str]]:
        """Return the turns of a row, and the labels of what is ignored."""
        if "messages" not in keys:
            answer = self._side(row[keys["assistant"]], keys["assistant"], "assistant")
            return [*self._earlier(row, keys), *self._question(row, keys), *answer], []
        return self._join(row, keys, self._turns(row[keys["messages"]], keys["messages"]))

    def _join(self, row: Mapping[str, Any], keys: Mapping[str, str], turns: list[Turn]) -> tuple[list[Turn], list[str]]:
        """Return messages behind the system prompt and the history beside them, and the labels of what is ignored."""
        earlier = self._earlier(row, keys)
        if earlier and turns and turns[0].message["role"] == "system":
            same = turns[0].message["content"] == earlier[0].message["content"]
            return turns, [] if same else [f"{keys['system']} beside messages that begin with a system message"]
        return [*earlier, *turns], []

    def _earlier(self, row: Mapping[str, Any], keys: Mapping[str, str]) -> list[Turn]:
        """Return the system prompt and the history of a row."""
        system = _system(row[keys["system"]], keys["system"]) if "system" in keys else []
        return [*system, *(self._history(row[keys["history"]], keys["history"]) if "history" in keys else [])]

    def _question(self, row: Mapping[str, Any], keys: Mapping[str, str]) -> list[Turn]:
        user = keys["user"]
        prompt = self._side(row[user], user, "user")
        if "input" in keys and not is_empty(row[keys["input"]]):
            extra = _text(row[keys["input"]], keys["input"])
            message = prompt[0].message
            if len(prompt) > 1 or message["role"] != "user" or prompt[0].reasoning is not None:
                raise RowProblem(f"{keys['input']} cannot follow {user}, which is no text; write it into the messages")
            given = message["content"]
            prompt = [Turn({**message, "content": f"{given}\n{extra}" if given else extra}, unread=prompt[0].unread)]
        return prompt

    def _side(self, value: Any, key: str, role: str) -> list[Turn]:
        """Convert a prompt or completion: one text, or messages as TRL writes them."""
        listed = [value] if isinstance(value, Mapping) else value
        if isinstance(listed, list) and any(self._messages.is_message(each) for each in listed):
            return self._turns(listed, key)
        if isinstance(value, list) and len(value) > 1 and all(isinstance(each, str) for each in value):
            raise RowProblem(f"{key} is a list of {len(value)} texts; give one text")
        if key == "answers" and isinstance(value, list):  # tool calls, as in the rows of xLAM
            value = json.dumps(value, ensure_ascii=False)
        content = read_content(value, key)
        calls = parse_call_text(content.text) if key == "answers" else None
        message = {"role": role, "content": content.text}
        return [Turn(message, True, calls, content.reasoning, tuple(content.unread))]

    def _turns(self, value: Any, key: str) -> list[Turn]:
        given = _as_messages(value, key)
        turns: list[Turn] = []
        for number, each in enumerate(given, 1):
            if isinstance(each, str):
                raise RowProblem(f"message {number} of {key} is a text without a role", _MESSAGE_HINT)
            if not isinstance(each, Mapping):
                raise RowProblem(f"message {number} of {key} is not an object", _MESSAGE_HINT)
            try:
                turns += self._messages.read(each)
            except RowProblem as problem:
                raise RowProblem(f"message {number}: {problem}", problem.hint) from None
        return turns

    def _history(self, value: Any, key: str) -> list[Turn]:
        """Convert earlier turns: messages, or [user, assistant] pairs."""
        given = parse_json_text(value, key) if isinstance(value, str) and value else value or []
        if isinstance(given, list) and given and all(isinstance(each, Mapping) for each in given):
            return self._turns(given, key)
        turns = []
        for pair in given if isinstance(given, list) else [given]:
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise RowProblem(f"{key} is not a list of [instruction, output] pairs")
            turns += [_turn("user", _text(pair[0], key)), _turn("assistant", _text(pair[1], key))]
        return turns

    def _unknown_row(self, row: Mapping[str, Any]) -> RowProblem:
        present = [str(key) for key, value in row.items() if value is not None]
        finder = KeyFinder(present)
        if len(present) > SHOWN_KEYS:
            present = [*present[:SHOWN_KEYS], f"and {len(present) - SHOWN_KEYS} more"]
        if self._messages.is_message(row):
            return RowProblem(
                f"is a single message ({', '.join(present)}), not a conversation",
                'Put the messages of a conversation into one row: {"messages": [...]}',
            )
        if half := self._half_a_pair(finder):
            return half
        if other := self._other_kind(row):
            return other
        found = finder.first((*names.INSTRUCTION_KEYS, *names.PROMPT_KEYS))
        reply = finder.first(names.COMPLETION_KEYS)
        missing = f" ({found} has no answer beside it{self._prompts_alone()})" if found and not reply else ""
        missing = missing or (f" ({reply} has no question beside it)" if reply and not found else "")
        return RowProblem(
            f"in no known format; its keys are {', '.join(present) or 'none'}{missing}; looked for "
            + "; or ".join(each.keys for each in self._finder.formats.values()),
            _COLUMNS_HINT,
        )

    def _half_a_pair(self, finder: KeyFinder) -> RowProblem | None:
        """Return the problem of a preference pair that lacks one of its answers."""
        better, worse = finder.first(names.CHOSEN_KEYS), finder.first(names.REJECTED_KEYS)
        if self.kind != PAIR or bool(better) == bool(worse):
            return None
        lacking = "rejected" if better else "chosen"
        return RowProblem(
            f"has {better or worse} and no {lacking} answer beside it",
            f"Add the {lacking} answer; data.columns.{lacking} names a key of your own",
        )

    def _prompts_alone(self) -> str:
        if self.kind not in (CONVERSATION, LABELLED):
            return ""
        return f"; prompts alone are rows for the objectives {', '.join(KINDS[PROMPT].objectives)}"

    def _other_kind(self, row: Mapping[str, Any]) -> RowProblem | None:
        """Return the problem of a row of another kind than this reader's; None if its kind is not known."""
        if self._form != "auto":
            return None
        present = tuple(key for key, value in row.items() if not is_empty(value))
        for kind in (PAIR, LABELLED, CONVERSATION, TEXT, PROMPT):
            if kind == self.kind or (kind == PROMPT and self.kind in (CONVERSATION, LABELLED)):
                continue
            layout = LayoutFinder("auto", {}, kind).find(present)
            if layout.form is None or (kind == LABELLED and "label" not in layout.keys):
                continue
            keys = [key for meaning, key in layout.keys.items() if meaning not in BESIDE]
            if kind in (CONVERSATION, LABELLED) and self._asks_only(row, layout):
                return foreign_rows(f"{' and '.join(map(str, keys))} without an answer", PROMPT, self.wanted)
            return foreign_rows(" and ".join(map(str, keys)), kind, self.wanted)
        return None

    def _asks_only(self, row: Mapping[str, Any], layout: RowLayout) -> bool:
        """Whether a row is a list of messages none of which is an answer."""
        if "messages" not in layout.keys:
            return False
        try:
            turns = self._turns(row[layout.keys["messages"]], layout.keys["messages"])
        except RowProblem:
            return False
        return all(turn.message["role"] != "assistant" for turn in turns)


_MESSAGE_HINT = 'Write each message as {"role": "user", "content": "..."}'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _as_row(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # JSON within JSON
        value = parse_json_text(value, "the row")
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        return {"messages": value}
    if not isinstance(value, Mapping):
        raise RowProblem(f"not an object but {type(value).__name__}")
    return value


def _plain_pair(row: Mapping[str, Any], keys: Mapping[str, str]) -> Conversation | None:
    """Return a question and an answer that are texts; None for others."""
    user, answer, extra = row[keys["user"]], row[keys["assistant"]], row[keys["input"]] if "input" in keys else ""
    if not (type(user) is type(answer) is type(extra) is str) or keys["assistant"] == "answers":
        return None
    if not (is_unicode(user) and is_unicode(answer) and is_unicode(extra)):
        return None
    if extra:
        user = f"{user}\n{extra}" if user else extra
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def read_weights(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[bool, list[str]]:
    """Return whether a row is trained on, and the keys that said so."""
    flags = [
        key
        for key in keys
        if row[key] is not None
        and (fold(key) in _WEIGHTS or isinstance(row[key], bool) or str(row[key]).lower() in ("true", "false"))
    ]
    trained = [read_flag(key, row[key], "the row") for key in flags]
    return all(trained), flags


_ANSWERS = {fold(name) for name in names.COMPLETION_KEYS}
_WEIGHTS = {fold(name) for name in names.ROW_WEIGHT_KEYS}


def _unread(row: Mapping[str, Any], layout: RowLayout) -> tuple[str, ...]:
    if not layout.unread or all(row.values()):
        return layout.unread
    return tuple([key for key in layout.unread if not is_empty(row[key])])


def read_beside(row: Mapping[str, Any], layout: RowLayout) -> tuple[Any, dict[str, Any], tuple[str, ...]]:
    """Return the tools and the template options of a row, and the keys that are not read."""
    unread = _unread(row, layout)
    tools = _tools(row, layout.keys.get("tools"))
    options = _options(row, layout.keys) if layout.keys.keys() & {"options", "documents"} else {}
    if tools or options:
        check_characters([tools, options])
    if "documents" in layout.keys and "documents" not in options:
        unread = (*unread, layout.keys["documents"])
    return tools, options, unread


def _tools(row: Mapping[str, Any], key: str | None) -> list[dict[str, Any]] | None:
    """Return the tools of a row; `functions` is the older form. None for an empty list."""
    if key is None:
        return None
    found = parse_objects(row[key], key)
    if fold(key) == "functions":
        found = [{"type": "function", "function": each} for each in found]
    return found or None


def _options(row: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Return the template options of a row, without nulls, which stand for absent fields in tables."""
    key = keys.get("options")
    value = None if key is None else row[key]
    if isinstance(value, str):
        value = parse_json_text(value, str(key)) if value.strip() else None
    if not isinstance(value, Mapping | None):
        raise RowProblem(f"{key} is not an object of template options")
    options = {} if value is None else {name: each for name, each in value.items() if each is not None}
    reserved = next((name for name in RESERVED if name in options), None)
    if reserved:
        raise RowProblem(f"{key} sets {reserved}, which only the row itself can set")
    documents = row[keys["documents"]] if "documents" in keys else None
    if isinstance(documents, list) and documents and all(isinstance(each, Mapping) for each in documents):
        options["documents"] = documents
    return options


def _as_messages(value: Any, key: str) -> list[Any]:
    """Return a list of messages that is given as such, as JSON text, as one message or as columns of equal length."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json_text(value, key)
        except RowProblem as problem:
            raise RowProblem(f"{key} is not a list of messages: {problem}", _MESSAGE_HINT) from None
    if isinstance(value, Mapping):
        columns = list(value.values())
        if not columns or not any(isinstance(each, list) for each in columns):
            return [value]
        lengths = {len(each) for each in columns if isinstance(each, list)}
        if len(lengths) > 1 or not all(isinstance(each, list) or each is None for each in columns):
            sizes = ", ".join(f"{name}: {len(v) if isinstance(v, list) else 'one'}" for name, v in value.items())
            raise RowProblem(f"{key} is an object of columns that differ in length ({sizes})")
        kept = {name: each for name, each in value.items() if each is not None}
        value = [
            {name: cell for name, cell in zip(kept, cells, strict=True) if cell is not None or name == "content"}
            for cells in zip(*kept.values(), strict=True)
        ]
    if not isinstance(value, list) or not value:
        raise RowProblem(f"{key} is not a list of messages" if value else f"{key} is empty")
    return value


def _system(value: Any, key: str) -> list[Turn]:
    """Convert a system prompt: a text, a list of parts, or an object with such a list."""
    if isinstance(value, Mapping):
        inner = KeyFinder(value).first(("content", "parts", "text"))
        value = value[inner] if inner is not None else value
    content = _text(value, key) if not is_empty(value) else ""
    return [_turn("system", content)] if content else []


def _text(value: Any, key: str) -> str:
    content: Content = read_content(value, key)
    if content.reasoning is not None:
        raise RowProblem(f"{key} has a part of the type reasoning, which only messages can have")
    return content.text


def _turn(role: str, text: str) -> Turn:
    return Turn({"role": role, "content": text})


def detect_format(row: Mapping[str, Any]) -> str | None:
    """Return the first format that matches the keys of the row."""
    reader = RowReader()
    return reader._choose_layout(row).form


def to_chat_row(row: Any, form: str = "auto", place: str = "") -> ChatRow:
    """Convert one row; see RowReader.read."""
    return RowReader(form).read(row, place)


def convert_rows(
    rows: Iterable[tuple[str, Any]], reader: RowReader | None = None, problems: RowProblems | None = None
) -> list[ChatRow]:
    """Convert all rows, given as (place, row). Without `problems`, raise one DataError for all problems."""
    found = RowProblems() if problems is None else problems
    result = list(iterate_rows(rows, reader or RowReader(), found))
    if problems is None:
        found.raise_if_any()
    return result


def iterate_rows(rows: Iterable[tuple[str, Any]], reader: RowReader, problems: RowProblems) -> Iterator[ChatRow]:
    """Yield the rows that can be converted, and add the problems of others."""
    is_one_to_one = type(reader).read_all is RowReader.read_all
    for place, row in rows:
        if isinstance(row, RowProblem):
            problems.add(place, str(row), row.hint)
            continue
        try:
            if is_one_to_one:
                yield reader.read(row, place)
            else:
                yield from reader.read_all(row, place)
        except RowProblem as problem:
            problems.add(place, str(problem), problem.hint)
