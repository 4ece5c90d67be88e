"""JSON schemas of answers and of tools' arguments: checked before the model runs, and again on what it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from edgetune.serving.api_errors import ApiError, bad_request

_DEEPEST = 64
_NO_REMOTE = "a reference to another document"


def compile_schema(schema: Mapping[str, Any], field_name: str) -> Validator:
    """Return the validator of a schema.

    Raises:
        ApiError: The schema is not valid, refers to other documents, or is nested too deeply; with the field.
    """
    if _depth(schema) > _DEEPEST:
        raise bad_request(f"{field_name}: the schema is nested more than {_DEEPEST} levels deep", field_name)
    remote = next(_remote_references(schema), None)
    if remote is not None:
        raise bad_request(f"{field_name}: the schema has {_NO_REMOTE}, {remote!r}", field_name)
    kind = validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        path = ".".join(map(str, error.absolute_path))
        raise bad_request(
            f"{field_name}: the JSON schema is not valid{' at ' + path if path else ''}: {error.message}", field_name
        ) from None
    except RecursionError:
        raise bad_request(f"{field_name}: the schema is nested too deeply", field_name) from None
    return kind(schema)


def find_mismatch(validator: Validator, value: Any) -> str | None:
    """Return how a value differs from the schema; None if it does not."""
    try:
        error = next(iter(validator.iter_errors(value)), None)
    except Exception as failure:  # noqa: BLE001 - a broken reference or pattern raises many kinds
        return f"the schema cannot be applied: {failure}"
    return None if error is None else error.message


def check_answer(validator: Validator, text: str) -> None:
    """Raise ApiError unless the text of an answer is JSON that the schema permits."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ApiError(500, f"the answer is not JSON: {error}", code="invalid_output") from None
    mismatch = find_mismatch(validator, value)
    if mismatch is not None:
        raise ApiError(500, f"the answer does not match the schema: {mismatch}", code="invalid_output")


def _depth(value: Any) -> int:
    """Return how deeply a value is nested, without recursion."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        each, level = waiting.pop()
        deepest = max(deepest, level)
        if level > _DEEPEST:
            break
        if isinstance(each, Mapping):
            waiting += [(child, level + 1) for child in each.values()]
        elif isinstance(each, list):
            waiting += [(child, level + 1) for child in each]
    return deepest


def _remote_references(schema: Any) -> Iterator[str]:
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            for key in ("$ref", "$dynamicRef"):
                reference = each.get(key)
                if isinstance(reference, str) and not reference.startswith("#"):
                    yield reference
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
