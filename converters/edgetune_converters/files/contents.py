"""Read JSON objects and hash files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from edgetune_converters.errors import CheckpointError

DAMAGED = "the file is damaged or was not downloaded completely: fetch it again"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: The file is missing, is not JSON or does not hold an object.
    """
    try:
        loaded = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", DAMAGED) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", DAMAGED)
    return loaded
