"""Golden conversations, embedded in an exported file so that it can be verified without the run.

They hold the rendering, the token ids and, where an answer follows, the trained model's most likely first tokens. Only
conversations made up by edgetune are embedded: the user's rows do not leave the run directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import RunDirectoryError
from edgetune.reference.store import read_manifest
from edgetune.runs.directory import RunDirectory
from edgetune_converters.gguf import keys

VERSION = 1
_LONGEST = 8192  # bytes of a string, above which auditors of GGUF files flag it
_MOST_PARTS = 1000
_FIELDS = ("messages", "tools", "add_generation_prompt", "text", "ids", "first", "rendered_at", "template")


@dataclass(frozen=True)
class GoldenSet:
    """The golden conversations of a file."""

    conversations: Sequence[Mapping[str, Any]]
    """As in the contract of the reference; some with "first": {"ids", "log_probs"}, which are the most likely tokens
    behind "after", the tokens that the template writes before an answer."""
    stop_ids: frozenset[int]
    """The stop tokens of training."""


def metadata(run: RunDirectory) -> dict[str, str]:
    """Return the metadata for a file that is exported from this run; {} if its reference has none."""
    try:
        contract = read_manifest(run.reference).contract
    except RunDirectoryError:
        return {}
    kept = [entry for entry in contract if not entry.get("own", True)]
    if not kept:
        return {}
    stop_ids = sorted(TextTokenizer.from_directory(run.tokenizer).stop_ids)
    return encode([{name: entry[name] for name in _FIELDS if name in entry} for entry in kept], stop_ids)


def is_golden(key: str) -> bool:
    """Whether a key of the metadata holds golden conversations."""
    return key == keys.GOLDEN or key.startswith(f"{keys.GOLDEN}.")


def encode(conversations: Sequence[Mapping[str, Any]], stop_ids: Sequence[int]) -> dict[str, str]:
    """Return golden conversations as metadata: strings of ASCII of at most 8 KB, unless one conversation is longer.

    The first string, under the key that every version knows, states their number; each is complete in itself.
    """
    parts: list[list[Mapping[str, Any]]] = [[]]
    for entry in conversations:
        if parts[-1] and len(_part([*parts[-1], entry], stop_ids, 99)) > _LONGEST:
            parts.append([])
        parts[-1].append(entry)
    texts = [_part(part, stop_ids, len(parts)) for part in parts]
    return {keys.GOLDEN: texts[0]} | {
        keys.GOLDEN_PART.format(number=number): text for number, text in enumerate(texts[1:], 2)
    }


def _part(conversations: Sequence[Mapping[str, Any]], stop_ids: Sequence[int], count: int) -> str:
    content: dict[str, Any] = {"version": VERSION, "stop_ids": stop_ids}
    content |= {"parts": count} if count > 1 else {}
    return json.dumps(content | {"conversations": conversations}, separators=(",", ":"))


def read(file_metadata: Mapping[str, Any], path: Path) -> GoldenSet | None:
    """Return the golden conversations of a file, None if it has none.

    Raises:
        RunDirectoryError: They cannot be read.
    """
    if file_metadata.get(keys.GOLDEN) is None:
        return None
    try:
        first = _content(file_metadata, keys.GOLDEN)
        others = [
            _content(file_metadata, keys.GOLDEN_PART.format(number=number))
            for number in range(2, _count(first.get("parts", 1)) + 1)
        ]
        conversations = [entry for part in (first, *others) for entry in part["conversations"]]
        for entry in conversations:
            _check(entry)
        return GoldenSet(conversations, frozenset(map(int, first["stop_ids"])))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RunDirectoryError(f"{keys.GOLDEN} in {path} cannot be read: {error}", "Export the file again") from None


def _content(file_metadata: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return one of the strings, decoded."""
    if key not in file_metadata:
        raise ValueError(f"{key} is missing")
    found: dict[str, Any] = json.loads(file_metadata[key])
    if found["version"] != VERSION:
        raise ValueError(f"it is of version {found['version']}")
    return found


def _count(stated: Any) -> int:
    if type(stated) is not int or not 1 <= stated <= _MOST_PARTS:
        raise ValueError(f"it has {stated!r} parts")
    return stated


def _check(entry: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError for a conversation that cannot be used."""
    if not isinstance(entry["text"], str) or not isinstance(entry["add_generation_prompt"], bool):
        raise ValueError("a conversation has no text")
    datetime.fromisoformat(entry.get("rendered_at", "2000-01-01"))
    lists: list[tuple[Any, type]] = [(entry["messages"], dict), (entry["ids"], int), (entry.get("tools", []), dict)]
    first = entry.get("first", {"ids": [], "log_probs": []})
    lists += [
        (first["ids"], int),
        (first.get("after", []), int),
        ([float(value) for value in first["log_probs"]], float),
    ]
    if not all(isinstance(values, list) and all(type(each) is kind for each in values) for values, kind in lists):
        raise ValueError("a conversation has an entry that is not a message, token or number")
    if len(first["ids"]) != len(first["log_probs"]) or any(
        not 0 <= token < 2**31 for token in (*entry["ids"], *first.get("after", []))
    ):
        raise ValueError("the tokens of a conversation are out of range")
    if "first" in entry and not entry["ids"]:
        raise ValueError("a conversation has a first token and no prompt")
