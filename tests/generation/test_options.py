"""The options of sampling: one table for the commands and for a chat."""

from __future__ import annotations

from dataclasses import fields

import click
import pytest
from click.testing import CliRunner

from edgetune.errors import ConfigError
from edgetune.generation.options import (
    SAMPLING_OPTIONS,
    make_sampling,
    parse_template_option,
    sampling_defaults,
    sampling_options,
)
from edgetune.runtime import Sampling

GIVEN = {
    "temperature": "0.5", "top_k": "3", "top_p": "0.5", "min_p": "0.2", "seed": "7", "typical_p": "0.9",
    "repeat_penalty": "1.1", "presence_penalty": "-0.5", "frequency_penalty": "0.5", "repeat_last_n": "-1",
    "dry_multiplier": "0.8", "dry_base": "2", "dry_allowed_length": "3", "dry_last_n": "5", "dry_breakers": '["."]',
    "xtc_probability": "0.5", "xtc_threshold": "0.2", "mirostat": "2", "mirostat_tau": "4", "mirostat_eta": "0.2",
    "logit_bias": '{"15": -1.5, "16": -Infinity}',
}  # fmt: skip
VALUES = {"dry_breakers": (".",), "logit_bias": {15: -1.5, 16: float("-inf")}}


def parse(*arguments: str) -> tuple[Sampling | None, str]:
    """What a command gets for these arguments, and what is printed."""
    found: list[Sampling] = []

    @click.command()
    @sampling_options
    def command(sampling: Sampling) -> None:
        found.append(sampling)

    result = CliRunner().invoke(command, arguments)
    return (found[0] if found else None), result.output


def test_the_table_has_every_field_of_sampling() -> None:
    assert SAMPLING_OPTIONS.keys() == {field.name for field in fields(Sampling)} == GIVEN.keys()


@pytest.mark.parametrize("name", SAMPLING_OPTIONS)
def test_an_option_sets_its_field_alone(name: str) -> None:
    sampling, said = parse(f"--{name.replace('_', '-')}", GIVEN[name])
    assert sampling is not None, said
    value = getattr(sampling, name)
    assert value == VALUES.get(name, value)
    assert value != getattr(sampling_defaults(), name)
    if name != "mirostat":
        others = {field.name for field in fields(Sampling)} - {name}
        assert all(getattr(sampling, other) == getattr(sampling_defaults(), other) for other in others)


def test_the_defaults_are_greedy() -> None:
    assert parse()[0] == sampling_defaults() == Sampling(top_k=40, top_p=0.95, min_p=0.05)
    assert sampling_defaults().is_greedy


def test_mirostat_takes_the_place_of_filters_that_were_not_asked_for() -> None:
    sampling, _ = parse("--mirostat", "2", "--temperature", "0.8")
    assert sampling == Sampling(temperature=0.8, mirostat=2)
    sampling, _ = parse("--mirostat", "2", "--temperature", "0.8", "--top-k", "40")
    assert sampling == Sampling(temperature=0.8, mirostat=2, top_k=40)  # which `Sampling.check` refuses
    assert make_sampling({"mirostat": 0, "top_k": 40}, ()) == Sampling(top_k=40)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--logit-bias", "15"), "'15' is not such JSON as"),
        (("--logit-bias", '{"a": 1}'), "is not such JSON as"),
        (("--logit-bias", "[" * 10000), "is not such JSON as"),
        (("--dry-breakers", '"."'), "is not such JSON as"),
        (("--mirostat", "3"), "3 is not in the range"),
        (("--repeat-penalty", "0"), "0.0 is not in the range"),
    ],
)
def test_a_value_that_is_none_is_a_usage_error(arguments: tuple[str, ...], said: str) -> None:
    sampling, output = parse(*arguments)
    assert sampling is None
    assert said in output.replace("\n", " ")


def test_template_options_are_json_or_text() -> None:
    assert parse_template_option("enable_thinking=false") == ("enable_thinking", False)
    assert parse_template_option("reasoning_effort=low") == ("reasoning_effort", "low")
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_template_option("enable_thinking")
    with pytest.raises(ConfigError, match="False is not JSON"):
        parse_template_option("enable_thinking=False")
