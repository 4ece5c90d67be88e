"""Layers of a base with an adapter that PEFT alone can merge, written as a temporary adapter of whole tensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from edgetune_converters.adapters.peft_config import CONFIG_FILE
from edgetune_converters.adapters.whole_tensors import MERGED_BY_PEFT
from edgetune_converters.errors import AdapterError


def write_merged_layers(base: Path, adapter: Path, directory: Path, identity: Mapping[str, str]) -> int:
    """Merge an adapter with PEFT into the base in f32, and write the changed layers, one file each.

    Args:
        base: The directory of the base.
        adapter: The directory of the adapter.
        directory: Where the layers are written, with an adapter_config.json that the converters read.
        identity: SHA-256 of the files of the adapter, by name.

    Returns:
        The number of layers.

    Raises:
        AdapterError: PEFT cannot load or merge the adapter.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            wrapped = PeftModel.from_pretrained(model, adapter)
            unused = wrapped.load_adapter(adapter, wrapped.active_adapter).unexpected_keys
            changed = [
                name
                for name, module in wrapped.base_model.model.named_modules()
                if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            ]
            merged = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, ImportError, TypeError, KeyError) as error:
        raise AdapterError(
            f"PEFT cannot merge {adapter}: {error}", "Merge it with the program that trained it"
        ) from error
    if unused:
        raise AdapterError(
            f"PEFT does not use {len(unused)} tensors of {adapter}: {', '.join(unused[:3])}",
            "Was it trained on this base model?",
        )
    modules = dict(merged.named_modules())
    layers = [tensors for name in changed if name in modules and (tensors := _tensors_of(name, modules[name]))]
    if not layers:
        raise AdapterError(f"PEFT changed no layer of {base} with {adapter}", "Was it trained on this base model?")
    for number, tensors in enumerate(layers, 1):
        save_file(tensors, directory / f"adapter_model-{number:05d}-of-{len(layers):05d}.safetensors")
    by = f"PEFT {peft.__version__} with torch {torch.__version__}"
    stated = {"edgetune_method": MERGED_BY_PEFT, "identity": dict(identity), "merged_by": by}
    (directory / CONFIG_FILE).write_text(json.dumps(stated))
    return len(layers)


def _tensors_of(name: str, module: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{own}": parameter.detach().contiguous() for own, parameter in module.named_parameters(recurse=False)
    }
