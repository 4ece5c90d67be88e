"""The tables of docs/methods.md, from the facts that edgetune/methods states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from edgetune.methods import METHODS, NAMES_OF_OPTIONS, NOT_TRAINED, Method
from edgetune.methods.base import LayerMethod, Surroundings
from edgetune.methods.selective import SelectiveMethod
from edgetune.methods.virtual_tokens import VirtualTokenMethod

FORMATS = {"gguf": "GGUF", "onnx": "ONNX", "gguf-lora": "GGUF-LoRA"}
BITS = (4, 8, 16)
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "rsLoRA": {"kind": "lora", "use_rslora": True},
    "LoRA+": {"kind": "lora", "loraplus_lr_ratio": 16},
    "DoRA": {"kind": "lora", "use_dora": True},
    "PiSSA": {"kind": "lora", "init": "pissa"},
    "OLoRA": {"kind": "lora", "init": "olora"},
    "LoftQ": {"kind": "lora", "init": "loftq"},
    "EVA": {"kind": "lora", "init": "eva"},
    "CorDA": {"kind": "lora", "init": "corda"},
    "LoRA-GA": {"kind": "lora", "init": "lora_ga"},
}
"""Methods that are options of a kind."""

# Llama-3.2-1B: 16 blocks, hidden 2048, 8 of 32 heads of 64 for keys and values, feed-forward 8192, tied embedding
_BLOCKS, _HIDDEN, _KEYS, _WIDE, _VOCABULARY = 16, 2048, 512, 8192, 128256
_LINEAR = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN), "self_attn.k_proj": (_KEYS, _HIDDEN), "self_attn.v_proj": (_KEYS, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN), "mlp.gate_proj": (_WIDE, _HIDDEN), "mlp.up_proj": (_WIDE, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _WIDE),
}  # fmt: skip
LAYERS = {f"model.layers.{block}.{name}": shape for block in range(_BLOCKS) for name, shape in _LINEAR.items()}
"""The linear layers of Llama-3.2-1B -> [rows, columns]."""
NORMS = {
    **{
        f"model.layers.{block}.{name}.weight": (_HIDDEN,)
        for block in range(_BLOCKS)
        for name in ("input_layernorm", "post_attention_layernorm")
    },
    "model.norm.weight": (_HIDDEN,),
}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (_VOCABULARY, _HIDDEN),
    **{f"{name}.weight": shape for name, shape in LAYERS.items()},
    **NORMS,
}
"""All tensors of Llama-3.2-1B."""
_BIASES = sum(rows for rows, _ in LAYERS.values())
_SPARSE = ("shira", "supertuning")
"""Methods that change as many weights as they train."""


def methods() -> Iterator[tuple[str, str, Method]]:
    """Yield (title, what to write in the section `adapter`, method) of every kind and of the variants."""
    for kind, method in METHODS.items():
        yield method.facts.title, f"kind: {kind}", method(kind=kind)
        for title, options in VARIANTS.items() if kind == "lora" else ():
            own = ", ".join(f"{name}: {str(value).lower()}" for name, value in options.items())
            with contextlib.suppress(ValidationError):  # an option that LoRA does not have
                yield title, own, METHODS["lora"](**options)


def count_trained(method: Method) -> int | None:
    """Return the number of trained parameters of a 1 B model; None where the method does not state it."""
    if isinstance(method, SelectiveMethod):
        return _BIASES if method.kind == "bitfit" else method.count_in(SHAPES)
    if isinstance(method, LayerMethod):
        return method.count_trainable(_adapted(method))
    if method.kind == "layernorm":
        return sum(shape[0] for shape in NORMS.values())
    return _count_virtual(method)


def _adapted(method: LayerMethod) -> Mapping[str, tuple[int, int]]:
    """Return the layers of the default `target_modules`."""
    if method.target_modules == "v":
        return {name: shape for name, shape in LAYERS.items() if name.endswith("v_proj")}
    return LAYERS


def _count_virtual(method: Method) -> int | None:
    """Return the trained parameters of virtual tokens, of the network that makes them, or of prompts in the blocks."""
    stated = method.model_dump()
    if method.kind == "adaption-prompt":
        return int(stated["upper_layers"] * (stated["tokens"] * _HIDDEN + 1))  # and a gate
    if not isinstance(method, VirtualTokenMethod):
        return None
    vectors = method.tokens * _HIDDEN
    if method.kind == "p-tuning":
        width = stated["encoder_hidden_size"]
        return int(vectors + (_HIDDEN + 1) * width + (width + 1) * width + (width + 1) * _HIDDEN)
    if method.kind == "multitask-prompt-tuning":
        return int(vectors + stated["ranks"] * (method.tokens + _HIDDEN))
    return method.tokens * 2 * _BLOCKS * _KEYS if method.kind == "prefix-tuning" else vectors


def count_changed(method: Method) -> int:
    """Return how many weights of the base have another value in an exported file; new ones are not counted."""
    if isinstance(method, LayerMethod) and method.kind not in (*_SPARSE, "beft"):
        return sum(rows * columns for rows, columns in _adapted(method).values())
    if method.kind in ("bitfit", "beft", "llama-pro", "adaption-prompt") or isinstance(method, VirtualTokenMethod):
        return 0
    return count_trained(method) or 0


def extra_cost(method: Method) -> str:
    """Return what an exported file costs more than its base at inference."""
    if method.kind == "llama-pro":
        return f"{getattr(method, 'new_blocks', 1)} block more"
    if method.kind in ("bitfit", "beft"):
        return "biases"
    if isinstance(method, VirtualTokenMethod):
        return f"{method.tokens} tokens of context"
    return "none"


def refusal(method: Method, bits: int, format_: str | None, lora_rank: int | None = None) -> str | None:
    """Return the first reason why the method cannot be trained on so many bits, or exported in a format.

    Either merge base will do; a format is tried with bits that the method can be trained on.
    """
    if format_ is not None:
        bits = next((each for each in (16, 4, 8) if refusal(method, each, None) is None), bits)
    found = []
    for merge_base in ("original", "nf4"):
        formats = (format_,) if format_ else ()
        around = Surroundings(bits=bits, formats=formats, merge_base=merge_base, lora_rank=lora_rank)
        found.append(next(iter(method.conflicts(around)), None))
    return None if None in found else found[0]


def format_mark(method: Method, format_: str) -> str:
    """Return whether a trained adapter can be exported in a format."""
    if refusal(method, 16, format_) is None:
        return "yes"
    return "by SVD" if format_ == "gguf-lora" and refusal(method, 16, format_, lora_rank=16) is None else "–"


def combinations(method: Method) -> str:
    """Return how several adapters of this method are combined."""
    if not isinstance(method, LayerMethod) or refusal(method, 16, "safetensors"):
        return "–"
    is_pair = method.facts.peft_type == "LORA" and method.no_low_rank is None
    return "sum, SVD, TIES, DARE, magnitude" if is_pair else "sum"


def methods_table() -> str:
    """Return the table of all methods."""
    head = (
        "method",
        "`adapter`",
        "branch",
        "trained",
        "changed",
        *(f"{bits} bits" for bits in BITS),
        *FORMATS.values(),
    )
    lines = ["| " + " | ".join((*head, "several adapters", "cost at inference")) + " |"]
    lines.append("| --- " * (len(head) + 2) + "|")
    for title, written, method in methods():
        marks = [_mark(refusal(method, bits, None)) for bits in BITS]
        marks += [format_mark(method, format_) for format_ in FORMATS]
        trained, changed = count_trained(method), _count(count_changed(method))
        if method.kind == "trainable-tokens":
            written, changed = f"{written}, tokens: [...]", f"{_count(_HIDDEN)} a token"
        counts = (changed if trained is None else _count(trained), changed)
        head = (title, f"`{written}`", method.facts.taxonomy)
        cells = (*head, *counts, *marks, combinations(method), extra_cost(method))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def reasons_table() -> str:
    """Return the table of what is refused, and why, of every kind and of the variants."""
    lines = ["| method | not | because |", "| --- | --- | --- |"]
    stated: set[str] = set()
    for title, _, method in methods():
        name = f"`{method.kind}`" if method.kind not in stated else title
        stated.add(method.kind)
        for reason, what in _grouped((f"{bits} bits", _why_not_on(method, bits)) for bits in BITS):
            lines.append(f"| {name} | {what} | {reason} |")
        formats = ("gguf", "gguf-lora", "onnx", "safetensors")
        for reason, what in _grouped((format_, method.why_not_as(format_)) for format_ in formats):
            lines.append(f"| {name} | {what} | {reason} |")
        if method.no_low_rank:
            lines.append(f"| {name} | gguf-lora without `export.lora_rank` | {method.no_low_rank} |")
    return "\n".join(lines) + "\n"


def _why_not_on(method: Method, bits: int) -> str | None:
    """Return why the method is not trained on so many bits, without what to do instead."""
    why = method.facts.not_on.get(bits) or refusal(method, bits, None)
    return why and why.partition(";")[0]


def _grouped(reasons: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, str]]:
    """Yield each reason with all that it holds for."""
    found: dict[str, list[str]] = {}
    for what, reason in reasons:
        if reason is not None:
            found.setdefault(reason, []).append(what)
    for reason, names in found.items():
        yield reason, ", ".join(names)


def names_table() -> str:
    """Return the table of names that are no kinds: options of a kind, and methods that are not trained."""
    lines = ["| name | |", "| --- | --- |"]
    lines += [f"| {name} | {words} |" for name, words in {**NAMES_OF_OPTIONS, **NOT_TRAINED}.items()]
    return "\n".join(lines) + "\n"


def _mark(why: str | None) -> str:
    return "yes" if why is None else "–"


def _count(number: int) -> str:
    """Format with three digits and a unit: 11.3 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
