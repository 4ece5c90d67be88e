"""Models with virtual tokens before every text: their start, their checkpoints, and their inputs in the capture.

PEFT adds the tokens in the forward of its own model, and cannot load such an adapter to train it further.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from safetensors.torch import load_file, save_file

from edgetune.config import Config
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.methods import Method
from edgetune.methods.prompt_tuning import PromptTuning
from edgetune.planning.row_tasks import exported_task

PARAMETERS_FILE = "trained_parameters.safetensors"
"""File of a checkpoint with the trained parameters: an adapter of PEFT holds the output of the encoder alone."""


def has_virtual_tokens(model: Any) -> bool:
    """Whether virtual tokens come before every text; also while the adapter is switched off."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def is_active(model: Any) -> bool:
    """Whether virtual tokens come before every text, and the adapter is switched on."""
    return has_virtual_tokens(model) and not model._adapters_disabled


def complete(model: Any) -> None:
    """Set what PEFT leaves to its user on a new or loaded model."""
    set_task(model, 0)
    if model.active_peft_config.is_adaption_prompt:
        inner = model.base_model  # it keeps the forward of the model from before TRL replaces that
        inner.forward = lambda *arguments, **named: inner.model.forward(*arguments, **named)


def set_task(model: Any, task: int) -> None:
    """Set the task of multitask prompt tuning for inputs that do not state one."""
    if not has_virtual_tokens(model) or model.active_peft_config.peft_type != PeftType.MULTITASK_PROMPT_TUNING:
        return

    def with_task(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        indices, *tasks = arguments
        given = tasks[0] if tasks else None
        return indices, torch.full((len(indices),), task, device=indices.device) if given is None else given

    encoder = model.prompt_encoder[model.active_adapter]
    encoder._forward_pre_hooks.clear()  # of the task before
    encoder.register_forward_pre_hook(with_task)


def with_task(model: Any, config: Config) -> Any:
    """Return a model whose inputs are of the exported task, where they do not state another one."""
    set_task(model, exported_task(config))
    return model


def start_from_text(model: Any, method: Method, tokenizer: TextTokenizer) -> None:
    """Set the virtual tokens to the embeddings of `init_text`, where the method has one."""
    if not isinstance(method, PromptTuning) or not method.init_text:
        return
    ids = tokenizer.encode_part(method.init_text)
    repeated = torch.tensor((ids * (method.tokens // len(ids) + 1))[: method.tokens], device=model.device)
    embedding = model.prompt_encoder[model.active_adapter].embedding
    with torch.no_grad():
        embedding.weight.copy_(model.word_embeddings(repeated).float())


def embed(model: Any, ids: torch.Tensor) -> tuple[dict[str, Any], int]:
    """Return the inputs of the network of a model for token ids [rows, n], and the position of the first of them.

    The position is that in the network's output: behind virtual tokens, but not behind a prefix of keys and values.
    """
    if not is_active(model):
        return {"input_ids": ids}, 0
    config = model.active_peft_config
    if config.peft_type == PeftType.PREFIX_TUNING:
        length = ids.shape[1] + config.num_virtual_tokens
        return {"input_ids": ids, "past_key_values": model.get_prompt(len(ids), max_cache_len=length)}, 0
    embeddings = model.word_embeddings(ids)
    prompts = model.get_prompt(len(ids)).to(embeddings.dtype)
    return {"inputs_embeds": torch.cat((prompts, embeddings), dim=1)}, config.num_virtual_tokens


# -- checkpoints -------------------------------------------------------------------------------------------------------


def keep_parameters_in_checkpoints(trainer: Any) -> None:
    """Let a trainer store and load the trained parameters themselves, where PEFT cannot load an adapter to train it."""
    model = trainer.model
    if not isinstance(model, PeftModel):
        return
    config = model.active_peft_config
    if not (config.is_prompt_learning or config.is_adaption_prompt):
        return
    save = trainer._save

    def save_parameters(output_dir: str | None = None, state_dict: Any = None) -> None:
        save(output_dir, state_dict)
        file = Path(output_dir or trainer.args.output_dir) / PARAMETERS_FILE
        save_file({name: each.detach().cpu().contiguous() for name, each in _trained(model).items()}, str(file))

    def load_parameters(checkpoint: str, loaded: Any = None) -> None:
        stored = load_file(str(Path(checkpoint) / PARAMETERS_FILE))
        trained = _trained(model if loaded is None else loaded)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(stored[name])

    trainer._save, trainer._load_from_checkpoint = save_parameters, load_parameters


def _trained(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
