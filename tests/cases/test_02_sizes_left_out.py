"""What config.json leaves to transformers' class, or states in text_config alone, is read as transformers reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import load_config
from edgetune.planning.base_model import find_base
from edgetune.planning.disk import estimate_run_bytes
from edgetune.planning.prepare import prepare_run
from edgetune_converters.architectures import FAMILIES, completed_config
from edgetune_converters.architectures.class_defaults import CLASS_DEFAULTS
from edgetune_converters.architectures.config import _ALIASES
from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import Model, open_model
from edgetune_converters.names import ORIGINAL
from edgetune_converters.onnx import model as onnx_model
from edgetune_converters.onnx.plan import DEFAULT_SETTINGS, onnx_recipe
from edgetune_converters.provenance.metadata import hyperparameter_keys
from tests.converters import family_models, runtime, tiny, vocabularies
from tests.data import templates
from tests.export_requests import export
from tests.training import runs

torch, transformers = tiny.torch, tiny.transformers

EYES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "vision_use_head": False,
}  # fmt: skip
# what the published 4 B model states of its text part, in small
STATED: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "sliding_window": 1024,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}  # fmt: skip
# the base as published; the same with a small vocabulary in text_config, and at the top as well
PLACES = {"nowhere": {}, "in text_config": {"vocab_size": 512}, "at the top too": {"vocab_size": 512}}


def seeing_base(directory: Path, place: str) -> Path:
    """A Gemma 3 that sees, whose config.json states no more than the published ones."""
    text = STATED | PLACES[place]
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text), vision_config=transformers.SiglipVisionConfig(**EYES),
        mm_tokens_per_image=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.to(torch.bfloat16).save_pretrained(directory)
    stated = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106],
        "image_token_index": 262144, "mm_tokens_per_image": 4, "torch_dtype": "bfloat16",
        "text_config": {"model_type": "gemma3_text", **text},
        "vision_config": {"model_type": "siglip_vision_model", **EYES},
    }  # fmt: skip
    top = PLACES[place] if place == "at the top too" else {}
    (directory / "config.json").write_text(json.dumps(stated | top), encoding="utf-8")
    vocabularies.byte_level(
        directory, chat_template=templates.CHATML, pad_token="<|endoftext|>", tokenizer_class="PreTrainedTokenizerFast"
    )
    return directory


@pytest.mark.parametrize("place", PLACES)
def test_the_published_gemma_3_is_exported_and_trained(place: str, tmp_path: Path) -> None:
    base = seeing_base(tmp_path / "base", place)
    export(base, {"f32": tmp_path / "m.gguf"})
    rows = PLACES[place].get("vocab_size", 262_208)
    ids = tiny.random_ids(48, rows)
    expected = tiny.torch_logits(base, None, ids)
    assert expected.shape[1] == rows
    assert tiny.divergence(expected, runtime.logits(tmp_path / "m.gguf", ids))[0] < 1e-6
    config = load_config(runs.write_config(tmp_path / "c.yaml", runs.settings(base, tmp_path)), ["export.types=[f16]"])
    prepared = prepare_run(config)
    assert prepared.base.rows == rows
    scored = sum(len(row.scored) for row in prepared.reference_rows)
    empty = estimate_run_bytes(config, prepared.base.checkpoint, [])
    per_token = (estimate_run_bytes(config, prepared.base.checkpoint, prepared.reference_rows) - empty) / scored
    assert per_token == 16 + (
        2 * rows if rows <= config.reference.full_vocabulary_limit else 8 * config.reference.top_k
    )


def test_preview_knows_the_rows_too(tmp_path: Path) -> None:
    base = seeing_base(tmp_path / "base", "in text_config")
    config = load_config(runs.write_config(tmp_path / "c.yaml", runs.settings(base, tmp_path)))
    assert find_base(config, weights=False).rows == 512


# -- the table of classes ----------------------------------------------------------------------------------------------

WITH_CLASS = [family.hf[0] for family in FAMILIES if hasattr(transformers, family.hf[0])]
_CANONICAL = {other: name for name, others in _ALIASES.items() for other in others}
_KNOWN_FIELDS = {name for fields in CLASS_DEFAULTS.values() for name in fields} - {"rope_theta"}


def _class_of(name: str) -> Any:
    found = getattr(transformers, name).config_class
    return (found.sub_configs or {}).get("text_config", found)


def test_every_family_with_a_class_has_its_defaults() -> None:
    assert sorted(CLASS_DEFAULTS) == sorted(WITH_CLASS)


@pytest.mark.parametrize("name", WITH_CLASS)
def test_the_defaults_are_those_of_transformers(name: str) -> None:
    config = _class_of(name)
    theta = getattr(config, "default_theta", 10_000.0)
    expected = {} if theta == 10_000.0 else {"rope_theta": theta["global"] if isinstance(theta, dict) else theta}
    for field in dataclasses.fields(config):
        canonical = _CANONICAL.get(field.name, field.name)
        if canonical in _KNOWN_FIELDS and field.default not in (None, dataclasses.MISSING):
            expected[canonical] = field.default
    assert CLASS_DEFAULTS[name] == expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_names_of_one_family_are_one_class(family: Any) -> None:
    classes = {_class_of(name) for name in family.hf if hasattr(transformers, name)}
    assert len(classes) <= 1


# -- every family without what transformers would add ------------------------------------------------------------------

_NEVER = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version")
# rearranged after saving: transformers reads another config.json
CASES = [name for name, case in family_models.CASES.items() if case.after is None or name == "mixtral-fused"]


def _without_defaults(directory: Path) -> dict[str, Any]:
    """config.json without each key that transformers fills in with the same value."""
    stated = json.loads((directory / "config.json").read_text())
    expected = transformers.AutoConfig.from_pretrained(directory).to_dict()
    for part in (stated, stated.get("text_config", {})):
        for key in list(part):
            if key in (*_NEVER, "text_config", "vision_config"):
                continue
            value = part.pop(key)
            if not _is_read_as(stated, expected):
                part[key] = value
    return dict(stated)


def _is_read_as(stated: dict[str, Any], expected: dict[str, Any]) -> bool:
    settings = {key: value for key, value in stated.items() if key != "model_type"}
    try:
        found = transformers.AutoConfig.for_model(stated["model_type"], **json.loads(json.dumps(settings)))
    except Exception:  # noqa: BLE001 - whatever transformers needs stays
        return False
    return bool(found.to_dict() | {"_name_or_path": ""} == expected | {"_name_or_path": ""})


def _described(model: Model) -> Iterator[Any]:
    yield {key: value.data for key, value in hyperparameter_keys(model).items()}
    yield [(tensor.gguf_name, tensor.shape) for tensor in model.tensors]
    if model.family.onnx:
        found = onnx_model.source_tensors(model.tensors)
        decoder = onnx_model.describe_model(model.family, model.config, found)
        yield (
            onnx_model.DecoderGraph.of(decoder, found, onnx_recipe("f32"), DEFAULT_SETTINGS)
            .proto("")
            .SerializeToString()
        )


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_the_same_without_what_the_class_adds(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    whole = list(_described(open_model(base, None, merge_base_named(ORIGINAL))))
    shorter = _without_defaults(base)
    (base / "config.json").write_text(json.dumps(shorter))
    assert list(_described(open_model(base, None, merge_base_named(ORIGINAL)))) == whole


def test_a_size_of_the_class_that_the_matrices_contradict_is_refused(tmp_path: Path) -> None:
    base = seeing_base(tmp_path / "base", "in text_config")
    config = json.loads((base / "config.json").read_text())
    del config["text_config"]["vocab_size"]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"has the shape \[512, 16\].*262208") as refusal:
        open_model(base, None, merge_base_named(ORIGINAL))
    assert type(refusal.value).__name__ == "ArchitectureError"


def test_null_is_not_absent() -> None:
    raw = {"architectures": ["MistralForCausalLM"], "sliding_window": None}
    assert completed_config(raw).get("sliding_window") is None
    del raw["sliding_window"]
    assert completed_config(raw).get("sliding_window") == 4096
