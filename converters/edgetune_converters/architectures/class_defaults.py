"""Defaults of transformers' config classes, for what config.json leaves out.

Nested configs (`text_config`) are saved without what equals the class's default, and published files leave out more.
tests/cases/test_02_sizes_left_out.py compares this table with transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# the first entry of a family's `architectures` -> field, by the usual name (config.py) -> default of the class
CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    },
    "MistralForCausalLM": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "sliding_window": 4096,
    },
    "Qwen2ForCausalLM": {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "Qwen3ForCausalLM": {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
        "attention_bias": False, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    },
    "SmolLM3ForCausalLM": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06, "use_sliding_window": False, "no_rope_layer_interval": 4, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": True, "rope_theta": 2_000_000.0,
    },
    "StableLmForCausalLM": {
        "vocab_size": 50304, "intermediate_size": 6912, "hidden_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-05, "tie_word_embeddings": False, "qk_layernorm": False, "use_parallel_residual": False,
        "use_qkv_bias": False,
    },
    "Olmo2ForCausalLM": {
        "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "attention_bias": False, "rms_norm_eps": 1e-05,
    },
    "Olmo3ForCausalLM": {
        "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "attention_bias": False, "rms_norm_eps": 1e-05, "sliding_window": 4096,
        "rope_theta": 500_000.0,
    },
    "GraniteForCausalLM": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False, "attention_bias": False, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
        "residual_multiplier": 1.0, "attention_multiplier": 1.0, "mlp_bias": False,
    },
    "Exaone4ForCausalLM": {
        "vocab_size": 102_400, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "sliding_window": 4096, "sliding_window_pattern": 4,
    },
    "GemmaForCausalLM": {
        "vocab_size": 256_000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "attention_bias": False,
    },
    "Gemma2ForCausalLM": {
        "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "attention_bias": False,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "Gemma3ForCausalLM": {
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-06, "tie_word_embeddings": True,
        "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "use_bidirectional_attention": False, "rope_theta": 1_000_000.0,
    },
    "Phi3ForCausalLM": {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    },
    "PhiForCausalLM": {
        "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "hidden_act": "gelu_new", "max_position_embeddings": 2048, "layer_norm_eps": 1e-05,
        "tie_word_embeddings": False, "qk_layernorm": False,
    },
    "MixtralForCausalLM": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "num_experts_per_tok": 2, "num_experts": 8,
        "rope_theta": 1_000_000.0,
    },
    "Qwen2MoeForCausalLM": {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False,
    },
    "Qwen3MoeForCausalLM": {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "attention_bias": False, "use_sliding_window": False,
        "sliding_window": 4096, "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
        "num_experts": 128, "norm_topk_prob": False,
    },
    "GraniteMoeForCausalLM": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False, "attention_bias": False, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
        "residual_multiplier": 1.0, "attention_multiplier": 1.0, "num_experts": 8, "num_experts_per_tok": 2,
    },
    "DeepseekV2ForCausalLM": {
        "vocab_size": 102_400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False, "attention_bias": False, "first_k_dense_replace": 0, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "num_experts": 64, "n_shared_experts": 2, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "routed_scaling_factor": 1.0, "topk_method": "greedy", "norm_topk_prob": False,
        "v_head_dim": 128, "moe_intermediate_size": 1407, "mlp_bias": False,
    },
    "DeepseekV3ForCausalLM": {
        "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "num_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "rope_interleave": True,
        "attention_bias": False,
    },
    "GptOssForCausalLM": {
        "num_hidden_layers": 36, "num_experts": 128, "vocab_size": 201_088, "hidden_size": 2880,
        "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "sliding_window": 128, "tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-05, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
        "attention_bias": True, "rope_theta": 150_000.0,
    },
    "Llama4ForCausalLM": {
        "vocab_size": 202_048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "hidden_act": "silu", "max_position_embeddings": 131_072, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
        "num_experts_per_tok": 1, "num_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True,
        "no_rope_layer_interval": 4, "attention_chunk_size": 8192, "attn_temperature_tuning": True,
        "floor_scale": 8192, "attn_scale": 0.1, "attention_bias": False, "rope_theta": 500_000.0,
    },
    "GPT2LMHeadModel": {
        "vocab_size": 50257, "max_position_embeddings": 1024, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "hidden_act": "gelu_new", "layer_norm_eps": 1e-05, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
    },
    "GPTNeoXForCausalLM": {
        "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-05,
        "tie_word_embeddings": False, "use_parallel_residual": True, "attention_bias": True,
    },
    "BloomForCausalLM": {
        "vocab_size": 250_880, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
        "layer_norm_eps": 1e-05, "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": True,
    },
    "FalconForCausalLM": {
        "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        "layer_norm_eps": 1e-05, "alibi": False, "new_decoder_architecture": False, "multi_query": True,
        "parallel_attn": True, "bias": False, "max_position_embeddings": 2048, "hidden_act": "gelu",
        "tie_word_embeddings": True,
    },
    "MptForCausalLM": {
        "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 24, "expansion_ratio": 4,
        "max_position_embeddings": 2048, "vocab_size": 50368, "layer_norm_eps": 1e-05, "no_bias": True,
        "tie_word_embeddings": True,
    },
    "Starcoder2ForCausalLM": {
        "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
        "num_attention_heads": 24, "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096, "layer_norm_eps": 1e-05, "use_bias": True, "tie_word_embeddings": True,
    },
    "Glm4ForCausalLM": {
        "vocab_size": 151_552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 131_072, "rms_norm_eps": 1.5625e-07, "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "CohereForCausalLM": {
        "vocab_size": 256_000, "hidden_size": 8192, "intermediate_size": 22528, "logit_scale": 0.0625,
        "num_hidden_layers": 40, "num_attention_heads": 64, "hidden_act": "silu", "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-05, "tie_word_embeddings": True, "attention_bias": False, "use_qk_norm": False,
        "rope_theta": 500_000.0,
    },
    "Cohere2ForCausalLM": {
        "vocab_size": 256_000, "hidden_size": 8192, "intermediate_size": 22528, "logit_scale": 0.0625,
        "num_hidden_layers": 40, "num_attention_heads": 64, "hidden_act": "silu", "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-05, "tie_word_embeddings": True, "attention_bias": False, "sliding_window": 4096,
    },
    "Lfm2ForCausalLM": {
        "vocab_size": 65536, "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128_000,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "conv_bias": False, "conv_L_cache": 3,
        "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
        "rope_theta": 1_000_000.0,
    },
}  # fmt: skip
