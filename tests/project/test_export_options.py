"""Every option of an export is declared once: the field of the configuration gives the flag its type and its help."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

import click
import pytest

from edgetune.commands.merge_export import command
from edgetune.config import ExportConfig
from edgetune.exporting import options
from edgetune_converters.formats import FORMATS
from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.names import MERGE_BASES, FormatName

FLAGS = {param.name: param for param in command.params if isinstance(param, click.Option)}
NOT_OF_THE_CONFIGURATION = {"output", "base", "adapters", "threads", "dry_run", "dry_run_alias", "overwrite", "tune"}
"""Where to read and write, and how much of it to do: these depend on the machine and the call."""


def test_every_flag_of_merge_export_is_a_field_of_the_configuration() -> None:
    assert set(FLAGS) == set(ExportConfig.model_fields) | NOT_OF_THE_CONFIGURATION


@pytest.mark.parametrize("field", ExportConfig.model_fields)
def test_type_and_help_of_a_flag_are_those_of_the_field(field: str) -> None:
    info, flag = ExportConfig.model_fields[field], FLAGS[field]
    kind = options._without_none(info.annotation)
    assert flag.help == info.description
    assert flag.is_flag == (kind is bool)
    if get_origin(kind) is Literal:
        assert isinstance(flag.type, click.Choice)
        assert [str(choice) for choice in get_args(kind)] == list(flag.type.choices)
    parsed = command.make_context("merge-export", ["run"]).params[field]
    assert parsed in (None, (), False), "the default is that of the field, not of the flag"


def test_only_unusual_spellings_are_stated() -> None:
    assert options._FLAGS.keys() <= ExportConfig.model_fields.keys()
    for field, flag in options._FLAGS.items():
        assert flag.metavar, field
        assert flag.names != ("--" + field.replace("_", "-"),), f"{field}: this spelling is derived"


# fields of numbers within bounds, or of a number or a name -> text of the flag and its value
_NUMBERS: dict[str, tuple[str, object]] = {
    "lora_rank": ("4", 4),
    "lora_max_error": ("0.5", 0.5),
    "adapter_weights": ("0.7", [0.7]),
    "density": ("0.5", 0.5),
    "combine_seed": ("3", 3),
    "combine_rank": ("3", 3),
    "imatrix_tokens": ("300", 300),
    "prompt_task": ("2", 2),
}


@pytest.mark.parametrize("field", ExportConfig.model_fields)
def test_a_flag_sets_its_field(field: str) -> None:
    kind = options._without_none(ExportConfig.model_fields[field].annotation)
    flag = options.flag_name(field)
    if field in _NUMBERS:
        spelled, number = _NUMBERS[field]
        given = command.make_context("merge-export", [flag, spelled]).params
        assert getattr(options.resolve_options({}, {field: given[field]}), field) == number
        return
    text = {"formats": "gguf,onnx", "types": "Q8_0, f16"}.get(field)
    text = text or (str(get_args(kind)[-1]) if get_origin(kind) is Literal else "0" if kind is int else "text")
    arguments = [flag] if kind is bool else [flag, text]
    given = command.make_context("merge-export", arguments).params
    value = getattr(options.resolve_options({}, {field: given[field]}), field)
    expected = {"formats": ["gguf", "onnx"], "types": ["q8_0", "f16"], "tensor_types": ["text"]}.get(field)
    if kind is int:
        assert value == int(text)
        return
    assert value == (expected or (True if kind is bool else get_args(kind)[-1] if get_args(kind) else "text"))


def test_the_help_of_the_types_names_those_of_every_format() -> None:
    help_ = FLAGS["types"].help or ""
    for format_ in FORMATS.values():
        assert [type_ for type_ in format_.types if type_ in help_], format_
    for name in ("onnx", "safetensors", "gguf-lora"):
        missing = [type_ for type_ in FORMATS[name].types if type_ not in help_]
        assert not missing, f"types of {name} that the docstring of ExportConfig.types does not name"


def test_formats_and_merge_bases_are_those_of_the_converters() -> None:
    assert tuple(FORMATS) == get_args(FormatName)
    assert [merge_base_named(name).name for name in MERGE_BASES] == list(MERGE_BASES)
    assert set(get_args(ExportConfig.model_fields["merge_base"].annotation)) == {*MERGE_BASES, "auto"}
