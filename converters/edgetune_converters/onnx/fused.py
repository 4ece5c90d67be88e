"""ONNX Runtime's own operators: quantized products, attention with an in-place cache, experts."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from edgetune_converters.architectures.decoder import Activation, Attention, Experts, Norm
from edgetune_converters.onnx.builder import CONTRIB
from edgetune_converters.onnx.layout import WeightLayout, view_as
from edgetune_converters.onnx.operators import Operators
from edgetune_converters.onnx.plan import COARSE
from edgetune_converters.onnx.storage import NBitsBlocks

BEST = 64  # logits per position that are recomputed exactly
HEAD_MULTIPLE = 8  # GroupQueryAttention: head size
_ROTATED_MULTIPLE = 16  # GroupQueryAttention: head size and rotated dimensions


class FusedOperators(Operators):
    """Operators of the fast graph."""

    in_place = True

    def linear(self, x: str, module: str, weight: str | None = None) -> str:
        """Append one operator; for quantized weights it includes the bias."""
        layout = self._weights[weight or module + ".weight"]
        bias = self.vector(module + ".bias") if self.has(module + ".bias") else ""
        storage = layout.storage
        if isinstance(storage, NBitsBlocks):
            return self._by_codes(x, layout, storage, bias)
        product = self.graph.fused("FusedMatMul", x, self.values(layout), transB=1)
        return self.graph.one("Add", product, bias) if bias else product

    def rows(self, ids: str, name: str) -> str:
        """Append a lookup, in the same quantized blocks that a tied head multiplies with."""
        layout = self._weights[name]
        if not isinstance(layout.storage, NBitsBlocks):
            found = self.graph.one("Gather", self.graph.external(layout.arrays[0]), ids, axis=0)
            return found if layout.storage.name == "f32" else self.graph.one("Cast", found, to=TensorProto.FLOAT)
        codes, *others = layout.arrays
        n, blocks, blob = codes.spec.shape
        flat = view_as(codes, ".rows", (n, blocks * blob))
        first, *rest = (self.graph.external(array) for array in (flat, *others))
        sizes = {"bits": layout.storage.bits, "block_size": layout.storage.block}
        return self.graph.fused("GatherBlockQuantized", first, ids, *rest, gather_axis=0, quantize_axis=1, **sizes)

    def head(self, x: str, name: str) -> str:
        """Append the head. A coarse copy of the matrix, if any, finds the best logits, which are recomputed."""
        graph = self.graph
        layout = self._weights.get(COARSE)
        if layout is None or not isinstance(layout.storage, NBitsBlocks):
            return super().head(x, name)
        coarse = self._by_codes(x, layout, layout.storage, "")
        _, best = graph.add("TopK", [coarse, graph.integers(BEST)], 2, axis=-1, largest=1, sorted=0)
        exact = graph.one("MatMul", self.rows(best, name), graph.one("Unsqueeze", x, graph.integers(3)))
        return graph.one("ScatterElements", coarse, best, graph.one("Squeeze", exact, graph.integers(3)), axis=2)

    def add_norm(self, x: str, y: str, module: str, norm: Norm) -> tuple[str, str]:
        """Append sum and norm as one operator."""
        inputs = [x, y, self.vector(module + ".weight")]
        operator = "SkipSimplifiedLayerNormalization"
        if norm.kind == "layer":
            operator = "SkipLayerNormalization"
            inputs += [self.vector(module + ".bias")] if self.has(module + ".bias") else []
        normed, *_, total = self.graph.add(operator, inputs, 4, CONTRIB, epsilon=norm.epsilon)
        return normed, total

    def activate(self, x: str, activation: Activation) -> str:
        """Append an activation; SiLU is QuickGelu with alpha 1."""
        if activation == "silu":
            return self.graph.fused("QuickGelu", x, alpha=1.0)
        return super().activate(x, activation)

    def attention(self, projected: list[str], attention: Attention, layer: int) -> str:
        """Append GroupQueryAttention, which also applies RoPE and updates the cache."""
        inside = self._rotates_itself(attention)
        query, key, value = projected if len(projected) == 3 else (projected[0], "", "")
        if attention.head_norm or (attention.rotation and not inside):
            query, key, value = self.prepared(projected, attention, layer, rotate=not inside)
        past = [f"past_key_values.{layer}.{which}" for which in ("key", "value")]
        present = [f"present.{layer}.{which}" for which in ("key", "value")]
        tables = [self.graph.external(table) for table in self._tables[attention.rotation or ""]] if inside else []
        return self.graph.add(
            "GroupQueryAttention",
            [query, key, value, *past, *self._sizes(), *tables],
            [f"/model/layers.{layer}/attn/output", *present],
            CONTRIB,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            scale=attention.scale,
            softcap=attention.soft_cap,
            local_window_size=attention.window or -1,
            do_rotary=int(inside),
            rotary_interleaved=int(attention.interleaved),
        )[0]

    def experts(self, x: str, logits: str, part: Experts, module: str) -> str:
        """Append MoE or, for quantized weights, QMoE; both normalize the weights of the chosen experts to 1."""
        graph = self.graph
        first, second = (self._weights[f"{module}.{name}.weight"] for name in ("gate_up_proj", "down_proj"))
        rated = graph.one("Reshape", logits, graph.integers(-1, part.count))
        # silu(gate) * up, with the rows of gate and up interleaved
        kind = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
        kind |= {"k": part.used, "normalize_routing_weights": 1}
        if isinstance(first.storage, NBitsBlocks) and isinstance(second.storage, NBitsBlocks):
            inputs = [*self._codes_of(first), "", *self._codes_of(second), ""]
            sizes = {"expert_weight_bits": first.storage.bits, "block_size": first.storage.block}
            found = graph.fused("QMoE", x, rated, *inputs, **kind, **sizes)
        else:
            found = graph.fused("MoE", x, rated, self.values(first), "", self.values(second), "", **kind)
        return found if part.normalized else graph.one("Mul", found, self._share(logits, part.used))

    def _codes_of(self, layout: WeightLayout) -> list[str]:
        codes, scales = layout.arrays[:2]
        *lead, blocks, blob = codes.spec.shape
        flat = view_as(codes, ".rows", (*lead, blocks * blob))
        return [self.graph.external(flat), self.graph.external(scales)]

    def _share(self, logits: str, used: int) -> str:
        """Return the probability mass of the chosen experts."""
        graph = self.graph
        best, _ = graph.add("TopK", [graph.one("Softmax", logits, axis=-1), graph.integers(used)], 2, axis=-1)
        return graph.one("ReduceSum", best, graph.integers(-1), keepdims=1)

    def _by_codes(self, x: str, layout: WeightLayout, storage: NBitsBlocks, bias: str) -> str:
        n, k = layout.weight.shape
        arrays = [self.graph.external(array) for array in layout.arrays]
        zeros = arrays[2] if len(arrays) > 2 else ""
        inputs = [x, *arrays[:2], *([zeros, "", bias] if bias else [zeros] if zeros else [])]
        sizes = {"K": k, "N": n, "bits": storage.bits, "block_size": storage.block}
        return self.graph.fused("MatMulNBits", *inputs, accuracy_level=storage.accuracy, **sizes)

    def _rotates_itself(self, attention: Attention) -> bool:
        """Whether GroupQueryAttention can apply RoPE itself: it needs multiples of 16, and supports one table."""
        if attention.rotation is None:
            return False
        rotation = self.decoder.rotations[attention.rotation]
        fits = attention.head_dim % _ROTATED_MULTIPLE == 0 and rotation.dim % _ROTATED_MULTIPLE == 0
        return fits and rotation.long is None

    def _rotate(self, x: str, places: str, tables: list[str], **sizes: int) -> str:
        return self.graph.fused("RotaryEmbedding", x, places, *tables, **sizes)

    def _sizes(self) -> tuple[str, str]:
        """Return the keys of each row minus one, i32 [batch], and those of the longest row, i32 []."""
        graph = self.graph
        last = graph.shared("lengths less one", lambda: graph.one("Sub", self.lengths(), graph.integers(1)))
        flat = graph.shared("flat", lambda: graph.one("Squeeze", last, graph.integers(1)))
        counts = graph.shared("seqlens_k", lambda: graph.one("Cast", flat, to=TensorProto.INT32))
        total = graph.shared("total", lambda: graph.one("Cast", self.size_of("attention_mask"), to=TensorProto.INT32))
        return counts, total

    def _positions(self) -> str:
        """Positions follow from the length of each row. In the first call rows may be padded on the right, as
        GroupQueryAttention assumes too.
        """
        graph = self.graph
        zero, one = (graph.constant(np.array(value, np.int64)) for value in (0, 1))
        count = self.size_of("input_ids")
        before = graph.one("Max", graph.one("Sub", self.lengths(), count), zero)
        return graph.one("Add", before, graph.one("Range", zero, count, one))
