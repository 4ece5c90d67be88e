"""Assemble the graph of a decoder from its description."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from edgetune_converters.architectures.decoder import Block, Experts, FeedForward, Order
from edgetune_converters.onnx.layout import ExternalArray
from edgetune_converters.onnx.operators import BATCH, PAST, SEQUENCE, TOTAL, Operators

SCORE = "score"
"""Output of a reward model's graph, f32 [batch, 1]: the score at the last token of each row that its mask shows."""
WHOLE = np.array([0, 2**62], np.int64)  # default of `logits_range`: the logits of all positions


def assemble(operators: Operators, score_head: ExternalArray | None = None) -> None:
    """Append a complete decoder to the graph of `operators`, and the score of each row where there is a head for it."""
    decoder = operators.decoder
    _inputs(operators, has_score=score_head is not None)
    stream = _Stream(operators, _embedded(operators))
    for layer, block in enumerate(decoder.blocks):
        _block(operators, stream, block, layer)
    operators.graph.at("head")
    hidden = stream.normed("model.norm")
    _head(operators, hidden)
    if score_head is not None:
        operators.graph.at("score")
        _score(operators, hidden, score_head)


class _Stream:
    """The residual stream: a value and a pending addend, so that sum and norm can be one operator."""

    def __init__(self, operators: Operators, value: str) -> None:
        self._operators = operators
        self._value = value
        self._pending: str | None = None

    def add(self, branch: str) -> None:
        """Add the output of a block."""
        scaled = self._operators.scaled(branch, self._operators.decoder.residual_scale)
        self._value, self._pending = self.value(), scaled

    def value(self) -> str:
        """Return the current value."""
        if self._pending is not None:
            self._value = self._operators.graph.one("Add", self._value, self._pending)
            self._pending = None
        return self._value

    def normed(self, module: str) -> str:
        """Return the normalized value; the value itself where the model has no norm here."""
        operators = self._operators
        if not operators.has(module + ".weight"):
            return self.value()
        norm = operators.decoder.norm
        if self._pending is None:
            return operators.norm(self._value, module, norm)
        normed, self._value = operators.add_norm(self._value, self._pending, module, norm)
        self._pending = None
        return normed


def _inputs(operators: Operators, *, has_score: bool) -> None:
    """Declare inputs and outputs as onnxruntime-genai does; `logits_range` has a default and may be ignored."""
    graph, decoder = operators.graph, operators.decoder
    graph.input("input_ids", TensorProto.INT64, [BATCH, SEQUENCE])
    graph.input("attention_mask", TensorProto.INT64, [BATCH, TOTAL])
    graph.input("logits_range", TensorProto.INT64, [2], WHOLE)
    for layer, block in enumerate(decoder.blocks):
        heads, width = block.attention.kv_heads, block.attention.head_dim
        for which in ("key", "value"):
            graph.input(f"past_key_values.{layer}.{which}", TensorProto.FLOAT, [BATCH, heads, PAST, width])
    graph.output("logits", TensorProto.FLOAT, [BATCH, "logits_length", decoder.vocabulary])
    for layer, block in enumerate(decoder.blocks):
        heads, width = block.attention.kv_heads, block.attention.head_dim
        for which in ("key", "value"):
            graph.output(f"present.{layer}.{which}", TensorProto.FLOAT, [BATCH, heads, TOTAL, width])
    if has_score:
        graph.output(SCORE, TensorProto.FLOAT, [BATCH, 1])


def _embedded(operators: Operators) -> str:
    operators.graph.at("embed")
    found = operators.rows("input_ids", "model.embed_tokens.weight")
    if operators.has("model.embed_positions.weight"):
        places = operators.rows(operators.positions(), "model.embed_positions.weight")
        found = operators.graph.one("Add", found, places)
    found = operators.scaled(found, operators.decoder.embedding_scale)
    if operators.has("model.embed_norm.weight"):
        found = operators.norm(found, "model.embed_norm", operators.decoder.norm)
    return found


def _block(operators: Operators, stream: _Stream, block: Block, layer: int) -> None:
    place = f"model.layers.{layer}."
    operators.graph.at(f"layers.{layer}/attn")
    seen = stream.normed(place + "input_norm")
    attended = _attention(operators, seen, block, layer)
    if block.order is Order.PARALLEL:
        if operators.has(place + "mlp_norm.weight"):
            operators.graph.at(f"layers.{layer}/mlp")
            seen = stream.normed(place + "mlp_norm")
        fed = _feed_forward(operators, seen, block.feed_forward, layer)
        stream.add(operators.graph.one("Add", attended, fed))
        return
    stream.add(attended)
    operators.graph.at(f"layers.{layer}/mlp")
    stream.add(_feed_forward(operators, stream.normed(place + "mlp_norm"), block.feed_forward, layer))


def _attention(operators: Operators, x: str, block: Block, layer: int) -> str:
    place = f"model.layers.{layer}."
    names = ["qkv"] if operators.has(place + "attn.qkv_proj.weight") else ["q", "k", "v"]
    projected = [operators.linear(x, f"{place}attn.{name}_proj") for name in names]
    attended = operators.attention(projected, block.attention, layer)
    out = operators.linear(attended, place + "attn.o_proj")
    return _after(operators, out, place + "attn_post_norm")


def _feed_forward(operators: Operators, x: str, part: FeedForward | Experts, layer: int) -> str:
    place = f"model.layers.{layer}."
    if isinstance(part, Experts):
        found = _experts(operators, x, part, place + "moe")
    else:
        found = _dense(operators, x, part, place + "mlp")
    return _after(operators, found, place + "mlp_post_norm")


def _dense(operators: Operators, x: str, part: FeedForward, module: str) -> str:
    joined = operators.linear(x, module + ".gate_up_proj")
    if part.gated:
        width = operators.rows_of(module + ".gate_up_proj.weight") // 2
        gate, up = operators.split(joined, width, width)
        inner = operators.graph.one("Mul", operators.activate(gate, part.activation), up)
    else:
        inner = operators.activate(joined, part.activation)
    return operators.linear(inner, module + ".down_proj")


def _experts(operators: Operators, x: str, part: Experts, module: str) -> str:
    graph = operators.graph
    found = operators.experts(x, operators.linear(x, module + ".router"), part, module)
    if part.shared:
        shared = _dense(operators, x, FeedForward(part.activation), module + ".shared")
        if part.shared_gate:
            shared = graph.one("Mul", shared, graph.one("Sigmoid", operators.linear(x, module + ".shared.router")))
        found = graph.one("Add", found, shared)
    return found


def _after(operators: Operators, x: str, module: str) -> str:
    """Return the normalized output of a block, where the model has a norm here."""
    return operators.norm(x, module, operators.decoder.norm) if operators.has(module + ".weight") else x


def _head(operators: Operators, hidden: str) -> None:
    graph, decoder = operators.graph, operators.decoder
    first, last = graph.add("Split", ["logits_range"], 2, axis=0, num_outputs=2)
    positions = graph.one("Slice", hidden, first, last, graph.integers(1))
    matrix = "lm_head.weight" if operators.has("lm_head.weight") else "model.embed_tokens.weight"
    logits = operators.head(operators.scaled(positions, decoder.logit_scale), matrix)
    graph.named(operators.capped(logits, decoder.logit_cap), "logits")


def _score(operators: Operators, hidden: str, head: ExternalArray) -> None:
    """Append the product of the head with the hidden state of the last token that the mask of a row shows.

    The mask covers the past too: its last place, less the tokens of the past, is an index into those of this call. In a
    step of rows of different lengths, the past of a shorter row is shorter: it has but one token, the first.
    """
    graph = operators.graph
    each = graph.one("Squeeze", graph.one("MatMul", hidden, graph.external(head)), graph.integers(2))
    shown = graph.one("Cast", "attention_mask", to=TensorProto.INT32)  # ONNX Runtime has no ArgMax of int64
    last = graph.one("ArgMax", shown, axis=1, keepdims=1, select_last_index=1)
    past = graph.one("Sub", operators.size_of("attention_mask"), operators.size_of("input_ids"))
    place = graph.one("Max", graph.one("Sub", last, past), graph.constant(np.array(0, np.int64)))
    graph.named(graph.one("GatherElements", each, place, axis=1), SCORE)
