"""Standard operators only (opset 23), for any ONNX runtime. The cache grows by concatenation."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from edgetune_converters.architectures.decoder import Attention, DecoderSpec, Experts, Norm
from edgetune_converters.onnx.fused import HEAD_MULTIPLE, FusedOperators
from edgetune_converters.onnx.layout import ExternalArray, WeightLayout
from edgetune_converters.onnx.operators import Operators
from edgetune_converters.onnx.storage import StandardBlocks


class StandardAttention(Operators):
    """The standard's Attention with a boolean mask. Rows of a batch are padded on the left."""

    in_place = False

    def attention(self, projected: list[str], attention: Attention, layer: int) -> str:
        """Append attention with a mask over all keys."""
        query, key, value = self.prepared(projected, attention, layer)
        past = [f"past_key_values.{layer}.{which}" for which in ("key", "value")]
        present = [f"present.{layer}.{which}" for which in ("key", "value")]
        return self.graph.add(
            "Attention",
            [query, key, value, self._mask(attention.window), *past],
            [f"/model/layers.{layer}/attn/output", *present],
            q_num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            scale=attention.scale,
            softcap=attention.soft_cap,
        )[0]

    def _positions(self) -> str:
        """Count along the mask, so that padding has no positions."""
        graph = self.graph
        counted = graph.one("CumSum", "attention_mask", graph.constant(np.array(1, np.int64)))
        zero, one = (graph.constant(np.array(value, np.int64)) for value in (0, 1))
        from_zero = graph.one("Max", graph.one("Sub", counted, one), zero)
        count = graph.one("Unsqueeze", self.size_of("input_ids"), graph.integers(0))
        return graph.one("Slice", from_zero, graph.one("Neg", count), graph.integers(2**62), graph.integers(1))

    def _mask(self, window: int | None) -> str:
        """Return the keys that each query attends to, bool [batch, 1, sequence, total]."""
        graph = self.graph
        causal = graph.shared("causal", self._causal)
        if window is None:
            return causal
        return graph.shared(f"window {window}", lambda: graph.one("And", causal, self._near(window)))

    def _places(self) -> tuple[str, str]:
        """Return the indices of the queries [sequence, 1] and of the keys [total], padding included."""
        graph = self.graph
        zero, one = (graph.constant(np.array(value, np.int64)) for value in (0, 1))
        total = self.size_of("attention_mask")
        keys = graph.shared("keys", lambda: graph.one("Range", zero, total, one))
        first = graph.shared("first query", lambda: graph.one("Sub", total, self.size_of("input_ids")))
        row = graph.shared("query row", lambda: graph.one("Range", first, total, one))
        return graph.shared("queries", lambda: graph.one("Unsqueeze", row, graph.integers(1))), keys

    def _causal(self) -> str:
        graph = self.graph
        queries, keys = self._places()
        real = graph.one("Unsqueeze", graph.one("Cast", "attention_mask", to=TensorProto.BOOL), graph.integers(1, 2))
        return graph.one("And", graph.one("LessOrEqual", keys, queries), real)

    def _near(self, window: int) -> str:
        graph = self.graph
        queries, keys = self._places()
        last = graph.one("Sub", queries, graph.constant(np.array(window, np.int64)))
        return graph.one("Greater", keys, last)


class StandardOperators(StandardAttention):
    """Operators of the portable graph."""

    def linear(self, x: str, module: str, weight: str | None = None) -> str:
        """Append a product with the transposed matrix; runtimes fold the Transpose."""
        product = self._product(x, self._matrix(self._weights[weight or module + ".weight"]))
        bias = module + ".bias"
        return self.graph.one("Add", product, self.vector(bias)) if self.has(bias) else product

    def rows(self, ids: str, name: str) -> str:
        """Append a lookup; for quantized weights, of blocks and scales, then DequantizeLinear."""
        layout, graph = self._weights[name], self.graph
        found = [graph.one("Gather", graph.external(array), ids, axis=0) for array in layout.arrays]
        if isinstance(layout.storage, StandardBlocks):
            return graph.one("DequantizeLinear", *found, axis=-1, block_size=layout.storage.block)
        return found[0] if layout.storage.name == "f32" else graph.one("Cast", found[0], to=TensorProto.FLOAT)

    def add_norm(self, x: str, y: str, module: str, norm: Norm) -> tuple[str, str]:
        """Append sum and norm."""
        total = self.graph.one("Add", x, y)
        return self.norm(total, module, norm), total

    def experts(self, x: str, logits: str, part: Experts, module: str) -> str:
        """Append every expert on every token; experts that were not chosen have the weight 0."""
        graph = self.graph
        weights = graph.add("Split", [self._shares(logits, part)], part.count, axis=-1, num_outputs=part.count)
        first, second = (self._weights[f"{module}.{name}.weight"] for name in ("gate_up_proj", "down_proj"))
        width = first.weight.shape[1] // 2
        total = ""
        for number, weight in enumerate(weights):
            gate, up = self.split(self._product(x, self._matrix(first, number)), width, width)
            inner = graph.one("Mul", self.activate(gate, part.activation), up)
            found = graph.one("Mul", self._product(inner, self._matrix(second, number)), weight)
            total = graph.one("Add", total, found) if total else found
        return total

    def _shares(self, logits: str, part: Experts) -> str:
        """Return the weight of each expert, [batch, sequence, experts]."""
        graph = self.graph
        shares = graph.one("Softmax", logits, axis=-1)
        best, _ = graph.add("TopK", [shares, graph.integers(part.used)], 2, axis=-1)
        least = graph.one("ReduceMin", best, graph.integers(-1), keepdims=1)
        chosen = graph.one("Where", graph.one("GreaterOrEqual", shares, least), shares, graph.number(0.0))
        if not part.normalized:
            return chosen
        return graph.one("Div", chosen, graph.one("ReduceSum", best, graph.integers(-1), keepdims=1))

    def _product(self, x: str, matrix: str) -> str:
        return self.graph.one("MatMul", x, self.graph.one("Transpose", matrix, perm=[1, 0]))

    def _matrix(self, layout: WeightLayout, expert: int | None = None) -> str:
        """Return a matrix in f32, or that of one expert."""
        graph = self.graph
        arrays = layout.arrays if expert is None else [_of_expert(array, expert) for array in layout.arrays]
        stored = [graph.external(array) for array in arrays]
        if isinstance(layout.storage, StandardBlocks):
            return graph.one("DequantizeLinear", *stored, axis=1, block_size=layout.storage.block)
        return stored[0] if layout.storage.name == "f32" else graph.one("Cast", stored[0], to=TensorProto.FLOAT)

    def _rotate(self, x: str, places: str, tables: list[str], **sizes: int) -> str:
        return self.graph.one("RotaryEmbedding", *[x, *tables, places], domain="", **sizes)


class FusedWithStandardAttention(StandardAttention, FusedOperators):
    """ONNX Runtime's operators, but standard Attention, for head sizes that GroupQueryAttention does not support."""


def _of_expert(array: ExternalArray, number: int) -> ExternalArray:
    """Return the part of an array that belongs to one expert."""
    count, *shape = array.spec.shape
    size = array.spec.bytes // count
    spec = array.spec._replace(shape=tuple(shape), bytes=size)
    return ExternalArray(f"{array.name}.{number}", spec, array.offset + number * size)


def operators_for(decoder: DecoderSpec, *, portable: bool) -> type[Operators]:
    """Return ONNX Runtime's operators or, for a portable graph, the standard's."""
    if portable:
        return StandardOperators
    fits = all(block.attention.head_dim % HEAD_MULTIPLE == 0 for block in decoder.blocks)
    return FusedOperators if fits else FusedWithStandardAttention
