"""Slots: neutral names for the tensors of a transformer, between Hugging Face's names and those of output formats.

`{layer}` stands for the number of the layer. A slot without it exists once per model.
"""

from __future__ import annotations

from collections.abc import Mapping

EMBEDDING = "embedding"
OUTPUT = "output"
ROPE_FACTORS = "rope_factors"
ROPE_FACTORS_LONG = "rope_factors_long"
ROPE_FACTORS_SHORT = "rope_factors_short"

# slot -> name in a GGUF file, without ".weight" or ".bias"
GGUF_NAMES: Mapping[str, str] = {
    EMBEDDING: "token_embd",
    OUTPUT: "output",
    ROPE_FACTORS: "rope_freqs",
    ROPE_FACTORS_LONG: "rope_factors_long",
    ROPE_FACTORS_SHORT: "rope_factors_short",
    "embedding_norm": "token_embd_norm",
    "position_embedding": "position_embd",
    "output_norm": "output_norm",
    # attention; "post" norms act on the output of a part, before the residual addition
    "attention_norm": "blk.{layer}.attn_norm",
    "attention_norm_2": "blk.{layer}.attn_norm_2",
    "attention_qkv": "blk.{layer}.attn_qkv",
    "attention_q": "blk.{layer}.attn_q",
    "attention_k": "blk.{layer}.attn_k",
    "attention_v": "blk.{layer}.attn_v",
    "attention_q_norm": "blk.{layer}.attn_q_norm",
    "attention_k_norm": "blk.{layer}.attn_k_norm",
    "attention_sinks": "blk.{layer}.attn_sinks",
    "attention_output": "blk.{layer}.attn_output",
    "attention_post_norm": "blk.{layer}.post_attention_norm",
    # attention through low ranks (MLA)
    "attention_q_a": "blk.{layer}.attn_q_a",
    "attention_q_a_norm": "blk.{layer}.attn_q_a_norm",
    "attention_q_b": "blk.{layer}.attn_q_b",
    "attention_kv_a": "blk.{layer}.attn_kv_a_mqa",
    "attention_kv_a_norm": "blk.{layer}.attn_kv_a_norm",
    "attention_k_b": "blk.{layer}.attn_k_b",
    "attention_v_b": "blk.{layer}.attn_v_b",
    # feed-forward; "up" holds gate and up, concatenated by rows, where a family keeps them fused
    "ffn_norm": "blk.{layer}.ffn_norm",
    "ffn_gate": "blk.{layer}.ffn_gate",
    "ffn_up": "blk.{layer}.ffn_up",
    "ffn_down": "blk.{layer}.ffn_down",
    "ffn_post_norm": "blk.{layer}.post_ffw_norm",
    # mixture of experts
    "expert_router": "blk.{layer}.ffn_gate_inp",
    "expert_router_offset": "blk.{layer}.exp_probs_b",
    "expert_gate": "blk.{layer}.ffn_gate_exps",
    "expert_up": "blk.{layer}.ffn_up_exps",
    "expert_down": "blk.{layer}.ffn_down_exps",
    "shared_router": "blk.{layer}.ffn_gate_inp_shexp",
    "shared_gate": "blk.{layer}.ffn_gate_shexp",
    "shared_up": "blk.{layer}.ffn_up_shexp",
    "shared_down": "blk.{layer}.ffn_down_shexp",
    # short convolution
    "convolution": "blk.{layer}.shortconv.conv",
    "convolution_in": "blk.{layer}.shortconv.in_proj",
    "convolution_out": "blk.{layer}.shortconv.out_proj",
}


def gguf_name(slot: str, layer: int | None, part: str) -> str:
    """Return the GGUF tensor name of a slot's weight or bias."""
    return GGUF_NAMES[slot].format(layer=layer) + "." + part
