"""Methods of `edgetune.methods` as PEFT's configurations."""

from __future__ import annotations

import pytest
from peft import PeftType

from edgetune.methods import METHODS, Lora
from edgetune.training.adapters.attach import peft_config


@pytest.mark.parametrize("kind", [kind for kind, method in METHODS.items() if method.facts.peft_type])
def test_every_method_is_one_of_peft(kind: str) -> None:
    assert peft_config(METHODS[kind](kind=kind)).peft_type == PeftType(METHODS[kind].facts.peft_type)


def test_options_reach_peft() -> None:
    peft = peft_config(Lora(r=4, alpha=6, dropout=0.25, target_modules=["q_proj"], use_rslora=True))
    assert (peft.peft_type, peft.task_type) == ("LORA", "CAUSAL_LM")
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": {"q_proj"}, "use_rslora": True}
    assert {name: getattr(peft, name) for name in options} == options
