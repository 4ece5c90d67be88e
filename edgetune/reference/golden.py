"""What an exported file carries of the trained model, so that it can be verified where nothing else is.

Golden conversations with their rendering, their token ids and, where an answer is awaited, the trained model's
likeliest first tokens. Only conversations that edgetune itself made up: the user's rows do not leave the run directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import RunDirectoryError
from edgetune.reference.store import read_manifest
from edgetune.runs.directory import RunDirectory
from edgetune_converters.gguf import keys

VERSION = 1
_FIELDS = ("messages", "tools", "add_generation_prompt", "text", "ids", "first")


@dataclass(frozen=True)
class GoldenSet:
    """As it is read from a file."""

    conversations: Sequence[Mapping[str, Any]]
    """As in the reference's contract; some with "first": {"ids", "log_probs"}."""
    stop_ids: frozenset[int]
    """At which generation stopped in training."""


def metadata(run: RunDirectory) -> dict[str, str]:
    """The metadata for a file that is exported from this run; {} for a run whose reference has none to give."""
    try:
        contract = read_manifest(run.reference).contract
    except RunDirectoryError:
        return {}
    kept = [entry for entry in contract if not entry.get("own", True)]
    if not kept:
        return {}
    content = {
        "version": VERSION,
        "stop_ids": sorted(TextTokenizer.from_directory(run.tokenizer).stop_ids),
        "conversations": [{name: entry[name] for name in _FIELDS if name in entry} for entry in kept],
    }
    return {keys.GOLDEN: json.dumps(content, ensure_ascii=False, separators=(",", ":"))}


def read(file_metadata: Mapping[str, Any], path: Path) -> GoldenSet | None:
    """What the file carries, None if nothing. Raises RunDirectoryError when it cannot be understood."""
    text = file_metadata.get(keys.GOLDEN)
    if text is None:
        return None
    try:
        found = json.loads(text)
        if found["version"] != VERSION:
            raise ValueError(f"it is of version {found['version']}")
        for entry in found["conversations"]:
            _check(entry)
        return GoldenSet(found["conversations"], frozenset(map(int, found["stop_ids"])))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RunDirectoryError(f"{keys.GOLDEN} in {path} cannot be read: {error}", "Export the file again.") from None


def _check(entry: Mapping[str, Any]) -> None:
    """ValueError, KeyError or TypeError for a conversation that could not be used."""
    if not isinstance(entry["text"], str) or not isinstance(entry["add_generation_prompt"], bool):
        raise ValueError("a conversation has no text")
    lists: list[tuple[Any, type]] = [(entry["messages"], dict), (entry["ids"], int), (entry.get("tools", []), dict)]
    first = entry.get("first", {"ids": [], "log_probs": []})
    lists += [(first["ids"], int), ([float(value) for value in first["log_probs"]], float)]
    if not all(isinstance(values, list) and all(type(each) is kind for each in values) for values, kind in lists):
        raise ValueError("a conversation holds what is no message, token or number")
    if len(first["ids"]) != len(first["log_probs"]) or any(not 0 <= token < 2**31 for token in entry["ids"]):
        raise ValueError("a conversation's tokens do not fit")
    if "first" in entry and not entry["ids"]:
        raise ValueError("a conversation without tokens has a first answer")
