"""Biases that a training gave to layers without one (BitFit): which output can hold them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgetune_converters.architectures.class_defaults import CLASS_DEFAULTS
from edgetune_converters.architectures.table import SWITCHED_BIASES, Family, TensorRow


def rows_of(family: Family, module: str) -> list[TensorRow]:
    """Return the rows of a module: several where its weight becomes several tensors."""
    name = family.canonical_name(module + ".weight").removesuffix(".weight")
    return [row for row in family.tensors if _pattern(row).fullmatch(name)]


def why_no_bias(family: Family, module: str, format_: str) -> str | None:
    """Return why an output of this format cannot hold a bias of a module, None if it can."""
    rows, name = rows_of(family, module), module.rpartition(".")[2]
    if not rows or any(row.stacked or row.part_of or "{layer}" not in row.module for row in rows):
        return f"{name} can have no bias in the {family.name} family"
    if format_ == "gguf-lora":
        return "gguf-lora holds products of two low-rank matrices, and no biases"
    if format_ == "gguf":
        holds = all(row.bias or row.slot in family.gguf_biases for row in rows)
        return None if holds else f"llama.cpp reads no bias of {name} for {family.name}"
    drawn = format_ == "onnx" and family.onnx is not None
    if drawn or (rows[0].bias and family.biased) or any(_switches(family, module)):
        return None
    return f"{family.hf[0]} of transformers has no bias of {name}"


def with_biases(family: Family, modules: Collection[str]) -> Family:
    """Return the family with a bias in the rows of these modules; its requirements were checked without them."""
    rows = {id(row) for module in modules for row in rows_of(family, module)}
    tensors = tuple(replace(row, bias=True) if id(row) in rows else row for row in family.tensors)
    return replace(family, tensors=tensors, requirements=())


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
