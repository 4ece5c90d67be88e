"""Whether a file was made from this run, by the hashes in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgetune.runs.directory import RunDirectory
from edgetune_converters.adapters.directory import find_adapter
from edgetune_converters.gguf import keys
from edgetune_converters.names import MERGE_BASES
from edgetune_converters.provenance.hashing import changed_files
from edgetune_converters.provenance.receipts import combined_hash


def unsigned(metadata: Mapping[str, Any]) -> list[str]:
    """Return a note for a file of another tool: it has no hashes, so its origin is unknown."""
    return (
        []
        if keys.BASE_HASH in metadata
        else ["the file has no hashes of its base and adapter, so its origin is unknown"]
    )


def mismatches(metadata: Mapping[str, Any], run: RunDirectory) -> list[str]:
    """Return what differs if the file was made from another base or adapter than this run's."""
    if keys.BASE_HASH not in metadata:
        return []
    found = []
    if metadata[keys.BASE_HASH] != combined_hash(run.manifest.base.files):
        found.append("the file was made from another base than this run")
    if run.adapter.is_dir():
        now = find_adapter(run.adapter).identity()
        changed = changed_files(run.trained_adapter, now)
        if changed:
            found.append(f"the run's adapter is not the one that was trained: {', '.join(changed)} changed")
        combined = _combined(metadata, combined_hash(now))
        if combined is not None:
            found.append(combined)
        elif metadata.get(keys.ADAPTER_HASH) != combined_hash(now | _recorded(run, now)):
            found.append("the file was not made with this run's adapter; if you trained again, export again")
    captured = run.manifest.captured_task
    stated = metadata.get(keys.PROMPT_TASK)
    if captured is not None and stated is not None and str(stated) != str(captured):
        found.append(
            f"the file holds the prompt of task {stated}, and the reference of this run was captured with task "
            f"{captured}: the figures say nothing of the file; train a run with export.prompt_task: {stated}"
        )
    return found


def _combined(metadata: Mapping[str, Any], adapter_hash: str) -> str | None:
    """Return what a file of several adapters holds beside this run's; None for a file of one adapter."""
    if keys.COMBINATION not in metadata:
        return None
    stated = json.loads(metadata[keys.COMBINATION])
    names = ", ".join(f"{each['name']} {each['weight']:g}" for each in stated["adapters"])
    own = any(each["sha256"] == adapter_hash for each in stated["adapters"])
    among = "among them this run's" if own else "none of them this run's"
    return f"the file combines several adapters ({names}; {stated['method']}), {among}"


def _recorded(run: RunDirectory, files: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes that training recorded for these files."""
    return {name: digest for name, digest in run.trained_adapter.items() if name in files}


def merge_base(metadata: Mapping[str, Any]) -> str | None:
    """Return the merge base that the file names: "original" or "nf4"."""
    named = metadata.get(keys.MERGE_BASE)
    return named if named in MERGE_BASES else None
