"""Request fields: each is declared once, in a pydantic model of its dialect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edgetune.serving.api_errors import ApiError, bad_request

_LONGEST_VALUE = 60
_FIELD_NAME = re.compile(r"[a-z_][a-z0-9_]*|\d{1,10}")
_TYPE_NAMES = frozenset({"str", "int", "float", "bool", "list", "dict", "none", "constrained-str"})


class Fields(BaseModel):
    """Fields of a request. An unknown field is kept apart, to be named in the reply; a wrong one is an error."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


F = TypeVar("F", bound=Fields)


def parse(kind: type[F], body: bytes) -> F:
    """Read the JSON of a request.

    Raises:
        ApiError: The body is not JSON, or a field is wrong; with the field's name.
    """
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise _first_error(error) from None


def _first_error(error: ValidationError) -> ApiError:
    # of a union, the branch that went deepest is the one that was meant
    found = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    if found["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {found['ctx']['error']}")
    field = ".".join(str(part) for part in found["loc"] if _is_name(part))
    message = found["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if found["type"] in ("too_short", "too_long"):
        return bad_request(f"{field}: {message.replace(' after validation', '')}", field)
    if not field:
        return bad_request(f"the body is wrong: {message}")
    if found["type"] == "missing":
        return bad_request(f"the field {field} is missing", field)
    return bad_request(f"{field}: {message}, not {_shorten(found['input'])}", field)


def _is_name(part: int | str) -> bool:
    """Whether a part of a location is an index or a field, not the name of a type in a union."""
    return isinstance(part, int) or (part not in _TYPE_NAMES and _FIELD_NAME.fullmatch(part) is not None)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def unknown_fields(fields: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the names of fields that the model does not declare, also those of nested objects."""
    yield from (prefix + name for name in fields.model_extra or ())
    for name in type(fields).model_fields:
        if name not in fields.model_fields_set:
            continue
        yield from _unknown_below(getattr(fields, name), f"{prefix}{name}.")


def _unknown_below(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from unknown_fields(value, prefix)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _unknown_below(each, f"{prefix}{index}.")
