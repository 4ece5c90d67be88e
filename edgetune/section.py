"""Sections of the configuration: the base class, sections that come in several kinds, and YAML with overrides."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Union, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from edgetune.errors import ConfigError

_WILDCARDS = re.compile(r"[*?\[]")
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


def absolute_name(value: str, folder: Path) -> str:
    """Return a name of a file, a pattern or a model: a local one with its absolute path, others as they are."""
    stem, rest = split_existing(value, folder)
    if _WILDCARDS.search(value) and (stem is None):
        return str(folder / Path(value).expanduser())
    if stem is not None:
        return f"{stem.resolve()}{rest}"
    return f"{(folder / Path(value).expanduser()).resolve()}" if value.startswith((".", "/", "~")) else value


# -- problems in words -------------------------------------------------------------------------------------------------

OtherKinds = Mapping[str, Mapping[str, str]]
"""Section -> values of `kind` that it does not have -> why not, or what to take."""


class Contradictions(ValueError):
    """Options of several sections that exclude one another, a sentence each."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("; ".join(sentences))
        self.sentences = tuple(sentences)


def describe_all(problem: Any, root: type[BaseModel], explained: OtherKinds) -> tuple[str, ...]:
    """Return a problem of pydantic as sentences; `root`: the section that holds all others."""
    cause = problem.get("ctx", {}).get("error")
    return cause.sentences if isinstance(cause, Contradictions) else (_describe(problem, root, explained),)


def _describe(problem: Any, root: type[BaseModel], explained: OtherKinds) -> str:
    place, kinds = _without_kinds(problem["loc"], root)
    *parents, last = ["", *place]
    is_choice = last in _TEXT_OR_LIST  # pydantic names the alternative that it tried
    location = [part for part in [*parents, last] if part and not _ALTERNATIVE.fullmatch(part)]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(location, root, kinds)}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "union_tag_invalid":
        return _unknown_kind(key, problem["ctx"]["tag"], root, explained)
    message = "give a text, or a list of texts" if is_choice else _WORDS.get(problem["type"])
    if problem["type"] == "model_type":
        inside = [name for name in option_names(root) if name.startswith(f"{key}.")]
        message = f"it is a section of options, such as {inside[0]}" if inside else None
    if message is None:
        message = problem["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
    is_of_section = problem["type"] == "value_error" and isinstance(problem["input"], Mapping)  # the message has keys
    return message if is_of_section or not key else f"{key} is {problem['input']!r}: {message}"


def _without_kinds(place: Sequence[str | int], root: type[BaseModel]) -> tuple[list[str], list[str]]:
    """Return the place of a problem without the kinds of sections that pydantic puts into it, and these kinds."""
    kept, kinds = [], []
    parts = [str(part) for part in place]
    model: type[BaseModel] | None = root
    while parts:
        kept.append(parts.pop(0))
        field = model.model_fields.get(kept[-1]) if model else None
        found = alternatives(field) if field else {}
        if parts and parts[0] in found:
            kinds.append(parts.pop(0))
        model = found.get(kinds[-1] if kinds and kinds[-1] in found else "")
    return kept, kinds


def _unknown_kind(section: str, kind: str, root: type[BaseModel], explained: OtherKinds) -> str:
    why = explained.get(section, {}).get(kind.lower())
    if why:
        return f"{section}.kind is {kind!r}: {why}"
    kinds = list(alternatives(root.model_fields[section]))
    near = difflib.get_close_matches(kind.lower(), kinds, n=1)
    return f"{section}.kind is {kind!r}" + (
        f", did you mean {near[0]}?" if near else f": choose from {', '.join(kinds)}"
    )


_TEXT_OR_LIST = ("str", "list[str]")
_ALTERNATIVE = re.compile(r"(constrained-)?(int|float|str)|(list|literal)\[.*\]")
_WORDS = {
    "string_type": "give a text",
    "list_type": "give a list, such as [a, b]",
    "too_short": "give one or more, or leave the option out",
    "finite_number": "give a finite number",
    "dict_type": "give keys with values, such as {a: b}",
    "bool_type": "give true or false",
    "bool_parsing": "give true or false",
    "int_type": "give a whole number",
    "int_parsing": "give a whole number",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
    "float_parsing": "give a number",
}


def _nearest(location: Sequence[str], root: type[BaseModel], kinds: Collection[str]) -> str:
    """', did you mean training.epochs?' for a key near a known one, first among its siblings, then anywhere."""
    *parents, leaf = location
    known = list(option_names(root, kinds=kinds))
    prefix = ".".join(parents)
    siblings = {name: name.removeprefix(prefix + ".") for name in known if not prefix or name.startswith(prefix + ".")}
    beside = {full: short for full, short in siblings.items() if "." not in short}
    anywhere = {name: name.split(".")[-1] for name in known}
    for candidates, cutoff in ((beside, 0.6), (anywhere, 0.75)):
        match = difflib.get_close_matches(leaf, candidates.values(), n=1, cutoff=cutoff)
        if match:
            return ", did you mean " + next(full for full, short in candidates.items() if short == match[0]) + "?"
    return f" (known here: {', '.join(sorted(beside.values()))})"


def option_names(model: type[BaseModel], prefix: str = "", *, kinds: Collection[str] = ()) -> Iterator[str]:
    """Dotted names of all options, sections included; of a section with a `kind`, those of every kind.

    `kinds`: the kinds that are known; the options of others are left out where one of them is chosen.
    """
    for name, field in model.model_fields.items():
        yield prefix + name
        found = alternatives(field)
        chosen = [section for kind, section in found.items() if kind in kinds] or found.values()
        inside = (option_names(section, f"{prefix}{name}.", kinds=kinds) for section in chosen)
        yield from dict.fromkeys(chain.from_iterable(inside))


def override_of(problem: Any, text: str, overrides: Sequence[str], root: type[BaseModel]) -> str | None:
    """Return the last override that set the option or a section around it; of a section, one that `text` names."""
    place, _ = _without_kinds(problem["loc"], root)
    location = ".".join(place)
    for override in reversed(overrides):
        key = override.partition("=")[0]
        is_inside = not location or key.startswith(f"{location}.")
        is_named = re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", text)
        if f"{location}.".startswith(f"{key}.") or (is_inside and is_named):
            return override
    return None
