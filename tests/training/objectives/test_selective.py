"""Objectives with a reference model, on methods that train tensors of the base itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from edgetune.config import parse_config
from edgetune.errors import ConfigError
from edgetune.training.run import train
from tests.training.objectives import encoded
from tests.training.objectives.test_resume import curve

METHODS: dict[str, dict[str, Any]] = {
    "freeze": {"kind": "freeze", "layers": 1},
    "full": {"kind": "full"},
    "llama-pro": {"kind": "llama-pro"},
    "tokens": {"kind": "trainable-tokens", "new_tokens": ["lamp"]},
}


@pytest.mark.parametrize("objective", [
    pytest.param(name, marks=[] if name == "dpo" else pytest.mark.slow) for name in ("dpo", "kto", "grpo")
])  # fmt: skip
@pytest.mark.parametrize("method", [
    pytest.param(name, marks=[] if name == "freeze" else pytest.mark.slow) for name in METHODS
])  # fmt: skip
def test_the_reference_model_is_the_base(method: str, objective: str, base: Path, tmp_path: Path) -> None:
    rewards = {"num_generations": 4, "max_completion_length": 6, "rewards": [{"regex": "[a-z]"}], "beta": 0.1}
    options = {"kind": objective, **(rewards if objective == "grpo" else {})}
    values = encoded.settings(base, tmp_path, options, max_steps=3, save_steps=3, learning_rate=1e-2)
    values["data"]["max_rows"] = 8
    values["adapter"] = METHODS[method]
    values["quantization"] = {"bits": 16}
    if objective == "grpo" and method != "tokens":  # TRL's GRPO switches adapters of PEFT off, and no others
        with pytest.raises(ConfigError, match=r"with adapters of PEFT alone, which .* is not; set objective\.beta: 0"):
            parse_config(values)
        values["objective"]["beta"] = 0
    run = train(parse_config(values), tmp_path / "run")
    losses = [line["loss"] for line in curve(run) if "loss" in line]
    if objective == "dpo":  # equal models: the loss is log(2), whatever the rows; later it is not
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
        assert losses[-1] < losses[0] - 1e-4
