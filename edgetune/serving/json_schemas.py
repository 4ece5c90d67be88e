"""JSON schemas of answers and of tools' arguments: checked before the model runs, and again on what it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
from jsonschema.validators import validator_for

from edgetune.serving.api_errors import ApiError, bad_request
from edgetune.serving.safe_validation import SafeValidator, unchecked_patterns

_DEEPEST = 64
_NO_REMOTE = "a reference to another document"


def compile_schema(schema: Mapping[str, Any], field_name: str, *, is_strict: bool = True) -> SafeValidator:
    """Return the validator of a schema.

    Args:
        schema: The schema.
        field_name: Name of its request field, for errors.
        is_strict: Whether a pattern that cannot be checked, since it has look-around or back-references, is an error.

    Raises:
        ApiError: The schema is not valid, refers to other documents, is nested too deeply, or has a pattern that
            cannot be checked; with the field.
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
    unchecked = unchecked_patterns(schema) if is_strict else []
    if unchecked:
        raise bad_request(
            f"{field_name}: the pattern {unchecked[0]!r} has look-around or back-references, which cannot be checked",
            field_name,
        )
    return SafeValidator(kind, schema)


def check_answer(validator: SafeValidator, text: str) -> None:
    """Raise ApiError unless the text of an answer is JSON that the schema permits."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ApiError(500, f"the answer is not JSON: {error}", code="invalid_output") from None
    mismatch = validator.find_mismatch(value)
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
