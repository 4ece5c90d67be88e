"""Random soft prompts and prefixes for tiny models, written by PEFT; its own forward and generation are the oracle."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch: Any = pytest.importorskip("torch")
peft: Any = pytest.importorskip("peft")
transformers: Any = pytest.importorskip("transformers")

COUNT = 7
# name -> PEFT's configuration and its options
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt-tuning": ("PromptTuningConfig", {}),
    "p-tuning-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 24}),
    "p-tuning-lstm": (
        "PromptEncoderConfig",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 24, "encoder_num_layers": 2},
    ),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    "prefix-tuning": ("PrefixTuningConfig", {}),
    "prefix-tuning-projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 24}),
}


def load(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def write(kind: str, base: Path, directory: Path, *, seed: int = 3, scale: float = 0.3, **options: Any) -> Path:
    """Write an adapter of `KINDS` with random numbers."""
    name, own = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stated = {"task_type": "CAUSAL_LM", "num_virtual_tokens": COUNT} | own | options
        model = peft.get_peft_model(load(base), getattr(peft, name)(**stated))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, scale)
        model.save_pretrained(directory)
    return directory


def opened(base: Path, adapter: Path) -> Any:
    """Return PEFT's model as it is loaded from disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load(base), adapter).eval()


def logits(base: Path, adapter: Path, ids: list[int], task: int | None = None) -> NDArray[np.float32]:
    """Logits of PEFT's own forward after each of `ids`, without those of virtual tokens."""
    more = {} if task is None else {"task_ids": torch.tensor([task])}
    with torch.no_grad():
        found = opened(base, adapter)(torch.tensor([ids]), **more).logits[0].float().numpy()
    whole: NDArray[np.float32] = found[len(found) - len(ids) :]
    return whole


def generated(base: Path, adapter: Path, ids: list[int], count: int) -> list[int]:
    """Greedy tokens of PEFT's own generate."""
    model = opened(base, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0]  # fmt: skip
    return [int(token) for token in found[len(ids) :]]


def place(metadata: Any) -> dict[str, Any]:
    """Return the place of the soft prompt that the metadata of a file state."""
    found: dict[str, Any] = json.loads(metadata["edgetune.soft_prompt"])
    return found


def log_softmax(values: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = values.astype(np.float64) - values.max(1, keepdims=True)
    wide: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return wide
