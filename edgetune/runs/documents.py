"""Versioned JSON documents: run.json, reference.json and validation.json, each written and read by one class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from edgetune.errors import RunDirectoryError
from edgetune.runs.json_format import write_json

Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
]
"""A float whose NaN and infinity are null in JSON; null is read as NaN."""


OptionalNumber = Annotated[
    float | None,
    PlainSerializer(lambda value: value if value is not None and math.isfinite(value) else None, when_used="json"),
]
"""A float that may be absent."""


class DocumentSection(BaseModel):
    """A part of a document. Keys that this version does not know are kept."""

    model_config = ConfigDict(extra="allow")


class Document(DocumentSection):
    """A JSON document with a version.

    A document of an older version is read: what it lacks has a default. One of a newer version is refused.
    """

    KIND: ClassVar[str]
    """What the document is, with its article: "a run manifest"."""
    NEWEST: ClassVar[int] = 1
    """The version that this class writes."""
    HINT: ClassVar[str]
    """What to do about a damaged document."""

    version: int

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check the document.

        Raises:
            RunDirectoryError: The file is missing, damaged, or of a newer version.
        """
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise RunDirectoryError(f"{path} is missing", cls.HINT) from None
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be read: {error.strerror or error}", cls.HINT) from None
        return cls.from_json(text, path)

    @classmethod
    def from_json(cls, text: bytes | str, path: Path) -> Self:
        """Parse and check the document; `path` is named in errors."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunDirectoryError(f"{path} cannot be read: it is not valid JSON ({error})", cls.HINT) from None
        version = content.get("version") if isinstance(content, dict) else None
        if not isinstance(version, int) or version < 1:
            raise RunDirectoryError(f"{path} is not {cls.KIND}", cls.HINT)
        if version > cls.NEWEST:
            raise RunDirectoryError(
                f"{path} is {cls.KIND} of version {version}; this edgetune reads up to version {cls.NEWEST}",
                "Update edgetune",
            )
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise RunDirectoryError(f"{path} is damaged: {describe_error(error)}", cls.HINT) from None

    def content(self) -> dict[str, Any]:
        """Return the document as plain JSON values."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the document atomically."""
        write_json(path, self.content())


def describe_error(error: ValidationError) -> str:
    """Return the first problem in a few words: `rungs.0.figures.tokens: input should be a valid integer`."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    return f"{place}: {message}" if place else message
