"""The parts of a decoder as ONNX operators: the interface of all graphs, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from edgetune_converters.architectures.decoder import Activation, Attention, DecoderSpec, Experts, Norm
from edgetune_converters.onnx.builder import Graph
from edgetune_converters.onnx.layout import ExternalArray, WeightLayout

BATCH, SEQUENCE, TOTAL, PAST = "batch_size", "sequence_length", "total_sequence_length", "past_sequence_length"


class Operators(ABC):
    """Appends operators to a graph. Values are names; hidden states are [batch, sequence, width]."""

    in_place: bool
    """Whether past and present of the cache may share one buffer as long as the context."""

    def __init__(
        self,
        graph: Graph,
        decoder: DecoderSpec,
        weights: Mapping[str, WeightLayout],
        tables: Mapping[str, tuple[ExternalArray, ExternalArray]],
    ) -> None:
        self.graph = graph
        self.decoder = decoder
        self._weights = weights
        self._tables = tables

    # -- differs between graphs ----------------------------------------------------------------------------------------

    @abstractmethod
    def linear(self, x: str, module: str, weight: str | None = None) -> str:
        """Append x @ weight.T + bias; `weight` replaces the module's own."""

    @abstractmethod
    def rows(self, ids: str, name: str) -> str:
        """Append a lookup of rows."""

    @abstractmethod
    def add_norm(self, x: str, y: str, module: str, norm: Norm) -> tuple[str, str]:
        """Append norm(x + y) and x + y."""

    def head(self, x: str, name: str) -> str:
        """Append the logits, by the matrix `name`."""
        return self.linear(x, "lm_head", name)

    @abstractmethod
    def attention(self, projected: list[str], attention: Attention, layer: int) -> str:
        """Append attention between the projections of query, key and value (stacked or three) and the output matrix."""

    @abstractmethod
    def experts(self, x: str, logits: str, part: Experts, module: str) -> str:
        """Append the weighted sum of the best experts; `logits` [batch, sequence, experts] are the router's."""

    @abstractmethod
    def _positions(self) -> str:
        """Append the position of each token, i64 [batch, sequence]."""

    @abstractmethod
    def _rotate(self, x: str, places: str, tables: list[str], **sizes: int) -> str:
        """Append RoPE for each head; `tables` are cosines and sines, `sizes` the attributes of the operator."""

    # -- shared by all graphs ------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether there is a weight of this name."""
        return name in self._weights

    def rows_of(self, name: str) -> int:
        """Return the number of rows of a matrix."""
        return self._weights[name].weight.shape[0]

    def vector(self, name: str) -> str:
        """Return the weight of a norm, or a bias."""
        return self.graph.external(self._weights[name].arrays[0])

    def norm(self, x: str, module: str, norm: Norm) -> str:
        """Append a norm over the last axis."""
        weight, bias = self.vector(module + ".weight"), module + ".bias"
        operator = "RMSNormalization" if norm.kind == "rms" else "LayerNormalization"
        inputs = [x, weight] + ([self.vector(bias)] if self.has(bias) else [])
        return self.graph.one(operator, *inputs, axis=-1, epsilon=norm.epsilon)

    def scaled(self, x: str, factor: float) -> str:
        """Append x * factor; return x itself for 1."""
        return x if factor == 1 else self.graph.one("Mul", x, self.graph.number(factor))

    def capped(self, x: str, cap: float) -> str:
        """Append cap * tanh(x / cap); return x itself for 0."""
        if not cap:
            return x
        return self.scaled(self.graph.one("Tanh", self.scaled(x, 1 / cap)), cap)

    def activate(self, x: str, activation: Activation) -> str:
        """Append an activation function."""
        if activation == "silu":
            return self.graph.one("Mul", x, self.graph.one("Sigmoid", x))
        if activation == "relu":
            return self.graph.one("Relu", x)
        return self.graph.one("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")

    def split(self, x: str, *widths: int) -> list[str]:
        """Split the last axis."""
        return self.graph.add("Split", [x, self.graph.integers(*widths)], len(widths), axis=-1)

    def values(self, layout: WeightLayout) -> str:
        """Return an unquantized weight in f32."""
        stored = self.graph.external(layout.arrays[0])
        name = f"{layout.weight.name} in f32"
        if layout.storage.name == "f32":
            return stored
        return self.graph.shared(name, lambda: self.graph.one("Cast", stored, to=TensorProto.FLOAT))

    def positions(self, rotation: str | None = None) -> str:
        """Return the position of each token, i64 [batch, sequence]; for a rotation with two tables, its row in them."""
        plain = self.graph.shared("positions", self._positions)
        longer = None if rotation is None else self.decoder.rotations[rotation]
        if longer is None or longer.long is None:
            return plain
        return self.graph.shared(f"positions {rotation}", lambda: self._shifted(plain, longer.original))

    def prepared(
        self, projected: list[str], attention: Attention, layer: int, *, rotate: bool = True
    ) -> tuple[str, str, str]:
        """Query and key, normalized and rotated, and the value."""
        query, key, value = self.apart(projected, attention)
        place = f"model.layers.{layer}.attn."
        if attention.head_norm:
            query = self._head_norm(query, place + "q_norm", attention, attention.heads)
            key = self._head_norm(key, place + "k_norm", attention, attention.kv_heads)
        if rotate and attention.rotation:
            query = self._rotated(query, attention, attention.heads)
            key = self._rotated(key, attention, attention.kv_heads)
        return query, key, value

    def apart(self, projected: list[str], attention: Attention) -> list[str]:
        """Return query, key and value separately."""
        if len(projected) == 3:
            return projected
        widths = [attention.heads, attention.kv_heads, attention.kv_heads]
        return self.split(projected[0], *(count * attention.head_dim for count in widths))

    def size_of(self, name: str) -> str:
        """Return the number of columns of a graph input, i64 []."""
        graph, second = self.graph, self.graph.constant(np.array(1, np.int64))
        return graph.shared(f"columns of {name}", lambda: graph.one("Gather", graph.one("Shape", name), second, axis=0))

    def lengths(self) -> str:
        """Return the number of positions of each row so far, i64 [batch, 1]."""
        graph = self.graph
        return graph.shared("lengths", lambda: graph.one("ReduceSum", "attention_mask", graph.integers(1), keepdims=1))

    # -- details -------------------------------------------------------------------------------------------------------

    def _shifted(self, plain: str, original: int) -> str:
        """Return rows of the second table as soon as the longest row exceeds the original context."""
        graph = self.graph
        longest = graph.one("ReduceMax", self.lengths(), keepdims=0)
        longer = graph.one("Greater", longest, graph.constant(np.array(original, np.int64)))
        zero, shift = (graph.constant(np.array(value, np.int64)) for value in (0, original))
        return graph.one("Add", plain, graph.one("Where", longer, shift, zero))

    def _rotated(self, x: str, attention: Attention, heads: int) -> str:
        name = attention.rotation or ""
        tables = [self.graph.external(table) for table in self._tables[name]]
        sizes = {"num_heads": heads, "rotary_embedding_dim": self.decoder.rotations[name].dim}
        return self._rotate(x, self.positions(name), tables, interleaved=int(attention.interleaved), **sizes)

    def _head_norm(self, x: str, module: str, attention: Attention, heads: int) -> str:
        """Append the norm of each head, or of all heads at once."""
        graph, norm, width = self.graph, self.decoder.norm, attention.head_dim
        if attention.head_norm == "all heads":
            return self.norm(x, module, norm)
        if attention.head_norm == "each head":
            return self._own_norms(x, module, heads, width)
        normed = self.norm(graph.one("Reshape", x, graph.integers(0, -1, width)), module, norm)
        return graph.one("Reshape", normed, graph.integers(0, -1, heads * width))

    def _own_norms(self, x: str, module: str, heads: int, width: int) -> str:
        """Append a norm with separate weights for each head."""
        graph, norm = self.graph, self.decoder.norm
        apart = graph.one("Reshape", x, graph.integers(0, 0, heads, width))
        operator = "RMSNormalization" if norm.kind == "rms" else "LayerNormalization"
        ones = graph.constant(np.ones(width, np.float32))
        normed = graph.one(operator, apart, ones, axis=-1, epsilon=norm.epsilon)
        weighted = graph.one("Mul", normed, self.vector(module + ".weight"))
        return graph.one("Reshape", weighted, graph.integers(0, 0, heads * width))
