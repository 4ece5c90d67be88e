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


@dataclass(frozen=True)
class RowFormat:
    """A format of rows."""

    keys: str
    """Its keys, for the message about a row in no known format."""
    find: Callable[[KeyFinder], dict[str, str] | None]
    """Returns what each of the keys means (messages, user, input, assistant); None for a row in another format."""
    names: Callable[[], Mapping[str, Sequence[str]]]
    """The names of the keys, for docs/data.md."""


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
}


@dataclass(frozen=True)
class RowLayout:
    """What the keys of a row mean."""

    form: str | None
    """Its format; None for a row in no known one."""
    keys: Mapping[str, str]
    """messages, user, input, assistant, system, tools, history -> the key."""
    checks: Sequence[tuple[Callable[[Mapping[str, Any], Sequence[str]], None], Sequence[str]]]
    """Keys whose value may refuse the row."""
    weights: Sequence[str]
    """Keys that say whether the row is trained on."""
    unread: tuple[str, ...]

    @cached_property
    def plain_messages(self) -> str | None:
        """The key of the messages, if no other key adds or excludes one."""
        beside = self.keys.keys() - {"tools", "options", "documents"}
        return self.keys["messages"] if beside == {"messages"} and not self.weights else None

    @cached_property
    def is_pair(self) -> bool:
        """Whether a question and an answer are all that there is to read."""
        return "user" in self.keys and self.keys.keys() <= {"user", "input", "assistant"} and not self.weights


def _refuse_media(row: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        check_media(key, row[key])


def _refuse_preference(row: Mapping[str, Any], keys: Sequence[str]) -> None:
    pair = [key for key in keys if not is_empty(row[key])]
    if pair:
        raise RowProblem(
            f"a preference row ({', '.join(pair)}); edgetune trains on one answer: give it as the completion, alone"
        )


def _refuse_rating(row: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        text = str(row[key]).strip().lower()
        if isinstance(row[key], bool | str) and text in ("true", "false"):
            raise RowProblem(
                f"{key} is {text}: a rated row (KTO), and edgetune does not learn from bad answers; "
                f"keep the good rows, without the key"
            )


def _refuse_mask(row: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        check_mask(key, row[key])


_CHECKS: Sequence[tuple[Callable[[Mapping[str, Any], Sequence[str]], None], Sequence[str]]] = (
    (_refuse_media, names.MEDIA_KEYS),
    (_refuse_preference, names.PREFERENCE_KEYS),
    (_refuse_rating, names.RATING_KEYS),
    (_refuse_mask, names.MASK_KEYS),
)
"""What the values of some keys may refuse, and these keys."""


BESIDE = {
    "system": names.SYSTEM_KEYS, "tools": names.TOOLS_KEYS, "history": names.HISTORY_KEYS,
    "options": ("chat_template_kwargs",), "documents": ("documents",),
}  # fmt: skip
"""Meanings of keys that every format can have."""


class LayoutFinder:
    """Finds the layouts of rows of one format or of any."""

    def __init__(self, form: str, columns: Mapping[str, str]) -> None:
        """Find the layouts of a format, or of all ("auto"), with the keys of data.columns."""
        self._form = form
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
        finder = KeyFinder(key for key in keys if key not in mapped.values())
        form, found = self._find_format(finder, mapped)
        chosen = set(found.values())
        others = KeyFinder(key for key in keys if key not in chosen)
        for meaning, usual in BESIDE.items():
            if meaning == "history" and "messages" in found:
                continue  # messages have their own earlier turns
            key = mapped.get(meaning) or others.first(usual)
            if key is not None and form is not None:
                found[meaning] = key
        weights = [*others.all(names.ROW_WEIGHT_KEYS), *others.all(names.ROW_FLAG_KEYS)]
        checked = [(check, found_keys) for check, usual in _CHECKS if (found_keys := others.all(usual))]
        used = {*found.values(), *weights[: len(others.all(names.ROW_WEIGHT_KEYS))]}
        return RowLayout(form, found, checked, weights, tuple(key for key in keys if key not in used))

    def _find_format(self, finder: KeyFinder, mapped: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
        if "messages" in mapped:
            return "messages", {"messages": mapped["messages"]}
        parts = {meaning: key for meaning, key in mapped.items() if meaning in ("user", "input", "assistant")}
        if "user" in parts or "assistant" in parts:
            user = parts.get("user") or finder.first((*names.INSTRUCTION_KEYS, *names.PROMPT_KEYS))
            assistant = parts.get("assistant") or finder.first(names.COMPLETION_KEYS)
            if user and assistant:
                return "prompt-completion", {"user": user, "assistant": assistant} | parts
        forms = FORMATS if self._form == "auto" else {self._form: FORMATS[self._form]}
        for name, form in forms.items():
            found = form.find(finder)
            if found is not None:
                if "messages" not in found:
                    return name, found | parts
                is_sharegpt = fold(found["messages"]) in names.SHAREGPT_KEYS
                return "sharegpt" if self._form == "auto" and is_sharegpt else name, found
        return None, {}
