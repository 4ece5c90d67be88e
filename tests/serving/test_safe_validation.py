"""Schemas of requests cannot hold up the server."""

from __future__ import annotations

import time
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from edgetune.serving.api_errors import ApiError
from edgetune.serving.conversation import Tool
from edgetune.serving.json_schemas import compile_schema
from edgetune.serving.tool_calls import Toolbox

EXPONENTIAL = "^(a+)+$"
LINE = "a" * 40 + "b"


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "pattern": EXPONENTIAL}, LINE),
        ({"patternProperties": {EXPONENTIAL: {}}, "additionalProperties": False}, {LINE: 1}),
        ({"additionalProperties": {"pattern": EXPONENTIAL}}, {"x": LINE}),
    ],
)
def test_a_pattern_that_takes_re_forever_is_matched_at_once(schema: dict[str, Any], value: Any) -> None:
    started = time.process_time()
    assert compile_schema(schema, "x").find_mismatch(value) is not None
    assert time.process_time() - started < 5  # re would need years


def test_references_that_double_are_not_followed_forever() -> None:
    names = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    schema = {"$defs": {**names, "d40": {"type": "integer"}}, "$ref": "#/$defs/d0"}
    checks = compile_schema(schema, "x")
    for _ in range(2):
        assert "references" in str(checks.find_mismatch(1))


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "pattern": r"^\d{3}$"}, "b": {"$ref": "#/$defs/n"}},
    "patternProperties": {"^x_": {"type": "integer"}},
    "additionalProperties": False,
    "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
}


@pytest.mark.parametrize(
    "value",
    [{"a": "123"}, {"a": "1234"}, {"b": [[], [[]]]}, {"b": [1]}, {"x_1": 5}, {"x_1": "5"}, {"y": 1}, {}, [], {"a": 1}],
)
def test_a_value_is_judged_as_jsonschema_judges_it(value: Any) -> None:
    expected = Draft202012Validator(SCHEMA).is_valid(value)
    assert (compile_schema(SCHEMA, "x").find_mismatch(value) is None) == expected


@pytest.mark.parametrize("pattern", ["(?!x)a", r"(a)\1"])
def test_a_pattern_that_cannot_be_checked_is_refused_in_answers_and_named_for_tools(pattern: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}
    with pytest.raises(ApiError, match="cannot be checked") as raised:
        compile_schema(schema, "response_format")
    assert (raised.value.status, raised.value.field) == (400, "response_format")
    assert Toolbox([Tool("dim", "", schema)], ["tools.0"]).unchecked == ["tools.0"]


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ApiError, match="is not a 'regex'"):
        Toolbox([Tool("dim", "", {"properties": {"a": {"pattern": "("}}})], ["tools.0"])
