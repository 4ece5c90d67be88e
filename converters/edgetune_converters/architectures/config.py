"""Typed access to config.json: one spelling for fields that transformers has spelled in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_converters.errors import ArchitectureError

_MISSING = object()
# the usual name of a field -> its other spellings; the first that is present counts
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "intermediate_size": ("n_inner", "ffn_hidden_size", "block_ff_dim"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "model_max_length", "seq_length", "n_ctx"),
    "rms_norm_eps": ("norm_eps",),
    "layer_norm_eps": ("layer_norm_epsilon", "norm_epsilon", "layernorm_epsilon"),
    "hidden_act": ("hidden_activation", "activation_function", "activation"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "sliding_window_pattern": ("_sliding_window_pattern",),
    "rope_theta": ("rotary_emb_base",),
    "partial_rotary_factor": ("rotary_pct", "rope_pct"),
}
_MAX_NUMBER = 1e38  # largest f32, rounded down
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS


class ModelConfig:
    """A config.json with typed fields. Raises ArchitectureError with the field's name for a missing or mistyped one."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        inner = raw.get("text_config")
        # multimodal models keep the fields of their text part in an object of its own
        stated = {key: value for key, value in raw.items() if value is not None or key not in (inner or {})}
        self.raw: Mapping[str, Any] = {**inner, **stated} if isinstance(inner, Mapping) else raw

    def completed(self, defaults: Mapping[str, Any]) -> ModelConfig:
        """Return the config with `defaults` for fields that are absent under every name.

        A field that is null is not absent: null switches a feature off.
        """
        missing = {key: value for key, value in defaults.items() if not self._says(key)}
        return ModelConfig({**self.raw, **missing})

    def _says(self, field: str) -> bool:
        return any(name in self.raw for name in (field, *_ALIASES.get(field, ())))

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field, or `default` when it is absent or null."""
        for name in (field, *_ALIASES.get(field, ())):
            if (value := self.raw.get(name)) is not None:
                return value
        return default

    def integer(self, field: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.get(field, _MISSING if default is None else default)
        if type(value) is not int or value <= 0:
            raise ArchitectureError(f"config.json: {field} must be a positive integer, not {_shown(value)}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """Return a positive number."""
        value = self.get(field, _MISSING if default is None else default)
        if type(value) not in (int, float) or not 0 < value < _MAX_NUMBER:
            raise ArchitectureError(f"config.json: {field} must be a positive number, not {_shown(value)}")
        return float(value)

    @property
    def layers(self) -> int:
        """The number of transformer blocks."""
        layers = self.integer("num_hidden_layers")
        if layers > _MAX_LAYERS:
            raise ArchitectureError(f"config.json: {layers} layers, llama.cpp loads at most {_MAX_LAYERS}")
        return layers

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.integer("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads; by default that of the query heads."""
        return self.integer("num_key_value_heads", self.heads)

    @property
    def hidden(self) -> int:
        """The width of the residual stream."""
        return self.integer("hidden_size")

    @property
    def head_dim(self) -> int:
        """The width of a head; by default the hidden size divided by the number of heads."""
        return self.integer("head_dim", max(1, self.hidden // self.heads))

    @property
    def ffn(self) -> int:
        """The width of the feed-forward layer; by default four times the hidden size."""
        return self.integer("intermediate_size", 4 * self.hidden)

    @property
    def experts(self) -> int:
        """The number of routed experts per layer."""
        experts = self.integer("num_experts")
        if experts > _MAX_EXPERTS:
            raise ArchitectureError(f"config.json: {experts} experts, llama.cpp loads at most {_MAX_EXPERTS}")
        return experts

    @property
    def vocab_size(self) -> int:
        """The number of rows of the embedding."""
        return self.integer("vocab_size")

    @property
    def rope(self) -> Mapping[str, Any]:
        """RoPE parameters with `rope_type` and `rope_theta`, from `rope_parameters` or its two predecessors.

        Where they differ by kind of layer, those of the layers with full attention.
        """
        rope = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ArchitectureError(f"config.json: the rope parameters must be an object, not {rope!r}")
        rope = rope.get("full_attention") or rope
        theta = rope.get("rope_theta") or self.get("rope_theta", 10000.0)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        original = rope.get("original_max_position_embeddings") or self.get("original_max_position_embeddings")
        return {**rope, "rope_theta": theta, "rope_type": kind, "original_max_position_embeddings": original}

    @property
    def context(self) -> int:
        """The number of positions that the model is made for.

        A scaling that states the original context and a factor, switched on by hand, reaches further than
        max_position_embeddings.
        """
        stated, rope = self.integer("max_position_embeddings"), self.rope
        factor, original = rope.get("factor"), rope["original_max_position_embeddings"]
        scales = rope["rope_type"] in ("yarn", "linear") and type(factor) in (int, float) and type(original) is int
        return max(stated, int(factor * original)) if scales else stated

    @property
    def local_rope(self) -> Mapping[str, Any]:
        """RoPE parameters of the layers with a sliding window; unscaled by default."""
        rope = self.get("rope_parameters") or {}
        local = rope.get("sliding_attention") if isinstance(rope, Mapping) else None
        theta = self.get("rope_local_base_freq", self.rope["rope_theta"])
        return {"rope_theta": theta, "rope_type": "default", **(local or {})}

    @property
    def rope_dim(self) -> int:
        """The number of rotated dimensions per head."""
        share = self.rope.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0)
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise ArchitectureError(f"config.json: partial_rotary_factor must be a share of 1, not {share!r}")
        return int(self.head_dim * share)

    def slides(self, layer: int) -> bool:
        """Whether a layer has a sliding window: by `layer_types`, or in all but the last layer of each period."""
        kinds = self.get("layer_types")
        if isinstance(kinds, list) and len(kinds) > layer:
            return bool(kinds[layer] != "full_attention")
        period = self.get("sliding_window_pattern")
        return type(period) is int and period > 0 and (layer + 1) % period != 0


def _shown(value: Any) -> str:
    return "absent" if value is _MISSING else repr(value)
