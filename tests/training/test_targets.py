"""Which layers `adapter.target_modules` and `adapter.layers` choose, also in families with fused matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgetune.errors import ConfigError
from edgetune.methods import Lora
from edgetune.methods.base import SLOTS_OF_PRESET
from edgetune.planning.base_model import Base, ExportableLayers
from edgetune.training.adapters.targets import resolve_targets
from edgetune_converters.architectures.slots import GGUF_NAMES
from tests.converters import family_models

LAST_PARTS: dict[str, dict[str, set[str]]] = {
    "phi3": {"q_v": {"qkv_proj"}, "attention": {"qkv_proj", "o_proj"}, "mlp": {"gate_up_proj", "down_proj"}},
    "gpt2": {"q_v": {"c_attn"}, "attention": {"c_attn", "c_proj"}, "mlp": {"c_fc", "c_proj"}, "v": {"c_attn"}},
    "neox": {"q_v": {"query_key_value"}, "mlp": {"dense_h_to_4h", "dense_4h_to_h"}},
    "gemma2": {"q_v": {"q_proj", "v_proj"}, "v": {"v_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}},
}


def loaded(name: str, folder: Path) -> tuple[Any, ExportableLayers]:
    """The modules of a family without weights, and its layers that are exported."""
    directory = family_models.base(name, folder / "base")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return model, Base(name, directory, None).layers


def test_presets_name_slots_of_the_architecture_table() -> None:
    assert {slot for slots in SLOTS_OF_PRESET.values() for slot in slots} <= GGUF_NAMES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST_PARTS)
def test_presets_fit_layers_by_what_they_do(name: str, tmp_path: Path) -> None:
    model, layers = loaded(name, tmp_path)
    for preset, parts in LAST_PARTS[name].items():
        names = resolve_targets(model, Lora(target_modules=preset), layers)
        assert isinstance(names, list)
        assert {each.rpartition(".")[2] for each in names} == parts
        assert all(layers.slots_of(f"{each}.weight") & set(SLOTS_OF_PRESET[preset]) for each in names)
    one = resolve_targets(model, Lora(target_modules="attention", layers=[1]), layers)
    assert isinstance(one, list)
    assert one
    assert all(".1." in each for each in one)
    assert resolve_targets(model, Lora(), layers) == "all-linear"


@pytest.mark.slow
def test_a_pattern_is_a_regular_expression_for_whole_names(tmp_path: Path) -> None:
    model, layers = loaded("gemma2", tmp_path)
    pattern = r".*layers\.[01]\.mlp\.up_proj"
    assert resolve_targets(model, Lora(target_modules=pattern), layers) == pattern
    limited = resolve_targets(model, Lora(target_modules=pattern, layers=[0]), layers)
    assert limited == ["model.layers.0.mlp.up_proj"]
    for wrong, words in (("up_proj", "fits no layer"), ("(", "is no regular expression")):
        with pytest.raises(ConfigError, match=words):
            resolve_targets(model, Lora(target_modules=wrong), layers)
