"""What is adopted, as the command line or a program asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AdoptionRequest:
    """An adapter and what belongs to it."""

    adapter: Path
    """Its directory."""
    base: str
    """The model that it was trained on: a directory, a GGUF file, or a name on the hub."""
    data: str
    """Held-out rows."""
    test: str | None = None
    """Rows with a checkable answer."""
    arguments: Path | None = None
    """A file of arguments of the training that does not lie beside the adapter."""
    overrides: tuple[str, ...] = ()
    """`key=value` settings of the configuration."""
