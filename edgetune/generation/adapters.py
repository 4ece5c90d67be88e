"""LoRA adapters that commands add to a loaded model: FILE.gguf, or FILE.gguf=WEIGHT."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from edgetune.errors import ConfigError, RuntimeProblem

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class WeightedAdapter:
    """A GGUF adapter, and the weight that multiplies its change."""

    path: Path
    weight: float = 1.0

    @property
    def in_use(self) -> tuple[str, float]:
        """The name under which `load_fitted` loads it, and its weight."""
        return str(self.path), self.weight


def adapter_option(function: Function) -> Function:
    """Add --adapter, which may be repeated, to a command, which gets them as the argument `adapters`."""

    @functools.wraps(function)
    def command(*, adapters: tuple[str, ...], **values: Any) -> Any:
        return function(adapters=parse_adapters(adapters), **values)

    wrapped: Any = command
    result: Function = click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="FILE[=WEIGHT]",
        help="GGUF LoRA adapter that is added to FILE, with WEIGHT in place of 1 (repeatable).",
    )(wrapped)
    return result


def parse_adapter(text: str) -> WeightedAdapter:
    """Return file and weight of `FILE[=WEIGHT]`.

    Raises:
        ConfigError: The weight is not a number.
        RuntimeProblem: There is no such file, or it is no adapter.
    """
    path, weight = Path(text), 1.0
    if not path.exists():
        name, separator, number = text.rpartition("=")
        if separator:
            path, weight = Path(name), _weight(number, text)
    from edgetune.runtime.artifacts import is_adapter

    path = path.expanduser()
    if not path.is_file():
        raise RuntimeProblem(f"there is no adapter {path}", "Export one with `--format gguf-lora`")
    if not is_adapter(path):
        raise RuntimeProblem(f"{path} is not a GGUF adapter", "Export one with `--format gguf-lora`")
    return WeightedAdapter(path, weight)


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"--adapter {text}: {number!r} is not a weight", "Give a number, such as FILE.gguf=0.5")
    return weight


def parse_adapters(texts: Sequence[str]) -> list[WeightedAdapter]:
    """Return the adapters of several options. Raises as `parse_adapter`, and ConfigError for a file given twice."""
    found = [parse_adapter(text) for text in texts]
    seen: set[Path] = set()
    for each in found:
        if each.path.resolve() in seen:
            raise ConfigError(
                f"--adapter {each.path} is given twice", "Give it once, with the weight that it shall have"
            )
        seen.add(each.path.resolve())
    return found
