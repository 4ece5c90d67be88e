"""The checkable rewards of GRPO and RLOO as sections of the configuration; planning/rewards.py computes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from edgetune.section import Section

RewardKind = Literal["exact", "json", "number", "regex", "format", "python"]
_VALUES = {"regex": "pattern", "format": "pattern", "python": "function"}
"""Kind -> the option that the short form `kind: value` gives."""


class RewardConfig(Section):
    """A reward of generated answers: between 0 and 1, but for `python`."""

    kind: RewardKind
    """What is rewarded."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """The factor of this reward in the sum."""
    column: str = "answer"
    """The key of the row that holds the expected answer, or the pattern of `regex`."""
    pattern: str | None = None
    """A regular expression: `regex` looks for it in the answer, `format` compares it with the whole answer."""
    extract: str | None = None
    """A regular expression with a group: what it finds in the answer is compared in place of the whole answer."""
    function: str | None = None
    """`FILE.py:FUNCTION`, called with the answer and the row."""

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, value: Any) -> Any:
        """Read `exact`, `{regex: PATTERN}` and `{python: FILE.py:FUNCTION}`, each also with `weight` beside."""
        if isinstance(value, str):
            return {"kind": value}
        if not isinstance(value, Mapping) or "kind" in value:
            return value
        kinds = [key for key in value if key in get_args(RewardKind)]
        if not kinds:
            known = ", ".join(get_args(RewardKind))
            raise ValueError(f"{dict(value)} names no kind of reward: give one of {known}")
        if len(kinds) > 1:
            raise ValueError(f"{dict(value)} names {len(kinds)} kinds of rewards: give {' and '.join(kinds)} apart")
        kind, rest = kinds[0], {key: each for key, each in value.items() if key != kinds[0]}
        if isinstance(value[kind], Mapping):
            return {"kind": kind, **value[kind], **rest}
        return {"kind": kind, _VALUES.get(kind, "column"): value[kind], **rest}

    @field_validator("pattern", "extract")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"it is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.kind == "format" and self.pattern is None:
            raise ValueError("the reward `format` needs a pattern, such as {format: '<answer>.*</answer>'}")
        if self.kind == "python" and (self.function is None or ":" not in self.function):
            raise ValueError("the reward `python` needs a function, such as {python: 'rewards.py:score'}")
        if self.extract is not None and re.compile(self.extract).groups != 1:
            raise ValueError(f"extract {self.extract!r} must have one group, such as 'The answer is (.*)'")
        for option in ("pattern", "function"):
            if getattr(self, option) is not None and _VALUES.get(self.kind) != option:
                raise ValueError(f"the reward `{self.kind}` reads no {option}")
        # run.json states defaults too, so that a stated default is no contradiction
        if not self.reads_column and self.column != type(self).model_fields["column"].default:
            raise ValueError(f"the reward `{self.kind}` compares with no column of the row; leave out column")
        if self.kind == "python" and self.extract is not None:
            raise ValueError("the reward `python` is given the whole answer; leave out extract")
        return self

    @property
    def name(self) -> str:
        """The reward in messages and among the metrics."""
        return self.function.rpartition(":")[2] if self.function else self.kind

    @property
    def reads_column(self) -> bool:
        """Whether each row must have the column."""
        return self.kind in ("exact", "json", "number") or (self.kind == "regex" and self.pattern is None)
