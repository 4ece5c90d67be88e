"""The flags of `merge-export`, derived from the fields of the `export:` section: types, choices and help.

Only what a field does not tell is stated here: a spelling other than --field-name, and the metavar.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from edgetune.config import RENAMED_EXPORT_KEYS, ExportConfig, parse_section

Command = TypeVar("Command", bound=Callable[..., Any])


class _Flag(NamedTuple):
    """How the flag of a field is spelled."""

    names: tuple[str, ...] = ()
    """Empty: --field-name."""
    metavar: str | None = None
    comma_separated: bool = False
    """Whether one value of the flag is the whole list."""


_FLAGS: Mapping[str, _Flag] = {
    "formats": _Flag(("--format",), "LIST", comma_separated=True),
    "types": _Flag(("-q", "--type"), "LIST", comma_separated=True),
    "tensor_types": _Flag(("--tensor-type",), "REGEX=TYPE"),
    "output_tensor_type": _Flag(("--output-tensor-type", "--output-type"), "TYPE"),
    "token_embedding_type": _Flag(metavar="TYPE"),
    "imatrix": _Flag(metavar="FILE|auto"),
    "imatrix_tokens": _Flag(metavar="N"),
    "adapter_weights": _Flag(("--adapter-weight",), "NUMBER"),
    "lora_rank": _Flag(metavar="N"),
    "lora_max_error": _Flag(metavar="NUMBER"),
    "density": _Flag(metavar="SHARE"),
    "combine_rank": _Flag(metavar="N"),
    "split_max_size": _Flag(metavar="SIZE"),
    "max_shard_size": _Flag(metavar="SIZE"),
    "prompt_task": _Flag(metavar="TASK"),
}


def flag_name(field: str) -> str:
    """Return the flag of a field, such as --tensor-type."""
    return _flag(field).names[0]


def export_options(command: Command) -> Command:
    """Decorate a command with a flag for every field of the `export:` section."""
    import click

    for field, info in reversed(ExportConfig.model_fields.items()):
        flag = _flag(field)
        details = _click_details(info.annotation, flag)
        command = click.option(*flag.names, field, help=info.description, metavar=flag.metavar, **details)(command)
    return command


def resolve_options(stored: Mapping[str, Any], given: Mapping[str, Any]) -> ExportConfig:
    """Return the section of the run with the given options over it. Raises ConfigError for a value no field accepts.

    Args:
        stored: The `export:` section of the run.
        given: Field -> value of the command line or of Python. None, () and False mean that it is not given.
    """
    named = {field: value for field, value in given.items() if value not in (None, ()) and value is not False}
    values = {field: _field_value(field, value) for field, value in named.items()}
    present = {RENAMED_EXPORT_KEYS.get(field, field): value for field, value in stored.items()}
    return parse_section(ExportConfig, {**present, **values}, "the export's options")


def _flag(field: str) -> _Flag:
    flag = _FLAGS.get(field, _Flag())
    return flag if flag.names else flag._replace(names=("--" + field.replace("_", "-"),))


def _click_details(annotation: Any, flag: _Flag) -> dict[str, Any]:
    """Translate the annotation of a field into the arguments of click.option."""
    import click

    kind = _without_none(annotation)
    if kind is bool:
        return {"is_flag": True}
    if kind is int:
        return {"type": click.INT}
    if get_origin(kind) is Literal:
        return {"type": click.Choice([str(choice) for choice in get_args(kind)])}
    if get_origin(kind) is list and not flag.comma_separated:
        return {"multiple": True}
    return {}


def _field_value(field: str, value: Any) -> Any:
    """Convert the text of a flag to what the field accepts; values from Python are accepted as they are."""
    if isinstance(value, tuple):
        return list(value)
    if not isinstance(value, str):
        return value
    if _flag(field).comma_separated:
        return list(dict.fromkeys(part.strip().lower() for part in value.split(",") if part.strip()))
    info = ExportConfig.model_fields.get(field)
    choices = {str(choice): choice for choice in get_args(_without_none(info.annotation))} if info else {}
    return choices.get(value, value)


def _without_none(annotation: Any) -> Any:
    """Return T of T | None."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation
