"""Validation by JSON schemas that always ends soon.

The schemas come with requests. Python's `re` takes forever for some patterns, and a few references that stand for two
others each are billions of steps. Either would hold up all other requests. Hence patterns are matched by Rust's regex,
in linear time, and references are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from jsonschema import ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend
from pydantic_core import SchemaError, SchemaValidator, core_schema
from pydantic_core import ValidationError as PatternMismatch

_MOST_REFERENCES = 10_000
"""References that are followed to check one value."""


class TooManySteps(Exception):
    """A value that cannot be checked in a bounded number of steps."""


class _Steps:
    """Counts the references that are followed since `begin`."""

    def __init__(self) -> None:
        self.left = _MOST_REFERENCES

    def counted(self, follow: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def check(validator: Any, reference: Any, value: Any, schema: Any) -> Iterator[Any]:
            self.left -= 1
            if self.left < 0:
                raise TooManySteps(f"it needs more than {_MOST_REFERENCES} references")
            yield from follow(validator, reference, value, schema) or ()

        return check


class SafeValidator:
    """A validator of one schema."""

    def __init__(self, kind: Any, schema: Mapping[str, Any]) -> None:
        """Make a validator.

        Args:
            kind: Class of jsonschema for the schema's dialect.
            schema: A valid schema; patterns of `unchecked_patterns` are taken to match.
        """
        self._steps = _Steps()
        rules = {
            name: self._steps.counted(rule) for name in ("$ref", "$dynamicRef") if (rule := kind.VALIDATORS.get(name))
        }
        rules |= {
            "pattern": _pattern, "patternProperties": _pattern_properties,
            "additionalProperties": _additional_properties,
        }  # fmt: skip
        self._validator: Validator = extend(kind, rules)(schema)

    def find_mismatch(self, value: Any) -> str | None:
        """Return how a value differs from the schema; None if it does not."""
        self._steps.left = _MOST_REFERENCES
        try:
            error = next(iter(self._validator.iter_errors(value)), None)
        except Exception as failure:  # noqa: BLE001 - a broken reference raises many kinds
            return f"the schema cannot be applied: {failure}"
        return None if error is None else error.message


def unchecked_patterns(schema: Any) -> list[str]:
    """Return the patterns with look-around or back-references, which are not checked."""
    return [pattern for pattern in patterns_of(schema) if not _is_linear(pattern)]


def patterns_of(schema: Any) -> Iterator[str]:
    """Yield the patterns for texts and for names of properties."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            if isinstance(each.get("pattern"), str):
                yield each["pattern"]
            named = each.get("patternProperties")
            if isinstance(named, Mapping):
                yield from named
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


@lru_cache(1024)
def _matcher(pattern: str) -> SchemaValidator | None:
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern))
    except SchemaError:
        return None


def _is_linear(pattern: str) -> bool:
    return _matcher(pattern) is not None


def _matches(pattern: str, text: str) -> bool:
    """Whether a pattern is found in a text; one that cannot be checked is."""
    matcher = _matcher(pattern)
    if matcher is None:
        return True
    try:
        matcher.validate_python(text)
    except PatternMismatch:
        return False
    return True


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(value, "string") and not _matches(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(value, "object"):
        for pattern, rule in patterns.items():
            for name, each in value.items():
                if _matches(pattern, name):
                    yield from validator.descend(each, rule, path=name, schema_path=pattern)


def _additional_properties(validator: Any, rule: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if not validator.is_type(value, "object"):
        return
    patterns = schema.get("patternProperties", {})
    for name, each in value.items():
        if name in schema.get("properties", {}) or any(_matches(pattern, name) for pattern in patterns):
            continue
        if validator.is_type(rule, "object"):
            yield from validator.descend(each, rule, path=name)
        elif not rule:
            yield ValidationError(f"additional properties are not allowed ({name!r} was unexpected)")
