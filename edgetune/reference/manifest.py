"""reference.json, the manifest of a reference: everything in it but the arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from edgetune.errors import RunDirectoryError
from edgetune.runs.documents import Document, DocumentSection, Number
from edgetune.runs.json_format import write_json

FILE = "reference.json"
HINT = "Capture it again with `edgetune reference RUN`, or resume the training (`--resume`)"


class ReferenceSummary(DocumentSection):
    """The results of the capture. Cross-entropies are in nats per token."""

    rows: int
    positions: int
    """Scored tokens."""
    long_rows: int = 0
    cross_entropy: dict[str, Number]
    """Of the "base" and the "trained" model."""
    task: dict[str, Any] | None = None
    contract: int = 0
    """Golden conversations."""
    dtype: str | None = None


class Task(DocumentSection):
    """Rows with a checkable answer."""

    kind: str
    """As in data.answer."""
    rows: list[dict[str, Any]]
    """{"messages", "expected", "base", "trained"}, and "choices" where there are some."""


class ReferenceManifest(Document):
    """The manifest. Its digest, which covers the hashes of all files, identifies the reference."""

    KIND: ClassVar[str] = "the manifest of a reference"
    HINT: ClassVar[str] = HINT

    version: int = Document.NEWEST
    info: dict[str, Any] = Field(default_factory=dict)
    """Device, dtype and versions of the capture, and the number of long rows."""
    contract: list[dict[str, Any]] = Field(default_factory=list)
    """Golden conversations: {"messages", "add_generation_prompt", "text", "ids"}, some with "tools" or "first"."""
    greedy: list[dict[str, Any]] = Field(default_factory=list)
    """The trained model's greedy answers: {"prompt", "answer" (ids), "stopped"}."""
    task: Task | None = None
    summary: ReferenceSummary | None = None
    """None in references of edgetune before 0.1, whose summary is in run.json."""
    vocab_size: int
    coding: str
    """"u16" (full vocabulary) or "top_k" (the KL divergence is a lower bound)."""
    files: dict[str, str]
    """SHA-256 of each .npy file, by its name without the suffix."""
    digest: str = ""

    @classmethod
    def from_json(cls, text: bytes | str, path: Path) -> Self:
        """Parse and check the manifest and its digest."""
        manifest = super().from_json(text, path)
        content = json.loads(text)
        if content.pop("digest", None) != digest_of(content):
            raise RunDirectoryError(f"{path} is damaged: it was altered", cls.HINT)
        return manifest

    def content(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values, with its digest."""
        content = self.model_dump(mode="json", exclude_unset=True, exclude={"digest"})
        content = {**content, "version": self.version}
        return {**content, "digest": digest_of(content)}

    def write(self, path: Path) -> None:
        """Write the manifest, atomically."""
        write_json(path, self.content())


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its digest."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
