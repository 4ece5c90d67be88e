"""An adapter in the form that PEFT itself loads: its own names, one safetensors file, a complete configuration.

PEFT ignores tensors whose names it does not know, and would leave such an adapter without effect.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from edgetune.errors import DataError
from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.directory import WEIGHTS_FILE, AdapterPlace
from edgetune_converters.adapters.peft_config import CONFIG_FILE, PeftConfig
from edgetune_converters.adapters.state_dict import AdapterTensors
from edgetune_converters.reading.wrapper_names import without_inner_wrappers
from edgetune_converters.tensors import ALL, TensorInfo

_TASK = "CAUSAL_LM"
_PREFIX = "base_model.model."
_STARTS_AGAIN = ("loftq", "eva")


@dataclass(frozen=True)
class PeftForm:
    """What of an adapter has to be changed for PEFT."""

    place: AdapterPlace
    adapter: Adapter | None
    """The opened adapter; None for one that is copied as it is."""
    renamed: Mapping[str, TensorInfo] = field(default_factory=dict)
    """The tensors by their names in PEFT; empty if the file of the weights can be copied."""
    config: Mapping[str, Any] | None = None
    """adapter_config.json; None if it can be copied."""

    @property
    def notes(self) -> list[str]:
        """What is changed, in words."""
        found = []
        if self.renamed:
            found.append(
                f"the adapter is stored in the run under PEFT's names, as one safetensors file ({len(self.renamed)} "
                "tensors, numbers unchanged)"
            )
        if self.config is not None:
            stated = {} if self.place.config != CONFIG_FILE else _stated(self.place.path / CONFIG_FILE)
            names = sorted(name for name, value in self.config.items() if stated.get(name) != value)
            found.append(f"adapter_config.json of the run states, for PEFT: {', '.join(names)}")
        return found

    def write(self, folder: Path) -> None:
        """Write configuration and weights to an existing directory."""
        if self.config is None:
            shutil.copyfile(self.place.path / CONFIG_FILE, folder / CONFIG_FILE)
        else:
            (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        if not self.renamed:
            shutil.copyfile(self.place.weights[0], folder / WEIGHTS_FILE)
            return
        assert self.adapter is not None
        file = self.adapter.file
        values = {}
        for name, info in self.renamed.items():
            is_float = info.dtype in ("F32", "F16", "BF16", "F64")
            read = file.rows(info, ALL) if is_float else file.integers(info)
            values[name] = np.ascontiguousarray(read).reshape(info.shape)
        save_file(values, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def peft_form(place: AdapterPlace, config: PeftConfig, adapter: Adapter | None) -> PeftForm:
    """Return the adapter in the form that PEFT loads.

    Args:
        place: Where the adapter lies.
        config: Its adapter_config.json.
        adapter: The adapter after its tensors were matched with the base; None for one that is no change of tensors.

    Raises:
        DataError: The adapter is of no language model, or its weights cannot be rewritten.
    """
    task = config.raw.get("task_type")
    if task not in (None, _TASK):
        raise DataError(
            f"adapter_config.json states the task {task}, and a run needs an adapter of a language model ({_TASK})",
            "Give an adapter that was trained on a causal language model",
        )
    names = {} if adapter is None else _names(adapter, adapter.matched_tensors)
    is_plain = len(place.weights) == 1 and place.weights[0].name == WEIGHTS_FILE
    if adapter is None and not is_plain:
        raise DataError(
            f"the weights in {place.path} are not one {WEIGHTS_FILE}, and an adapter of the kind {config.peft_type} is "
            "not rewritten",
            "Save it again with PEFT: PeftModel.from_pretrained(BASE, DIR).save_pretrained(DIR)",
        )
    as_stored = adapter is None or (is_plain and names.keys() == adapter.file.tensors.keys())
    return PeftForm(place, adapter, {} if as_stored else names, _completed(config, adapter))


def _names(adapter: Adapter, tensors: AdapterTensors) -> dict[str, TensorInfo]:
    """Return the tensors by their names in PEFT."""
    roles_of = adapter.kind.names
    found: dict[str, TensorInfo] = {}
    for module, roles in [*tensors.modules.items(), ("", tensors.shared)]:
        for info in roles.values():
            match = roles_of.role_of(without_inner_wrappers(info.name))
            assert match is not None
            part = f".{match['part']}" if match["part"] else ""
            start = f"{_PREFIX}{module}." if module else "base_model."
            found[f"{start}{match['role']}{part}"] = info
    for target, info in tensors.replacements.items():
        match = roles_of.replaced_by(without_inner_wrappers(info.name))
        assert match is not None
        rest = without_inner_wrappers(info.name)[match.end("module") :]
        found[_PREFIX + target.rpartition(".")[0] + _without_infix(rest)] = info
    for module, info in tensors.token_rows.items():
        found[f"{_PREFIX}{module}.token_adapter.trainable_tokens_delta"] = info
    return found


def _without_infix(rest: str) -> str:
    """Return the end of the name of a module that is trained in full without the name of the adapter."""
    *middle, part = rest.split(".")
    return ("." if "base_layer" not in middle else ".base_layer.") + part


def _completed(config: PeftConfig, adapter: Adapter | None) -> dict[str, Any] | None:
    """Return adapter_config.json with what PEFT needs; None if nothing is missing."""
    raw = {name: value for name, value in config.raw.items() if name != "blocks"}
    wanted: dict[str, Any] = {"task_type": _TASK}
    if "peft_type" not in raw or raw["peft_type"] is None:
        wanted["peft_type"] = config.peft_type
    if adapter is not None and adapter.matched_tensors.modules and not raw.get("target_modules"):
        wanted["target_modules"] = sorted(adapter.matched_tensors.modules)
    start = raw.get("init_lora_weights")
    if start in _STARTS_AGAIN:
        wanted["init_lora_weights"] = True  # otherwise PEFT computes first values from the base again
    return None if all(raw.get(name) == value for name, value in wanted.items()) else raw | wanted


def _stated(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
