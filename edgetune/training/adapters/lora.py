"""LoRA and rsLoRA: low-rank matrices beside linear layers (arXiv:2106.09685, arXiv:2312.03732)."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from edgetune.config import AdapterConfig


def peft_config(config: AdapterConfig) -> LoraConfig:
    """Return our options under PEFT's names."""
    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
    )


def is_zero(model: Any) -> bool:
    """Whether B, which is initialized with zeros, is still zero in every layer: the adapter changes nothing."""
    return not any(bool(parameter.any()) for name, parameter in model.named_parameters() if ".lora_B." in name)
