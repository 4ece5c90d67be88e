"""Sampling fields, which all dialects name alike."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

from pydantic import Field, field_validator

from edgetune.errors import EdgetuneError
from edgetune.runtime.sampling import Sampling
from edgetune.serving.api_errors import bad_request, from_problem
from edgetune.serving.conversation import seed_of
from edgetune.serving.request_fields import Fields

_BAN = -100.0
"""A bias with which OpenAI's API excludes a token."""

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class SamplingFields(Fields):
    """How tokens are chosen; None: as the server was told. Those below `seed` are extensions, named as in llama.cpp."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Probability | None = None
    typical_p: Probability | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    dry_multiplier: Annotated[float, Field(ge=0)] | None = None
    dry_base: Annotated[float, Field(gt=0)] | None = None
    dry_allowed_length: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    xtc_probability: Probability | None = None
    xtc_threshold: Probability | None = None
    mirostat: Annotated[int, Field(ge=0, le=2)] | None = None
    mirostat_tau: Annotated[float, Field(ge=0)] | None = None
    mirostat_eta: Annotated[float, Field(ge=0)] | None = None

    @field_validator("top_k")
    @classmethod
    def _zero_keeps_all(cls, value: int | None) -> int | None:
        return value if value is None else max(0, value)

    def sampling(self, default: Sampling, vocabulary_size: int, prefix: str = "") -> Sampling:
        """Return the sampling of the request.

        Args:
            default: What fields that are not given have.
            vocabulary_size: Token ids of logit_bias are below it.
            prefix: What precedes the names of the fields, for errors.

        Raises:
            ApiError: A value is out of range, or two exclude one another; with the field.
        """
        given = {name: value for name in _NAMES if (value := getattr(self, name)) is not None}
        if "seed" in given:
            given["seed"] = seed_of(given["seed"])
        if self.logit_bias:
            given["logit_bias"] = _token_biases(self.logit_bias, vocabulary_size, prefix)
        found = replace(default, **given)
        try:
            found.check(vocabulary_size)
        except EdgetuneError as problem:
            name = problem.message.split()[0]  # the field
            raise from_problem(problem, prefix + name) from None
        return found


_NAMES = tuple(name for name in SamplingFields.model_fields if name != "logit_bias")


def _token_biases(given: dict[str, float], vocabulary_size: int, prefix: str) -> dict[int, float]:
    found = {}
    for key, bias in given.items():
        field = f"{prefix}logit_bias.{key}"
        if not key.isascii() or not key.isdigit() or int(key) >= vocabulary_size:
            raise bad_request(f"logit_bias: {key!r} is not a token id below {vocabulary_size}", field)
        found[int(key)] = -math.inf if bias <= _BAN else bias
    return found
