"""Answers in JSON: constrained, validated before the last chunk, and never silently unconstrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import APIError, BadRequestError

from tests.serving.conftest import openai_client
from tests.serving.scripted import scripted

ASK = [{"role": "user", "content": "dim the lights"}]
SCHEMA = {
    "type": "object",
    "properties": {"lamp": {"enum": ["red", "blue"]}, "on": {"type": "boolean"}},
    "required": ["lamp", "on"],
    "additionalProperties": False,
}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_matches_its_schema(client: Any, model: str, seed: int) -> None:
    choice = client.chat.completions.create(
        model=model, messages=ASK, response_format=form(SCHEMA), max_tokens=300, temperature=1, seed=seed
    ).choices[0]
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_a_json_object_is_an_object(client: Any) -> None:
    choice = client.chat.completions.create(
        model="tiny", messages=ASK, response_format={"type": "json_object"}, max_tokens=300, seed=1
    ).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/missing"}}},
        {"type": "object", "properties": {"a": {"$ref": "https://example.com/schema"}}},
        {"type": "string", "pattern": "(unclosed"},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        {"not": {"type": "object"}},
    ],
)
def test_a_schema_that_cannot_be_compiled_is_refused(client: Any, model: str, schema: Any) -> None:
    with pytest.raises(BadRequestError) as raised:
        client.chat.completions.create(model=model, messages=ASK, response_format=form(schema), max_tokens=4)
    assert raised.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize("answer", ['{"lamp": "green", "on": true}', "no JSON", "{}"])
def test_an_answer_that_does_not_match_is_an_error_and_no_answer(file: Path, answer: str) -> None:
    with (
        scripted(file, answer, answer) as (server, _),
        openai_client(server) as client,
    ):
        create = client.chat.completions.create
        with pytest.raises(APIError, match="the answer") as raised:
            create(model="tiny", messages=ASK, response_format=form(SCHEMA))
        assert raised.value.code == "invalid_output"
        finished = []
        with pytest.raises(APIError, match="the answer"):  # noqa: PT012 - the error comes within the stream
            for chunk in create(model="tiny", messages=ASK, response_format=form(SCHEMA), stream=True):
                finished += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
        assert not finished


def test_an_answer_that_was_cut_says_so(file: Path) -> None:
    with scripted(file, '{"lamp": "red", "on": true}') as (server, _), openai_client(server) as client:
        create = client.chat.completions.create
        choice = create(model="tiny", messages=ASK, response_format=form(SCHEMA), max_tokens=3).choices[0]
    assert choice.finish_reason == "length"


def test_a_schema_and_tools_exclude_one_another(client: Any) -> None:
    tool = {"type": "function", "function": {"name": "dim"}}
    with pytest.raises(BadRequestError, match="cannot be combined with tools"):
        client.chat.completions.create(model="tiny", messages=ASK, tools=[tool], response_format=form(SCHEMA))
