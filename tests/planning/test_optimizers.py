"""Optimizers: the table is that of the configuration, and what does not fit is refused before training."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers.training_args import OptimizerNames

from edgetune.config import Config, TrainingConfig, parse_config
from edgetune.errors import ConfigError, EnvironmentProblem
from edgetune.planning.optimizers import OPTIMIZERS, check_optimizer


def _config(adapter: dict[str, Any], **training: Any) -> Config:
    return parse_config({
        "base": "base", "data": {"train": "rows.jsonl"}, "adapter": adapter, "training": training,
        "quantization": {"bits": 16},
    })  # fmt: skip


def test_the_table_has_the_optimizers_of_the_configuration_which_are_those_of_transformers() -> None:
    assert tuple(OPTIMIZERS) == get_args(TrainingConfig.model_fields["optimizer"].annotation)
    assert OPTIMIZERS.keys() <= {name.value for name in OptimizerNames}


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="galore_adamw needs galore-torch") as raised:
        check_optimizer(_config({"kind": "full"}, optimizer="galore_adamw", optimizer_options={"rank": 8}))
    assert "pip install 'edgetune[optimizers]'" in str(raised.value.hint)


def test_the_extra_optimizers_has_the_packages_of_the_table() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = {re.split("[<>=]", each)[0] for each in project["optional-dependencies"]["optimizers"]}
    assert extra == {each.package.replace("_", "-") for each in OPTIMIZERS.values() if each.package}


def test_all_contradictions_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check_optimizer(_config({"kind": "lora"}, optimizer="apollo_adamw", optimizer_options={"rnk": 8}))
    assert "has no option rnk; known are rank" in raised.value.message
    assert "adapter.kind: lora trains none" in raised.value.message


def test_options_of_another_optimizer_are_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        check_optimizer(
            _config({"kind": "lora"}, optimizer="adafactor", optimizer_options={"rank": 8}, optimizer_modules=["mlp"])
        )
    assert "adafactor has no option rank" in raised.value.message
    assert "adafactor treats all layers alike" in raised.value.message
