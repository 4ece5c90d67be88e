"""Options of the commands that generate text, declared once: `run`, `chat` and `serve` take them from here."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click
from click.core import ParameterSource

from edgetune.errors import ConfigError

if TYPE_CHECKING:
    from edgetune.runtime import Sampling

Function = TypeVar("Function", bound=Callable[..., Any])

CONSTANTS = {"true": "true", "false": "false", "none": "null", "null": "null", "yes": "true", "no": "false"}
"""Spellings of constants in lower case -> JSON. A template would take another spelling for a text, which is true."""


class SamplingOption(NamedTuple):
    """A field of `Sampling` as an option of commands and a setting of a chat."""

    type: click.ParamType[Any]
    default: Any
    help: str


class _JsonValue(click.ParamType[Any]):
    """A value of one type, given as JSON."""

    def __init__(self, name: str, convert: Callable[[Any], Any], example: str) -> None:
        self.name, self._convert, self._example = name, convert, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value of a text; another value as it is."""
        if not isinstance(value, str):
            return value
        try:
            return self._convert(json.loads(value))
        except (ValueError, TypeError, AttributeError, RecursionError):
            self.fail(f"{value!r} is not such JSON as {self._example}", param, ctx)


def _biases(value: dict[str, Any]) -> dict[int, float]:
    return {int(token): float(bias) for token, bias in value.items()}


def _texts(value: list[Any]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TypeError
    return tuple(value)


_PROBABILITY = click.FloatRange(0, 1)
_FROM_0 = click.FloatRange(min=0)
_LAST = click.IntRange(min=-1)

SAMPLING_OPTIONS: Mapping[str, SamplingOption] = {
    "temperature": SamplingOption(_FROM_0, 0.0, "Sampling temperature; 0 = greedy."),
    "top_k": SamplingOption(click.IntRange(min=0), 40, "Keep the K most likely tokens; 0 = all."),
    "top_p": SamplingOption(
        click.FloatRange(0, 1, min_open=True), 0.95, "Nucleus sampling: cumulative probability to keep."
    ),
    "min_p": SamplingOption(_PROBABILITY, 0.05, "Minimum probability relative to the most likely token."),
    "seed": SamplingOption(click.IntRange(0, 2**32 - 2), None, "Seed of the sampler."),
    "typical_p": SamplingOption(_PROBABILITY, 1.0, "Locally typical sampling; 1 = off."),
    "repeat_penalty": SamplingOption(
        click.FloatRange(min=0, min_open=True), 1.0, "Divides the logits of recent tokens; 1 = off."
    ),
    "presence_penalty": SamplingOption(click.FLOAT, 0.0, "Subtracted from the logits of recent tokens; 0 = off."),
    "frequency_penalty": SamplingOption(
        click.FLOAT, 0.0, "Subtracted from the logits of recent tokens for each time that they occur; 0 = off."
    ),
    "repeat_last_n": SamplingOption(_LAST, 64, "Recent tokens that the penalties count; -1 = all."),
    "dry_multiplier": SamplingOption(_FROM_0, 0.0, "Strength of DRY, which penalizes repeated sequences; 0 = off."),
    "dry_base": SamplingOption(_FROM_0, 1.75, "Base of the penalty of DRY."),
    "dry_allowed_length": SamplingOption(click.IntRange(min=0), 2, "Length of repetitions that DRY permits."),
    "dry_last_n": SamplingOption(_LAST, -1, "Recent tokens in which DRY looks for repetitions; -1 = all."),
    "dry_breakers": SamplingOption(
        _JsonValue("JSON", _texts, '["\\n", "."]'), None, "Strings over which DRY sees no repetition, as a JSON list."
    ),
    "xtc_probability": SamplingOption(
        _PROBABILITY, 0.0, "Probability of XTC, which excludes the most likely tokens but one; 0 = off."
    ),
    "xtc_threshold": SamplingOption(_PROBABILITY, 0.1, "Probability above which XTC excludes a token."),
    "mirostat": SamplingOption(
        click.IntRange(0, 2), 0, "Mirostat 1 or 2, in place of top-k, top-p, min-p, typical-p and XTC; 0 = off."
    ),
    "mirostat_tau": SamplingOption(_FROM_0, 5.0, "Surprise in bits that Mirostat aims at."),
    "mirostat_eta": SamplingOption(_FROM_0, 0.1, "Learning rate of Mirostat."),
    "logit_bias": SamplingOption(
        _JsonValue("JSON", _biases, '{"15": -1.5}'), None, "Token ids and what is added to their logits, as JSON."
    ),
}  # fmt: skip
"""Field of `Sampling` -> its option. The defaults are those of the commands; those of `Sampling` keep all tokens.

None is that of `Sampling`.
"""

EXCLUDED_BY_MIROSTAT = ("top_k", "top_p", "min_p")
"""Options whose defaults do not apply with Mirostat, which takes their place."""


class OneFileCommand(click.Command):
    """A command of one FILE that says what to do with a text behind it."""

    def __init__(self, *args: Any, hint: str, **options: Any) -> None:
        """Take the hint, with {text} for what was given."""
        super().__init__(*args, **options)
        self._hint = hint

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return no further arguments. Raises UsageError for some."""
        ctx.allow_extra_args = True
        rest = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            text = " ".join(rest)
            raise click.UsageError(
                f"{text!r} is one argument too many. {self._hint.format(text=shlex.quote(text))}", ctx
            )
        return rest


def sampling_options(function: Function) -> Function:
    """Add the options of SAMPLING_OPTIONS to a command, which gets them as one argument `sampling`."""

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        chosen = {name: values.pop(name) for name in SAMPLING_OPTIONS}
        context = click.get_current_context()
        given = [name for name in chosen if context.get_parameter_source(name) != ParameterSource.DEFAULT]
        return function(sampling=make_sampling(chosen, given), **values)

    wrapped: Any = command
    for name, option in reversed(list(SAMPLING_OPTIONS.items())):
        wrapped = click.option(
            f"--{name.replace('_', '-')}", name, type=option.type, default=option.default,
            show_default=option.default is not None, help=option.help,
        )(wrapped)  # fmt: skip
    result: Function = wrapped
    return result


def make_sampling(values: Mapping[str, Any], given: Sequence[str]) -> Sampling:
    """Return the sampling with these values of SAMPLING_OPTIONS; `given` are the names that the user chose."""
    from edgetune.runtime import Sampling

    chosen = {name: value for name, value in values.items() if value is not None}
    if chosen.get("mirostat"):
        for name in EXCLUDED_BY_MIROSTAT:
            if name not in given:
                del chosen[name]
    return Sampling(**chosen)


def sampling_defaults() -> Sampling:
    """Return the sampling of the commands without options."""
    return make_sampling({name: option.default for name, option in SAMPLING_OPTIONS.items()}, ())


def template_option(function: Function) -> Function:
    """Add --template-option, which may be repeated, as the argument `template_options`."""
    return click.option(
        "--template-option",
        "template_options",
        multiple=True,
        metavar="NAME=VALUE",
        help="Variable of the chat template, as JSON, such as enable_thinking=false (repeatable).",
    )(function)


def machine_options(function: Function) -> Function:
    """Add --threads, --context and --no-fit."""
    threads = click.option(
        "--threads", type=click.IntRange(min=1), help="CPU threads. Default: the physical cores (1 for a tiny model)."
    )
    context = click.option(
        "--context",
        type=click.IntRange(min=8),
        help="Context size in tokens, for prompt and answer. Default: at most 4096.",
    )
    no_fit = click.option(
        "--no-fit", is_flag=True, help="Do not use the settings that `edgetune fit` remembered for the file."
    )
    return threads(context(no_fit(function)))


def speculation_options(function: Function) -> Function:
    """Add --draft and --no-speculation to a command, which gets them as one argument `speculation`."""

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        from edgetune.runtime.slots import Speculation

        draft, is_off = values.pop("draft"), values.pop("no_speculation")
        if draft is not None and is_off:
            raise ConfigError("--draft and --no-speculation cannot be used together", "Remove one of them")
        return function(speculation=Speculation(uses_table=not is_off, draft=draft), **values)

    wrapped: Any = command
    wrapped = click.option(
        "--no-speculation", is_flag=True, help="Guess no tokens from FILE.ngrams, the n-grams of the training answers."
    )(wrapped)
    wrapped = click.option(
        "--draft", type=click.Path(path_type=Path), metavar="FILE",
        help="Small GGUF file of the same vocabulary that guesses tokens, which FILE verifies several at a time.",
    )(wrapped)  # fmt: skip
    result: Function = wrapped
    return result


def parse_template_option(text: str) -> tuple[str, Any]:
    """Return name and value of `NAME=VALUE`. A value that is not JSON is a text: reasoning_effort=low."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ConfigError(
            f"--template-option {text!r} is not of the form NAME=VALUE", "For instance enable_thinking=false"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        if value.lower() in CONSTANTS:
            raise ConfigError(
                f"--template-option {text!r}: {value} is not JSON", f"Write {name}={CONSTANTS[value.lower()]}"
            ) from None
        return name, value
