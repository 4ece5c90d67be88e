"""config.json as the architecture table sees it: one spelling for what transformers has spelled in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune_converters.errors import ArchitectureError

_MISSING = object()
_MAX_NUMBER = 1e38  # of f32
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS


class ModelConfig:
    """Typed access to a config.json. Errors: ArchitectureError for a missing or mistyped field, with its name."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def get(self, field: str, default: Any = None) -> Any:
        """A field, or `default` when it is absent or null."""
        value = self.raw.get(field)
        return default if value is None else value

    def integer(self, field: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(field, _MISSING if default is None else default)
        if type(value) is not int or value <= 0:
            raise ArchitectureError(f"config.json: {field} must be a positive integer, not {_shown(value)}")
        return value

    def number(self, field: str) -> float:
        """A positive number."""
        value = self.get(field, _MISSING)
        if type(value) not in (int, float) or not 0 < value < _MAX_NUMBER:
            raise ArchitectureError(f"config.json: {field} must be a positive number, not {_shown(value)}")
        return float(value)

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        layers = self.integer("num_hidden_layers")
        if layers > _MAX_LAYERS:
            raise ArchitectureError(f"config.json: {layers} layers, llama.cpp loads at most {_MAX_LAYERS}")
        return layers

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.integer("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Key and value heads; as many as query heads where nothing else is said."""
        return self.integer("num_key_value_heads", self.heads)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.integer("hidden_size")

    @property
    def head_dim(self) -> int:
        """Width of a head; stated, or the hidden size shared out."""
        return self.integer("head_dim", max(1, self.hidden // self.heads))

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding as config.json says it."""
        return self.integer("vocab_size")

    @property
    def rope(self) -> Mapping[str, Any]:
        """RoPE parameters with `rope_type` and `rope_theta`, from `rope_parameters` or its two forerunners."""
        rope = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ArchitectureError(f"config.json: the rope parameters must be an object, not {rope!r}")
        theta = rope.get("rope_theta") or self.get("rope_theta", 10000.0)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        return {**rope, "rope_theta": theta, "rope_type": kind}


def _shown(value: Any) -> str:
    return "absent" if value is _MISSING else repr(value)
