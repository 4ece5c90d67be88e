"""What `make bench-methods` compares: every kind with its defaults, and variants that are options of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from edgetune.methods import METHODS, Method
from edgetune.methods.base import Surroundings

SAMPLE_RATE = 2e-3
"""The learning rate that samples/smart-home states, with which LoRA is trained."""

RATES: Mapping[str, float] = {
    **dict.fromkeys(("full", "freeze", "llama-pro", "osf"), 2e-4),
    **dict.fromkeys(("bitfit", "layernorm", "ia3", "beft", "shira"), 1e-2),
    **dict.fromkeys(("vera", "pvera", "vblora", "unilora", "tinylora", "fourierft", "waveft", "road"), 1e-2),
    **dict.fromkeys(("prompt-tuning", "p-tuning", "prefix-tuning", "multitask-prompt-tuning"), 2e-2),
}
"""Learning rates by kind, from the papers' ranges. They are not searched: a method may do better with another."""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "rslora": {"kind": "lora", "use_rslora": True},
    "lora+": {"kind": "lora", "loraplus_lr_ratio": 16},
    "dora": {"kind": "lora", "use_dora": True},
    "pissa": {"kind": "lora", "init": "pissa"},
    "olora": {"kind": "lora", "init": "olora"},
    "lora_ga": {"kind": "lora", "init": "lora_ga"},
    "gaussian": {"kind": "lora", "init": "gaussian"},
}
"""Variants that are options of a kind."""


SMALL_BLOCKS: Mapping[str, Mapping[str, Any]] = {"vblora": {"vector_length": 64}, "c3a": {"block_size": 64}}
"""Options by kind for the layers of the samples' bases, which the defaults do not divide."""


@dataclass(frozen=True)
class Variant:
    """A method as the benchmark trains it."""

    name: str
    adapter: Mapping[str, Any]
    learning_rate: float
    bits: int = 4
    """`quantization.bits`: 4 unless the method cannot be trained on it."""


def variants() -> dict[str, Variant]:
    """Return the variants by name, LoRA first; kinds that no GGUF file can hold are left out."""
    methods = {kind: method(kind=kind) for kind, method in METHODS.items()}
    found = {
        kind: _variant(kind, {"kind": kind, **SMALL_BLOCKS.get(kind, {})})
        for kind, method in methods.items()
        if kind != "trainable-tokens" and any(_fits(method, bits) for bits in (4, 8, 16))
    }
    return found | {name: _variant(name, options) for name, options in OPTIONS.items() if _is_known(options)}


def _is_known(options: Mapping[str, Any]) -> bool:
    try:
        METHODS[options["kind"]](**options)
    except ValidationError:
        return False
    return True


def _variant(name: str, adapter: Mapping[str, Any]) -> Variant:
    method = METHODS[adapter["kind"]](**adapter)
    bits = next((bits for bits in (4, 16, 8) if _fits(method, bits)), 16)
    rate = RATES.get(method.kind, SAMPLE_RATE)
    return Variant(name, adapter, rate, bits)


def _fits(method: Method, bits: int) -> bool:
    """Whether the method can be trained on so many bits and exported as the benchmark does."""
    around = Surroundings(bits, ("gguf",), "original", gradient_checkpointing=False)
    return not list(method.conflicts(around))
