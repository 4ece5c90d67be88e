"""Sections of the configuration: the base class, sections that come in several kinds, and YAML with overrides."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from edgetune.errors import ConfigError

EXAMPLE_HINT = "Start from samples/smart-home/config.yaml"
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]


def _types_in(annotation: Any) -> set[Any]:
    """Return the annotation and all types within it."""
    return {annotation}.union(*(_types_in(each) for each in get_args(annotation)))


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors: a misspelled option must not be ignored."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        types = _types_in(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and bool not in types and {int, float} & types:
            raise PydanticCustomError("float_type", "give a number")  # YAML reads `yes` and `on` as true
        return value


def kind_of(section: type[BaseModel]) -> str:
    """Return the value of `kind` that chooses a section."""
    return str(section.model_fields["kind"].default)


def one_of(sections: Sequence[type[BaseModel]]) -> Any:
    """Return the annotation of a field that is one of these sections, chosen by `kind`; the first is the default."""
    if len(sections) == 1:
        return sections[0]
    default = kind_of(sections[0])

    def chosen(value: Any) -> str:
        kind = value.get("kind", default) if isinstance(value, Mapping) else getattr(value, "kind", default)
        return str(kind)

    tagged = [Annotated[section, Tag(kind_of(section))] for section in sections]
    return Annotated[Union[tuple(tagged)], Discriminator(chosen)]  # noqa: UP007 - made of a tuple


def alternatives(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """Return the sections that a field may be, by kind: none for a plain option, one under "" without kinds."""
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        return {"": field.annotation}
    found = [get_args(member)[0] for member in get_args(field.annotation) if hasattr(member, "__metadata__")]
    return {
        kind_of(section): section for section in found if isinstance(section, type) and issubclass(section, BaseModel)
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file. Raises ConfigError for anything else."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}", EXAMPLE_HINT) from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not a YAML text file", "Give the path of a .yaml configuration") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{path}{where}: {problem}", "Fix the YAML at that line") from None
    if raw is None:
        raise ConfigError(f"{path} is empty", EXAMPLE_HINT)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no mapping of options but {str(raw)[:40]!r}", EXAMPLE_HINT)
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set an option of a mapping from `section.option=value`, whose value is YAML. Raises ConfigError."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} is not of the form key=value", "For instance --set training.epochs=2")
    *parents, leaf = key.split(".")
    place = raw
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {key}: {parent} is a value, not a section")
    try:
        place[leaf] = _yaml_value(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: {text!r} is not a YAML value") from None


def _yaml_value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 2e-4 as a string, for want of a dot
        try:
            return float(value)
        except ValueError:
            return value
    return value


def split_existing(value: str, folder: Path) -> tuple[Path | None, str]:
    """Return the longest beginning of a name that is a path, and the rest: a subset, a split, a number of rows."""
    stem = value
    while stem:
        path = folder / Path(stem).expanduser()
        with contextlib.suppress(OSError):  # longer than a file name can be
            if path.exists():
                return path, value[len(stem) :]
        cut = max(stem.rfind(mark) for mark in "#@:")
        stem = stem[:cut] if cut > 0 else ""
    return None, value
