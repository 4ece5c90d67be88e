"""Neutral names for the places of a transformer, between Hugging Face's names and each output format's.

`{layer}` stands for the number of the layer. A slot without it exists once in a model.
"""

from __future__ import annotations

from collections.abc import Mapping

EMBEDDING = "embedding"
OUTPUT = "output"
ROPE_FACTORS = "rope_factors"

# slot -> name in a GGUF file, without ".weight" or ".bias"
GGUF_NAMES: Mapping[str, str] = {
    EMBEDDING: "token_embd",
    OUTPUT: "output",
    ROPE_FACTORS: "rope_freqs",
    "output_norm": "output_norm",
    "attention_norm": "blk.{layer}.attn_norm",
    "attention_q": "blk.{layer}.attn_q",
    "attention_k": "blk.{layer}.attn_k",
    "attention_v": "blk.{layer}.attn_v",
    "attention_q_norm": "blk.{layer}.attn_q_norm",
    "attention_k_norm": "blk.{layer}.attn_k_norm",
    "attention_output": "blk.{layer}.attn_output",
    "ffn_norm": "blk.{layer}.ffn_norm",
    "ffn_gate": "blk.{layer}.ffn_gate",
    "ffn_up": "blk.{layer}.ffn_up",
    "ffn_down": "blk.{layer}.ffn_down",
}


def gguf_name(slot: str, layer: int | None, part: str) -> str:
    """The GGUF tensor name of a slot's weight or bias."""
    return GGUF_NAMES[slot].format(layer=layer) + "." + part
