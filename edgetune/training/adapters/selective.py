"""Models of which some tensors are trained themselves: the methods of `edgetune.methods` that PEFT does not have.

The model stays that of transformers; its class gets what a PeftModel has too: `disable_adapter`, `get_base_model` and
a `save_pretrained` that writes the trained tensors alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgetune.errors import RunDirectoryError
from edgetune.training.adapters.checkpoint_layout import as_loaded, as_stored, stored_names

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
METHOD = "edgetune_method"
"""The key of adapter_config.json that names a method which PEFT does not have."""
TRAINED = "trained_tensors"
"""The key for the trained tensors, as the model names them."""
BLOCKS = "blocks"
"""The key for the block of the base that each block of the model is, or was copied from."""
ZERO = "zero_in_base"
"""The key for the trained tensors that are zero in the base."""


@dataclass
class Selection:
    """The trained tensors of a model."""

    kind: str
    """The method, as `adapter.kind` names it."""
    options: Mapping[str, Any]
    """What adapter_config.json states beside it."""
    parameters: dict[str, torch.nn.Parameter]
    """The trained tensors by name."""
    base_values: dict[str, torch.Tensor] = field(default_factory=dict)
    """The values that make the model the base again, by name."""

    @classmethod
    def of(
        cls, model: Any, kind: str, names: Collection[str], *, zero: Collection[str] = (), options: Mapping[str, Any]
    ) -> Selection:
        """Return the selection of the parameters `names`, and let only these be trained.

        The base has zeros at `zero`, and the present values at the others; of new blocks only the zeros count.
        """
        chosen = {}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
            if name in names:
                chosen[name] = parameter
        present = [] if BLOCKS in options else [name for name in chosen if name not in zero]
        values = {name: torch.zeros((), dtype=chosen[name].dtype) for name in zero}
        values |= {name: _kept(chosen[name].detach()) for name in present}
        return cls(kind, {**options, **({ZERO: sorted(zero)} if zero else {}), TRAINED: sorted(chosen)}, chosen, values)


class SelectiveModel:
    """What the class of a transformers model gets: the interface of a PeftModel."""

    selection: Selection

    def get_base_model(self) -> Any:
        """Return the model itself: nothing is wrapped."""
        return self

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let the model compute what the base computes."""
        trained = {}
        parameters = self.selection.parameters
        try:
            for name, value in self.selection.base_values.items():
                trained[name] = parameters[name].data
                shape = parameters[name].shape  # of zeros, one value is kept
                parameters[name].data = value.to(parameters[name].data).expand(shape).contiguous()
            yield
        finally:
            for name, data in trained.items():
                parameters[name].data = data

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the trained tensors in f32 under the names of the checkpoint, and adapter_config.json."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder / CONFIG_FILE, self)
        save_file(as_stored(self, trained_tensors(self)), folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def load_trained(self, directory: Path) -> None:
        """Read the trained tensors from a directory of `save_pretrained`."""
        parameters = self.selection.parameters
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        with safe_open(directory / WEIGHTS_FILE, "pt") as file:
            differing = set(file.keys()) ^ set(stored_names(self, list(parameters)))
            if differing:
                raise RunDirectoryError(
                    f"{directory} holds other trained tensors than the configuration: {min(differing)} differs",
                    "Restore adapter and export.formats of the run, or start over with --overwrite",
                )
            copy_values(parameters, as_loaded(self, shapes, file.get_tensor))


class FullModel(SelectiveModel):
    """The same, where every tensor is trained: the directory is one that transformers loads."""

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the model as transformers does, in shards, and `FULL_CONFIG_FILE`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder / FULL_CONFIG_FILE, self)
        cast("Any", super(SelectiveModel, self)).save_pretrained(str(folder))

    def load_trained(self, directory: Path) -> None:
        """Read all tensors from a directory of `save_pretrained`."""
        from transformers import AutoModelForCausalLM

        options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": True}
        stored = AutoModelForCausalLM.from_pretrained(str(directory), **options)
        copy_values(self.selection.parameters, dict(stored.named_parameters()))


FULL_CONFIG_FILE = "edgetune_adapter.json"
"""The place of `METHOD` beside a whole model, where transformers would take an adapter_config.json for PEFT's."""


def select(model: Any, selection: Selection, mixin: type[SelectiveModel] = SelectiveModel) -> Any:
    """Return the model with its selection; its class becomes one of the same name with the methods of `mixin`."""
    own = type(model)
    model.__class__ = type(own.__name__, (mixin, own), {"__module__": own.__module__})
    model.selection = selection
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True  # or Trainer refuses a quantized model without a PeftModel
    return model


def is_selective(directory: Path) -> bool:
    """Whether a directory holds the trained tensors of a method that PEFT does not have."""
    return METHOD in stored_config(directory)


def stored_config(directory: Path) -> dict[str, Any]:
    """Return adapter_config.json, or the file that takes its place beside a whole model; empty if there is none."""
    for name in (FULL_CONFIG_FILE, CONFIG_FILE):
        if (directory / name).is_file():
            return dict(json.loads((directory / name).read_text(encoding="utf-8")))
    return {}


def write_config(file: Path, model: Any) -> None:
    """Write which method trained the tensors, on which base, and its options."""
    selection: Selection = model.selection
    stated = {
        "peft_type": None,
        METHOD: selection.kind,
        "base_model_name_or_path": model.name_or_path,
        **selection.options,
    }
    file.write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the trained tensors in f32 on the CPU, by name."""
    return {
        name: parameter.detach().float().cpu().contiguous()
        for name, parameter in model.selection.parameters.items()
    }  # fmt: skip


def copy_values(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Copy values into parameters, which become f32. Raises KeyError unless the names are the same."""
    if parameters.keys() != values.keys():
        raise KeyError(f"the stored tensors are others: {sorted(parameters.keys() ^ values.keys())[:3]}")
    for name, parameter in parameters.items():
        parameter.data = values[name].detach().to(parameter.device, torch.float32, copy=True)


def _kept(values: torch.Tensor) -> torch.Tensor:
    """Return a copy in 16 bits where that holds the same values."""
    if values.is_meta or values.dtype is not torch.float32:
        return values.clone()
    for dtype in (torch.bfloat16, torch.float16):
        short = values.to(dtype)
        if torch.equal(short.float(), values):
            return short
    return values.clone()
