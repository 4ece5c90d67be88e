"""The method of an adapter from elsewhere: PEFT's adapter_config.json as the section `adapter` of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from edgetune.errors import ConfigError
from edgetune.methods import METHODS, Method
from edgetune_converters.adapters.peft_config import PeftConfig

_STARTS = ("gaussian", "orthogonal", "eva", "loftq")
"""First values of LoRA that the base, as it is stored, has not changed for."""


def method_of(config: PeftConfig, modules: Sequence[str] = (), tokens: Sequence[str] = ()) -> Method:
    """Return the method and its options, as far as edgetune has them.

    Args:
        config: adapter_config.json.
        modules: The adapted modules, for a file that does not name them.
        tokens: The texts of trained tokens.

    Raises:
        ConfigError: edgetune does not have the method.
    """
    method = next((each for each in METHODS.values() if each.facts.peft_type == config.peft_type), None)
    if method is None:
        raise ConfigError(
            f"the adapter is of the kind {config.peft_type}, of which a run cannot state how it was trained",
            "Merge it with the program that trained it, and export the result with --base",
        )
    stated = {"num_virtual_tokens" if key == "tokens" else key: value for key, value in config.raw.items()}
    options = {
        name: stated[key]
        for name in method.model_fields
        if name != "kind" and (key := _peft_name(method, name)) in stated and stated[key] is not None
    }
    special = {"target_modules": _targets(config.raw, modules), "layers": _layers(config.raw)}
    if config.peft_type == "LORA":
        start = config.raw.get("init_lora_weights")
        special |= {
            "init": start if start in _STARTS else "default",
            "bias": {"lora_only": "adapted"}.get(config.raw.get("bias", "none"), config.raw.get("bias", "none")),
        }
    if "tokens" in method.model_fields and config.peft_type == "TRAINABLE_TOKENS":
        special["tokens"] = list(tokens)
    options |= {name: value for name, value in special.items() if name in method.model_fields and value is not None}
    return _valid(method, options)


def _peft_name(method: type[Method], option: str) -> str:
    if option == "tokens":
        return "num_virtual_tokens"
    return method.peft_names.get(option, option)


def _targets(stated: Mapping[str, Any], modules: Sequence[str]) -> str | list[str] | None:
    named = stated.get("target_modules")
    if isinstance(named, str) and named:
        return named
    return sorted(named) if isinstance(named, list) and named else sorted(modules) or None


def _layers(stated: Mapping[str, Any]) -> list[int] | None:
    layers = stated.get("layers_to_transform")
    return [layers] if isinstance(layers, int) else layers or None


def _valid(method: type[Method], options: Mapping[str, Any]) -> Method:
    """Return the method without the options whose values edgetune does not have, such as a rank of 0."""
    kept = dict(options)
    while True:
        try:
            return method.model_validate(kept)
        except ValidationError as error:
            wrong = {str(problem["loc"][0]) for problem in error.errors() if problem["loc"]} & kept.keys()
            if not wrong:
                raise ConfigError(
                    f"adapter_config.json: {error.errors()[0]['msg']}", "Take the file from the training again"
                ) from None
            for name in wrong:
                del kept[name]
