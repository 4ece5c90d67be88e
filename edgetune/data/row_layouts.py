"""What the keys of a row mean: found once for each set of keys, by the names of key_names.py and of data.columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from edgetune.data import key_names as names
from edgetune.data.key_names import KeyFinder, fold
from edgetune.data.messages import LAYOUTS, check_mask, check_media, is_empty
from edgetune.data.problems import RowProblem
from edgetune.data.row_kinds import CONVERSATION, KINDS, LABELLED, PAIR, PROMPT, TEXT


@dataclass(frozen=True)
class RowFormat:
    """A format of rows."""

    keys: str
    """Its keys, for the message about a row in no known format."""
    find: Callable[[KeyFinder], dict[str, str] | None]
    """Returns what each of the keys means (messages, user, input, assistant); None for a row in another format."""
    names: Callable[[], Mapping[str, Sequence[str]]]
    """The names of the keys, for docs/data.md."""
    kinds: Sequence[str] = (CONVERSATION, LABELLED)
    """The kinds of rows (row_kinds.py) that have this format."""


def _find_messages(finder: KeyFinder) -> dict[str, str] | None:
    key = finder.first(names.MESSAGES_KEYS)
    return None if key is None else {"messages": key}


def _find_alpaca(finder: KeyFinder) -> dict[str, str] | None:
    user, assistant = finder.first(names.INSTRUCTION_KEYS), finder.first(names.OUTPUT_KEYS)
    if user is None or assistant is None:
        return None
    extra = finder.first(names.INPUT_KEYS)
    return {"user": user, "assistant": assistant} | ({} if extra is None else {"input": extra})


def _find_pair(finder: KeyFinder) -> dict[str, str] | None:
    others = [(prompt, completion) for prompt in names.PROMPT_KEYS for completion in names.COMPLETION_KEYS]
    for prompt, completion in (*names.PAIRS, *others):
        user, assistant = finder.first([prompt]), finder.first([completion])
        if user is not None and assistant is not None:
            return {"user": user, "assistant": assistant}
    return None


def _find_prompt(finder: KeyFinder) -> dict[str, str]:
    """Return the keys of the messages before an answer: of all that there are, since one may repeat another."""
    named = {
        "messages": finder.find("messages", names.MESSAGES_KEYS),
        "user": finder.find("user", (*names.INSTRUCTION_KEYS, *names.PROMPT_KEYS)),
        "input": finder.find("input", names.INPUT_KEYS if finder.first(names.INSTRUCTION_KEYS) else ()),
    }
    found = {meaning: key for meaning, key in named.items() if key is not None}
    if found.get("input") == found.get("user"):
        found.pop("input", None)
    return found


def _find_preference(finder: KeyFinder) -> dict[str, str] | None:
    """Find a better and a worse answer; the better one may also be the end of the messages."""
    chosen, rejected = finder.find("chosen", names.CHOSEN_KEYS), finder.find("rejected", names.REJECTED_KEYS)
    if rejected is None:
        return None
    found = _find_prompt(finder)
    if chosen is not None:
        return {**found, "chosen": chosen, "rejected": rejected}
    answer = finder.find("assistant", [name for name in names.COMPLETION_KEYS if name not in names.RANKED_KEYS])
    if "messages" in found:
        return {**found, "rejected": rejected}
    if "user" in found and answer is not None and answer != found["user"]:
        return {**found, "chosen": answer, "rejected": rejected}
    return None


def _find_ranked(finder: KeyFinder) -> dict[str, str] | None:
    responses, found = finder.first(names.RANKED_KEYS), _find_prompt(finder)
    if responses is None or not found or responses in found.values():
        return None
    scores = finder.first(names.SCORES_KEYS)
    return {**found, "responses": responses} | ({} if scores is None else {"scores": scores})


def _find_prompt_alone(finder: KeyFinder) -> dict[str, str] | None:
    found = _find_prompt(finder)
    if "messages" in found:
        return {"messages": found["messages"]}
    return found if "user" in found else None


def _find_text(finder: KeyFinder) -> dict[str, str] | None:
    key = finder.find("text", names.TEXT_KEYS)
    return None if key is None else {"text": key}


_PROMPT_NAMES: Mapping[str, Sequence[str]] = {
    "messages": names.MESSAGES_KEYS,
    "or user": (*names.INSTRUCTION_KEYS, *names.PROMPT_KEYS),
    "appended to an instruction": names.INPUT_KEYS,
}


def _conversation_names(keys: Sequence[str]) -> dict[str, Sequence[str]]:
    return {"conversation": keys, "role": names.ROLE_KEYS, "content": names.CONTENT_KEYS}


FORMATS: Mapping[str, RowFormat] = {
    "messages": RowFormat(
        'messages [{"role", "content"}]',
        _find_messages,
        lambda: _conversation_names([key for key in names.MESSAGES_KEYS if key not in names.SHAREGPT_KEYS]),
    ),
    "sharegpt": RowFormat(
        'sharegpt conversations [{"from", "value"}]', _find_messages, lambda: _conversation_names(names.SHAREGPT_KEYS)
    ),
    "alpaca": RowFormat(
        "alpaca instruction + output [+ input, system, history]",
        _find_alpaca,
        lambda: {"user": names.INSTRUCTION_KEYS, "appended": names.INPUT_KEYS, "assistant": names.OUTPUT_KEYS},
    ),
    "prompt-completion": RowFormat(
        "prompt + completion (or question + answer)",
        _find_pair,
        lambda: {"user": names.PROMPT_KEYS, "assistant": names.COMPLETION_KEYS},
    ),
    "preference": RowFormat(
        "chosen + rejected [+ prompt or messages]",
        _find_preference,
        lambda: {"better": names.CHOSEN_KEYS, "worse": names.REJECTED_KEYS, **_PROMPT_NAMES},
        (PAIR,),
    ),
    "ranked": RowFormat(
        "prompt or messages + responses, the best one first or with scores",
        _find_ranked,
        lambda: {"answers": names.RANKED_KEYS, "scores": names.SCORES_KEYS, **_PROMPT_NAMES},
        (PAIR,),
    ),
    "prompt": RowFormat(
        "prompt, question or messages without an answer", _find_prompt_alone, lambda: _PROMPT_NAMES, (PROMPT,)
    ),
    "text": RowFormat("text", _find_text, lambda: {"text": names.TEXT_KEYS}, (TEXT,)),
}


def formats_of(kind: str) -> dict[str, RowFormat]:
    """Return the formats of a kind of rows."""
    return {name: form for name, form in FORMATS.items() if kind in form.kinds}


@dataclass(frozen=True)
class RowLayout:
    """What the keys of a row mean."""

    form: str | None
    """Its format; None for a row in no known one."""
    keys: Mapping[str, str]
    """messages, user, input, assistant, system, tools, history -> the key."""
    checks: Sequence[tuple[_Check, Sequence[str]]]
    """Keys whose value may refuse the row."""
    weights: Sequence[str]
    """Keys that say whether the row is trained on."""
    unread: tuple[str, ...]

    @cached_property
    def plain_messages(self) -> str | None:
        """The key of the messages, if no other key adds or excludes one."""
        beside = self.keys.keys() - {"tools", "options", "documents", "task"}
        return self.keys["messages"] if beside == {"messages"} and not self.weights else None

    @cached_property
    def is_pair(self) -> bool:
        """Whether a question and an answer are all that there is to read."""
        return "user" in self.keys and self.keys.keys() <= {"user", "input", "assistant", "task"} and not self.weights


def _refuse_media(row: Mapping[str, Any], keys: Sequence[str], wanted: str) -> None:
    for key in keys:
        check_media(key, row[key])


def foreign_rows(has: str, kind: str, wanted: str) -> RowProblem:
    """Return the problem of a row of another kind than the objective's.

    Args:
        has: What shows the kind of the row: 'chosen and rejected'.
        kind: The kind of the row.
        wanted: What is wanted here: 'the objective here is sft'.
    """
    row_kind = KINDS[kind]
    several = "s" if len(row_kind.objectives) > 1 else ""
    return RowProblem(
        f"has {has}: these are rows for the objective{several} {', '.join(row_kind.objectives)}; {wanted}",
        f"Set objective.kind to {' or '.join(row_kind.objectives)}, or give other rows; data.columns names keys of "
        "your own",
    )


def _refuse_preference(row: Mapping[str, Any], keys: Sequence[str], wanted: str) -> None:
    pair = [key for key in keys if not is_empty(row[key])]
    if pair:
        raise foreign_rows(" and ".join(pair), PAIR, wanted)


def _refuse_rating(row: Mapping[str, Any], keys: Sequence[str], wanted: str) -> None:
    for key in keys:
        text = str(row[key]).strip().lower()
        if isinstance(row[key], bool | str) and text in ("true", "false"):
            raise foreign_rows(f"the {key} {text}", LABELLED, wanted)


def _refuse_mask(row: Mapping[str, Any], keys: Sequence[str], wanted: str) -> None:
    for key in keys:
        check_mask(key, row[key])


_Check = Callable[[Mapping[str, Any], Sequence[str], str], None]
_CHECKS: Sequence[tuple[_Check, Sequence[str], Sequence[str]]] = (
    (_refuse_media, names.MEDIA_KEYS, tuple(KINDS)),
    (_refuse_preference, names.PREFERENCE_KEYS, (CONVERSATION, LABELLED, PROMPT)),
    (_refuse_rating, names.RATING_KEYS, (CONVERSATION,)),
    (_refuse_mask, names.MASK_KEYS, (CONVERSATION, PAIR, LABELLED)),
)
"""What the values of some keys may refuse, these keys, and the kinds of rows that they refuse."""
_MAPPED_CHECKS: Sequence[tuple[str, _Check, Sequence[str]]] = (
    *((meaning, _refuse_media, tuple(KINDS)) for meaning in ("images", "videos", "audios")),
    ("chosen", _refuse_preference, (CONVERSATION, LABELLED, PROMPT)),
    ("rejected", _refuse_preference, (CONVERSATION, LABELLED, PROMPT)),
    ("label", _refuse_rating, (CONVERSATION,)),
)
"""The same for keys that data.columns or dataset_info.json names: meaning, check, and kinds of rows."""


BESIDE = {
    "system": names.SYSTEM_KEYS, "tools": names.TOOLS_KEYS, "history": names.HISTORY_KEYS,
    "options": ("chat_template_kwargs",), "documents": ("documents",),
}  # fmt: skip
"""Meanings of keys that every format with messages can have."""
BESIDE_KIND: Mapping[str, Mapping[str, Sequence[str]]] = {
    PAIR: {"margin": names.MARGIN_KEYS},
    LABELLED: {"label": names.LABEL_KEYS},
}
"""Meanings of further keys of one kind of rows."""


class LayoutFinder:
    """Finds the layouts of rows of one format or of any."""

    def __init__(self, form: str, columns: Mapping[str, str], kind: str = CONVERSATION) -> None:
        """Find the layouts of a format, or of all ("auto") of a kind of rows, with the keys of data.columns."""
        formats = formats_of(kind)
        self.formats = formats if form == "auto" else {form: FORMATS[form]} if form in formats else {}
        """The formats that are looked for."""
        self._form = form
        self._kind = kind
        self._columns = columns
        self._layouts: dict[tuple[str, ...], RowLayout] = {}
        self.seen: set[str] = set()
        """The keys of data.columns that a row had."""

    @property
    def known_keys(self) -> list[str]:
        """The keys of the rows."""
        return [*dict.fromkeys(key for layout in self._layouts for key in layout)]

    def find(self, keys: tuple[str, ...]) -> RowLayout:
        """Return what these keys mean."""
        layout = self._layouts.get(keys)
        if layout is None:
            if len(self._layouts) >= LAYOUTS:  # rows whose keys are data would fill the memory
                self._layouts.clear()
            layout = self._layouts[keys] = self._find_layout(keys)
        return layout

    def find_without(self, key: str, keys: tuple[str, ...]) -> RowLayout:
        """Return what the others of these keys mean; `key` itself is not read."""
        layout = self.find(tuple(each for each in keys if each != key))
        return replace(layout, unread=(*layout.unread, key))

    def _find_layout(self, keys: tuple[str, ...]) -> RowLayout:
        mapped = {meaning: key for meaning, key in self._columns.items() if key in keys}
        self.seen |= set(mapped.values())
        finder = KeyFinder((key for key in keys if key not in mapped.values()), mapped)
        form, found = self._find_format(finder, mapped)
        chosen = set(found.values())
        others = KeyFinder(key for key in keys if key not in chosen)
        beside = {} if self._kind == TEXT else {**BESIDE, **BESIDE_KIND.get(self._kind, {})}
        for meaning, usual in beside.items():
            if meaning == "history" and "messages" in found:
                continue  # messages have their own earlier turns
            key = mapped.get(meaning) or others.first(usual)
            if key is not None and form is not None:
                found[meaning] = key
        if "task" in mapped and form is not None:
            found["task"] = mapped["task"]
        weights = [*others.all(names.ROW_WEIGHT_KEYS), *others.all(names.ROW_FLAG_KEYS)]
        checked = [
            (check, found_keys)
            for check, usual, kinds in _CHECKS
            if self._kind in kinds and (found_keys := others.all(usual))
        ]
        checked += [
            (check, [mapped[meaning]])
            for meaning, check, kinds in _MAPPED_CHECKS
            if meaning in mapped and self._kind in kinds
        ]
        used = {*found.values(), *weights[: len(others.all(names.ROW_WEIGHT_KEYS))]}
        return RowLayout(form, found, checked, weights, tuple(key for key in keys if key not in used))

    def _find_format(self, finder: KeyFinder, mapped: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
        if self._kind in (CONVERSATION, LABELLED):
            return self._find_conversation(finder, mapped)
        for name, form in self.formats.items():
            found = form.find(finder)
            if found is not None:
                return name, found
        return None, {}

    def _find_conversation(self, finder: KeyFinder, mapped: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
        if "messages" in mapped:
            return "messages", {"messages": mapped["messages"]}
        parts = {meaning: key for meaning, key in mapped.items() if meaning in ("user", "input", "assistant")}
        if "user" in parts or "assistant" in parts:
            user = parts.get("user") or finder.first((*names.INSTRUCTION_KEYS, *names.PROMPT_KEYS))
            assistant = parts.get("assistant") or finder.first(names.COMPLETION_KEYS)
            if user and assistant:
                return "prompt-completion", {"user": user, "assistant": assistant} | parts
        for name, form in self.formats.items():
            found = form.find(finder)
            if found is not None:
                if "messages" not in found:
                    return name, found | parts
                is_sharegpt = fold(found["messages"]) in names.SHAREGPT_KEYS
                return "sharegpt" if self._form == "auto" and is_sharegpt else name, found
        return None, {}
