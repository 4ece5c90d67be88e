"""Adapters of every kind that PEFT trains and the converters fold, with random values, and the fold of all tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import open_model
from tests.converters.tiny import _between_libraries, peft, torch, transformers

BLOCK = 3000  # bytes: every tensor is made of several blocks
_PATTERNS = {
    "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 6},
    "alpha_pattern": {"v_proj": 9, r"layers\.[02]\.self_attn\.o_proj": 3},
}
_IA3 = {
    "target_modules": r".*\.(k_proj|v_proj|down_proj|c_attn|mlp\.c_proj)",
    "feedforward_modules": r".*\.(down_proj|mlp\.c_proj)",
}


class Method(NamedTuple):
    """A method of PEFT: the class of its configuration and the options that vary its fold."""

    config: str
    options: Mapping[str, Any] = {}
    linear_only: bool = True
    """Whether PEFT refuses it on Conv1D."""


METHODS: dict[str, Method] = {
    "dora": Method("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}, linear_only=False),
    "dora-patterns": Method("LoraConfig", {"r": 4, "use_dora": True, "use_rslora": True, **_PATTERNS}),
    "adalora": Method(
        "AdaLoraConfig", {"init_r": 5, "target_r": 2, "lora_alpha": 7, "total_step": 10}, linear_only=False
    ),
    "loha": Method("LoHaConfig", {"r": 3, "alpha": 5, **_PATTERNS}),
    "lokr": Method("LoKrConfig", {"r": 3, "alpha": 5, **_PATTERNS}),
    "lokr-whole": Method("LoKrConfig", {"r": 64, "alpha": 40}),
    "lokr-both": Method("LoKrConfig", {"r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": 6}),
    "ia3": Method("IA3Config", _IA3, linear_only=False),
    "vera": Method("VeraConfig", {"r": 6, "d_initial": 1.0}, linear_only=False),
    "vera-drawn": Method("VeraConfig", {"r": 6, "d_initial": 1.0, "save_projection": False, "projection_prng_key": 7}),
    "oft": Method("OFTConfig", {"r": 0, "oft_block_size": 8}),
    "oft-cayley": Method("OFTConfig", {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft-shared": Method("OFTConfig", {"r": 0, "oft_block_size": 4, "block_share": True}),
    "oft-terms": Method("OFTConfig", {"r": 0, "oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "coft": Method("OFTConfig", {"r": 0, "oft_block_size": 8, "coft": True, "eps": 0.3}),
    "boft": Method("BOFTConfig", {"boft_block_size": 4}),
    "boft-blocks": Method("BOFTConfig", {"boft_block_size": 0, "boft_block_num": 4}),
    "hra": Method("HRAConfig", {"r": 6}),
    "hra-gram-schmidt": Method("HRAConfig", {"r": 5, "apply_GS": True}),
}


@_between_libraries()
def adapter(base: Path, directory: Path, method: Method, **options: Any) -> Path:
    """An adapter of a method on all linear layers, with random values, written by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stated = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", **method.options, **options}
    wrapped = peft.get_peft_model(model, getattr(peft, method.config)(**stated))
    randomize(wrapped)
    wrapped.save_pretrained(directory)
    return directory


def randomize(model: Any, seed: int = 1) -> None:
    """Add noise to everything that is trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@_between_libraries()
def merged_by_peft(base: Path, directory: Path) -> dict[str, Any]:
    """The tensors of the model that PEFT merges."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, directory).merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def folded(base: Path, directory: Path | None, merge_base: str = "original", record: Any = None) -> dict[str, Any]:
    """The tensors that the converters make, in small blocks, under the names of transformers' modules."""
    model = open_model(base, directory, merge_base_named(merge_base, record))
    return {
        tensor.name.replace("block_sparse_moe", "mlp"): torch.from_numpy(
            np.concatenate([make(1).floats for make in tensor.pieces(model.checkpoint, BLOCK)]).reshape(tensor.shape)
        )
        for tensor in model.in_base_order
    }


@_between_libraries()
def logits(base: Path, tensors: Mapping[str, Any], ids: list[int]) -> Any:
    """The logits of the base's class with these tensors, [len(ids), vocabulary]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    unexpected = model.load_state_dict(dict(tensors), strict=False).unexpected_keys
    assert not unexpected
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()
