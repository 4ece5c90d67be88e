"""Biases that a training gave to layers without one (BitFit): which output can hold them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgetune_converters.architectures.class_defaults import CLASS_DEFAULTS
from edgetune_converters.architectures.table import SWITCHED_BIASES, Family, TensorRow


def row_of(family: Family, module: str) -> TensorRow | None:
    """Return the row of a module, None if the family has none for it."""
    name = family.canonical_name(module + ".weight").removesuffix(".weight")
    return next((row for row in family.tensors if _pattern(row).fullmatch(name)), None)


def why_no_bias(family: Family, module: str, format_: str) -> str | None:
    """Return why an output of this format cannot hold a bias of a module, None if it can."""
    row, name = row_of(family, module), module.rpartition(".")[2]
    if row is None or row.stacked or row.part_of or "{layer}" not in row.module:
        return f"{name} can have no bias in the {family.name} family"
    if format_ == "gguf-lora":
        return "gguf-lora holds products of two low-rank matrices, and no biases"
    if format_ == "gguf":
        holds = row.bias or row.slot in family.gguf_biases
        return None if holds else f"llama.cpp reads no bias of {name} for {family.name}"
    drawn = format_ == "onnx" and family.onnx is not None
    if drawn or (row.bias and family.biased) or any(_switches(family, module)):
        return None
    return f"{family.hf[0]} of transformers has no bias of {name}"


def with_biases(family: Family, modules: Collection[str]) -> Family:
    """Return the family with a bias in the rows of these modules."""
    rows = {id(row) for module in modules if (row := row_of(family, module))}
    return replace(
        family, tensors=tuple(replace(row, bias=True) if id(row) in rows else row for row in family.tensors)
    )  # fmt: skip


def with_switches(family: Family, raw: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """Return config.json with the fields set by which transformers' class makes these biases."""
    fields = {field for module in modules for field in _switches(family, module)}
    inner = raw.get("text_config")
    if not isinstance(inner, Mapping):
        return {**raw, **dict.fromkeys(fields, True)}
    own = dict.fromkeys((field for field in fields if field in raw), True)
    return {**raw, **own, "text_config": {**inner, **dict.fromkeys(fields, True)}}


def _switches(family: Family, module: str) -> Iterator[str]:
    """Yield the fields of config.json by which transformers' class makes the bias of a module."""
    known = CLASS_DEFAULTS.get(family.hf[0], {})
    name = family.canonical_name(module + ".weight").removesuffix("weight") + "bias"
    yield from (field for field, layers in SWITCHED_BIASES.items() if field in known and layers.search(name))


def _pattern(row: TensorRow) -> re.Pattern[str]:
    return re.compile(re.escape(row.module).replace(r"\{layer\}", r"\d+").replace(r"\{n\}", r"\d+"))
