"""The table of adapter families."""

from __future__ import annotations

from typing import get_args

from edgetune.config import AdapterConfig
from edgetune.training.adapters.families import FAMILIES


def test_every_kind_of_the_configuration_has_a_row() -> None:
    assert set(FAMILIES) == set(get_args(AdapterConfig.model_fields["kind"].annotation))


def test_options_reach_peft() -> None:
    config = AdapterConfig(r=4, alpha=6, dropout=0.25, target_modules=["q_proj"], use_rslora=True)
    peft = FAMILIES[config.kind].peft_config(config)
    assert (peft.peft_type, peft.task_type) == ("LORA", "CAUSAL_LM")
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": {"q_proj"}, "use_rslora": True}
    assert {name: getattr(peft, name) for name in options} == options
