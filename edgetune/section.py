"""Sections of the configuration: the base class, and sections that come in several kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]


def _types_in(annotation: Any) -> set[Any]:
    """Return the annotation and all types within it."""
    return {annotation}.union(*(_types_in(each) for each in get_args(annotation)))


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors: a misspelled option must not be ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

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
