"""Check the options of an export against the method of the training: an adapter can require one merge base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from edgetune.errors import ConfigError
from edgetune_converters.names import MERGE_BASES

if TYPE_CHECKING:
    from edgetune.config import ExportConfig
    from edgetune.exporting.source import Source
    from edgetune.methods.base import Method
    from edgetune.runs.manifest import RunManifest
    from edgetune_converters.request import Target


def check_method(source: Source, config: ExportConfig, targets: Iterable[Target]) -> None:
    """Refuse a merge base or a format that contradicts the method by which an adapter was trained.

    An adapter from elsewhere, and a run whose manifest does not state its method, are checked by the converters alone.

    Raises:
        ConfigError: The merge base or a format contradicts the method of a run.
    """
    formats = tuple(dict.fromkeys(target.format for target in targets))
    problems = {
        problem: path for path, trained in source.trainings.items() for problem in _problems(trained, formats, config)
    }
    if problems:
        names = ", ".join(dict.fromkeys(str(path) for path in problems.values()))
        raise ConfigError.of_many(
            f"options of the export that contradict the training of {names}",
            list(problems),
            f"On the command line, {_flags_in(problems)}; a run is trained with what it states",
        )


def _flags_in(problems: Iterable[str]) -> str:
    """Return the flags of the options of `export:` that the problems name."""
    from edgetune.exporting.options import flag_name

    options = dict.fromkeys(option for problem in problems for option in re.findall(r"\bexport\.(\w+)", problem))
    return " and ".join(f"export.{option} is {flag_name(option)}" for option in options)


def _problems(trained: RunManifest, formats: tuple[str, ...], config: ExportConfig) -> list[str]:
    """Return what contradicts the merge base and the formats, leaving out what contradicts the training itself."""
    method = _method_of(trained.config)
    if method is None:
        return []
    bits = trained.config.get("quantization", {}).get("bits", 16 if trained.quantized is None else 4)
    from edgetune.methods.base import Surroundings

    def conflicts(merge_base: str, formats: tuple[str, ...]) -> list[str]:
        return list(method.conflicts(Surroundings(bits, formats, merge_base, lora_rank=config.lora_rank)))

    # a run of an earlier version may contradict what later ones refuse to train
    whatever = set.intersection(*(set(conflicts(merge_base, ())) for merge_base in MERGE_BASES))
    return [problem for problem in conflicts(config.merge_base, formats) if problem not in whatever]


def _method_of(trained: Mapping[str, Any]) -> Method | None:
    """Return the method that a stored configuration states; None where this version of edgetune cannot read it."""
    from edgetune.methods import AdapterConfig

    try:
        found: Method = TypeAdapter(AdapterConfig).validate_python(trained["adapter"])
    except (KeyError, ValidationError):
        return None
    return found
