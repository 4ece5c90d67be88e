"""Whether a base is the one that an adapter was trained on: by the names that its files state, and by hashes."""

from __future__ import annotations

import re
from pathlib import Path

from edgetune.adoption.arguments import Statement, TrainerArguments
from edgetune.errors import DataError
from edgetune.planning.base_model import Base
from edgetune_converters.errors import CheckpointError
from edgetune_converters.reading.gguf_base import is_gguf, open_base

_ROUNDED = re.compile(r"([-_]unsloth)?[-_](bnb[-_]4bit|4bit|8bit|nf4|gguf|mlx)$")
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


def check_base(base: Base, arguments: TrainerArguments) -> tuple[list[str], list[str]]:
    """Compare a base with the names that the files of an adapter state.

    Returns:
        Notes and warnings, a sentence each.

    Raises:
        DataError: A named base lies on this machine, and its weights are others.
    """
    if not arguments.bases:
        return ["no file of the adapter names its base; its shapes fit the given one"], []
    for statement in arguments.bases:
        other = _local(statement, base)
        if other is not None:
            return [_compare_hashes(statement, other, base)], []
    matching = next((each for each in arguments.bases if _is_named(base, each.value)), None)
    if matching is None:
        named = "; ".join(f"{each.value} ({each.source})" for each in arguments.bases)
        return [], [
            f"the adapter names another base: {named}, and the given one is {base.name}; the shapes fit, but weights "
            "of another model give other answers than the trained ones"
        ]
    stated, found = arguments.revision, base.revision
    if stated and found and stated not in (found, "main", "master"):
        return [], [f"the adapter was trained on revision {stated} of {matching.value}, and the base is {found}"]
    return [f"base {base.name}, as {matching.source} names it ({matching.value})"], []


def _is_named(base: Base, name: str) -> bool:
    """Whether a name is that of the base, whatever the folder, the owner and the bits of the published copy."""
    names = {_plain(each) for each in (base.name, base.path.name, _cached_name(base.path), _own_name(base)) if each}
    return _plain(name) in names


def _plain(name: str) -> str:
    last = name.rstrip("/").replace("\\", "/").rpartition("/")[2].lower().removesuffix(".gguf")
    return _ROUNDED.sub("", last)


def _cached_name(path: Path) -> str | None:
    """Return the name of a snapshot in the cache of the hub: .../models--OWNER--NAME/snapshots/COMMIT."""
    match = next((found for part in path.parts if (found := _CACHED.fullmatch(part))), None)
    return match["name"] if match else None


def _own_name(base: Base) -> str | None:
    name = base.checkpoint.config.get("_name_or_path")
    return name if isinstance(name, str) and name else None


def _local(statement: Statement, base: Base) -> Path | None:
    """Return the directory that a statement names, if it has a model that can be compared."""
    path = Path(statement.value).expanduser()
    try:
        is_there = (path.is_dir() and (path / "config.json").is_file()) or is_gguf(path)
    except OSError:
        return None
    return path if is_there else None


def _compare_hashes(statement: Statement, other: Path, base: Base) -> str:
    if other.resolve() == base.path.resolve():
        return f"base {base.name}, the one that {statement.source} names"
    try:
        theirs = open_base(other).identity()
    except CheckpointError:
        return f"{statement.source} names {other}, which cannot be read and is not compared"
    ours = base.identity["files"]
    weights = {name for name in theirs.keys() | ours.keys() if name != "config.json"}
    differing = sorted(name for name in weights if theirs.get(name) != ours.get(name))
    if differing:
        raise DataError(
            f"{base.name} is not the base of this adapter: it was trained on {other} ({statement.source}), and "
            f"{', '.join(differing)} differ",
            f"Give --base {other}",
        )
    return f"base {base.name}, whose weights have the hashes of {other} ({statement.source})"
