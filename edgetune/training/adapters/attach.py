"""Adapters on a base model: attach a new or a trained one, whatever its family."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers.pytorch_utils import Conv1D

from edgetune.errors import ConfigError
from edgetune.methods import Lora, Method, TrainableTokens
from edgetune.methods.base import LayerMethod
from edgetune.methods.selective import SelectiveMethod
from edgetune.objectives import Objective
from edgetune.planning.base_model import ExportableLayers
from edgetune.training.adapters import starts
from edgetune.training.adapters.choices import add_selective, load_selective
from edgetune.training.adapters.selective import is_selective
from edgetune.training.adapters.starts import StartSources
from edgetune.training.adapters.targets import resolve_targets
from edgetune.training.adapters.tokens import add_token_rows
from edgetune.training.adapters.virtual_tokens import complete
from edgetune_converters.adapters.peft_config import CONFIG_FILE
from edgetune_converters.architectures import Head

_SETS = ("target_modules", "exclude_modules", "feedforward_modules")
"""Fields of adapter_config.json that PEFT keeps as sets."""


def add_adapter(
    model: Any,
    config: Method,
    layers: ExportableLayers | None = None,
    formats: Sequence[str] = (),
    sources: StartSources | None = None,
) -> Any:
    """Return a PeftModel whose only trainable parameters are those of the new adapter, in float32.

    A method that PEFT does not have trains tensors of the model itself (selective.py).

    Args:
        model: The base.
        config: The adapter; its `target_modules` take no layer of a multimodal model's towers.
        layers: The layers of the base that are exported; None: all are.
        formats: The formats of the exports.
        sources: What first values of LoRA are computed from. None: they have those of plain LoRA.

    Raises:
        ConfigError: If `target_modules` matches no layer, or one that cannot be exported; names the layers that exist.
    """
    if isinstance(config, SelectiveMethod):
        _freeze(model)
        return add_selective(model, config, layers, formats)
    if isinstance(config, TrainableTokens):
        _freeze(model)
        return add_token_rows(model, config, layers.token_ids([*config.tokens, *config.added]) if layers else {})
    has_weights = model.device.type != "meta"
    try:
        wanted = peft_config(config, has_weights=has_weights)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"adapter: PEFT refuses these options of {config.facts.title}: {str(error).splitlines()[0]}",
            f"Change the options of adapter.kind: {config.kind}",
        ) from None
    if isinstance(config, LayerMethod):
        whole_names = isinstance(config, Lora) and config.init in ("corda", "lora_ga")
        targets = resolve_targets(model, config, layers, whole_names=whole_names)
        wanted.target_modules = set(targets) if isinstance(targets, list) else targets
    _freeze(model)
    if layers and layers.excluded:
        wanted.exclude_modules = layers.excluded
    starts.before_attaching(model, config, wanted, sources)
    try:
        adapted = get_peft_model(model, wanted)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"adapter: {config.facts.title} with these options does not fit into the memory of this machine",
            f"Lower the sizes of adapter.kind: {config.kind}",
        ) from None
    except (ValueError, TypeError, NotImplementedError) as error:  # sizes that do not divide those of the layers
        raise ConfigError(
            f"adapter: {config.facts.title} does not fit this base: {str(error).splitlines()[0]}",
            f"Change the options of adapter.kind: {config.kind}",
        ) from None
    if not config.takes_transposed:
        _check_not_transposed(adapted, config)
    _check_biases(adapted, config)
    starts.after_attaching(adapted, config, sources)
    if layers:
        _check_exportable(adapted, layers)
    complete(adapted)
    lay_out_in_order(adapted)
    return adapted


def peft_config(config: Method, *, has_weights: bool = True) -> PeftConfig:
    """Return the options of a method as PEFT's configuration.

    `has_weights`: whether the base has weights; without them, LoRA stands in for a method that starts from them.
    """
    if config.reads_base and not has_weights:
        options = config.peft_options()
        stand_in = {name: options[name] for name in ("target_modules", "modules_to_save", "bias") if name in options}
        return LoraConfig(task_type="CAUSAL_LM", **stand_in)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[config.facts.peft_type]
    return kind(task_type="CAUSAL_LM", **config.peft_options())


def _check_not_transposed(model: Any, config: Method) -> None:
    """Raise ConfigError for layers that PEFT refuses, or adapts by nothing, when it has the weights of the base."""
    for name in model.base_model.targeted_module_names:
        module = model.get_base_model().get_submodule(name)
        if isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, Conv1D):
            raise ConfigError(
                f"adapter: {config.facts.title} does not fit this base: PEFT has no such adapter for weights that are "
                f"stored transposed (Conv1D), such as those of {name}",
                "Choose another adapter.kind, such as lora",
            )


def _check_biases(model: Any, config: Method) -> None:
    """Raise ConfigError for stated options of biases that the base does not have."""
    base = model.get_base_model()
    for option in config.options_of_biases:
        value = getattr(config, option)
        if value == type(config).model_fields[option].default:
            continue
        modules = base.modules()
        if value != "all":
            modules = (each.get_base_layer() for each in modules if isinstance(each, BaseTunerLayer))
        if all(getattr(each, "bias", None) is None for each in modules):
            whose = "the base has" if value == "all" else "the adapted layers have"
            raise ConfigError(
                f"adapter.{option} is {value}, and {whose} no biases: it would have no effect",
                f"Leave out adapter.{option}; adapter.kind: bitfit adds biases to a base that has none",
            )


def lay_out_in_order(model: Any) -> None:
    """Store trained values in the order of their indices: 8-bit optimizers of bitsandbytes read memory in order."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def _check_exportable(model: Any, layers: ExportableLayers) -> None:
    """Raise ConfigError for adapted layers that the export would refuse after training."""
    unknown = [name for name in adapted_tensors(model) if not layers.has(name)]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ConfigError(
            f"adapter.target_modules: {', '.join(unknown[:3])}{more} could not be exported after training",
            "Name other layers in adapter.target_modules",
        )


def adapted_tensors(model: Any) -> list[str]:
    """Return the names of the base's tensors that the adapter of a PeftModel changes."""
    named = (_adapted_tensor(*each) for each in model.get_base_model().named_modules())
    return [name for name in named if name]


def check_lora_places(model: Any, layers: ExportableLayers) -> None:
    """Raise ConfigError for adapted layers whose change a gguf-lora file cannot hold."""
    adapted = adapted_tensors(model)
    refused = [(name, why) for name in adapted if (why := layers.why_not_lora(name))]
    base = model.get_base_model()
    if getattr(base.config, "tie_word_embeddings", False):
        embedding = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
        head = next((name for name, module in base.named_modules() if module is base.get_output_embeddings()), None)
        ends = {
            f"{embedding}.weight": "the output matrix is tied to it, and llama.cpp would not change both",
            f"{head}.weight": "it is tied to the embedding, and a file of the base has no output matrix of its own",
        }
        refused += [(name, ends[name]) for name in adapted if name in ends]
    if refused:
        name, why = refused[0]
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ConfigError(
            f"export.formats: gguf-lora has no place for the change of {name}{more}: {why}",
            "Leave out gguf-lora, or name other layers in adapter.target_modules",
        )


def check_gguf_head(model: Any, method: Method, layers: ExportableLayers) -> None:
    """Raise ConfigError for an output matrix that training unties, where llama.cpp has none for the family."""
    is_tied = layers.family.head is Head.NEVER and not isinstance(method, TrainableTokens)
    if not is_tied or not isinstance(model, PeftModel):
        return
    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    trained = [each for each in ends if isinstance(each, BaseTunerLayer | ModulesToSaveWrapper)]
    if trained:
        option = "target_modules" if isinstance(trained[0], BaseTunerLayer) else "modules_to_save"
        raise ConfigError(
            f"export.formats: gguf cannot hold what adapter.{option} trains: the output matrix will differ from the "
            f"embedding, and llama.cpp has none of its own for {layers.family.name}",
            f"Leave out gguf (onnx and safetensors have one), or leave embedding and output matrix out of "
            f"adapter.{option}",
        )


def check_saved_modules(model: Any, bits: int) -> None:
    """Raise ConfigError for `modules_to_save` with linear layers that will be quantized.

    Args:
        model: The adapted model, without weights.
        bits: `quantization.bits`.
    """
    if bits == 16 or not isinstance(model, PeftModel):
        return
    base = model.get_base_model()
    kept = (base.get_output_embeddings(), base.get_input_embeddings())
    for name, module in base.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or module in kept:
            continue
        if any(isinstance(each, torch.nn.Linear) for each in module.original_module.modules()):
            raise ConfigError(
                f"adapter.modules_to_save names {name}, whose weights quantization.bits: {bits} packs, and packed "
                "weights cannot be trained",
                "Set quantization.bits: 16, or name it in adapter.target_modules instead",
            )


def has_adapted_head(model: Any) -> bool:
    """Whether an adapter of PEFT changes the output matrix."""
    return isinstance(model, PeftModel) and isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer)


def _has_saved_head(model: Any) -> bool:
    """Whether the output matrix is trained in full."""
    return isinstance(model, PeftModel) and isinstance(
        model.get_base_model().get_output_embeddings(), ModulesToSaveWrapper
    )


def check_head(model: Any, objective: Objective) -> None:
    """Raise ConfigError for a trained output matrix that the objective does not use."""
    option = "target_modules" if has_adapted_head(model) else "modules_to_save" if _has_saved_head(model) else None
    if objective.facts.is_scorer and option:
        raise ConfigError(
            f"adapter.{option} names the output matrix, and objective.kind: {objective.kind} trains a score head in "
            "its place",
            f"Leave it out of adapter.{option}",
        )


def _adapted_tensor(name: str, module: Any) -> str | None:
    """Return the tensor that a wrapper of PEFT adapts, None for another module."""
    if not isinstance(module, BaseTunerLayer):
        return None
    parameter = getattr(module, "parameter_name", None)  # of all experts: one wrapper inside the other
    return f"{name}.weight" if parameter is None else f"{name.replace('.base_layer', '')}.{parameter}"


def sort_stored_names(folder: Path) -> None:
    """Sort the names of layers in adapter_config.json: PEFT stores sets, whose order differs between processes."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return
    stated = json.loads(file.read_text(encoding="utf-8"))
    ordered = {key: sorted(value) for key, value in stated.items() if key in _SETS and isinstance(value, list)}
    if any(stated[key] != value for key, value in ordered.items()):
        file.write_text(json.dumps(stated | ordered, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(model: Any, directory: Path) -> Any:
    """Return the base with a trained adapter from disk."""
    _freeze(model)
    if is_selective(directory):
        return load_selective(model, directory)
    loaded = PeftModel.from_pretrained(model, str(directory), is_trainable=False)
    complete(loaded)
    return loaded


def cast_trainable_to_float32(model: Any) -> None:
    """Undo TRL's cast of a quantized model's adapter to bfloat16, whose 8 bits swallow small updates."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def count_trainable(model: Any) -> int:
    """Count the parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def fingerprint_trainable(model: Any) -> dict[str, str]:
    """Return a hash of each trained tensor, by name."""
    return {
        name: hashlib.sha256(parameter.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _freeze(model: Any) -> None:
    """Freeze the base and cast its norms to float32, as in QLoRA.

    PEFT's own preparation also casts the embedding, which costs memory.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
        if parameter.ndim == 1 and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
