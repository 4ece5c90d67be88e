"""Whether a file says that it was made from this run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.reference.merged import MERGED
from edgetune.runs.directory import RunDirectory
from edgetune_converters.adapters.lora import Adapter
from edgetune_converters.gguf import keys
from edgetune_converters.provenance.hashing import changed_files
from edgetune_converters.provenance.receipts import combined_hash


def unsigned(metadata: Mapping[str, Any]) -> list[str]:
    """A file that another tool made carries no hashes: it is measured, and its origin stays unknown."""
    return [] if keys.BASE_HASH in metadata else ["the file does not say what it was made from"]


def mismatches(metadata: Mapping[str, Any], run: RunDirectory) -> list[str]:
    """Whether the file says that it was made from another base or adapter than this run's."""
    if keys.BASE_HASH not in metadata:
        return []
    found = []
    if metadata[keys.BASE_HASH] != combined_hash(run.manifest.base.files):
        found.append("the file was made from another base than this run")
    if run.adapter.is_dir():
        now = Adapter(run.adapter).identity()
        changed = changed_files(run.trained_adapter, now)
        if changed:
            found.append(f"the run's adapter is not the one that was trained: {', '.join(changed)} changed")
        if metadata.get(keys.ADAPTER_HASH) != combined_hash(now | _known(run, now)):
            found.append("the file was not made with this run's adapter; if you trained again, export again")
    return found


def _known(run: RunDirectory, files: Mapping[str, str]) -> dict[str, str]:
    """What training said of these files."""
    return {name: digest for name, digest in run.trained_adapter.items() if name in files}


def merge_base(metadata: Mapping[str, Any]) -> str | None:
    """The name of the merged model that this file was made of, as `edgetune.reference.merged` calls it."""
    stated = metadata.get(keys.MERGE_BASE)
    return next((name for name, base in MERGED.items() if base == stated), None)
