"""Find texts that would crash llama.cpp: some pre-tokenizers use std::regex, which recurses once per character."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# a stack of 8 MiB holds 10,000 characters of recursion, but not 50,000
_RUN = re.compile(r"[^\s.,!?…。，、]{8192}|[\W_]{8192}")
# pre-tokenizers whose expressions also match spaces, so that several words are one run
_RUNS = {"exaone-moe": re.compile(r"[^\d\n.,;:!?…。，、]{8192}")}
# pre-tokenizers that llama.cpp implements in C++, or whose expressions do not repeat
_WITHOUT_REGEX = frozenset((
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum", "granite-docling", "gigachat",
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
    "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "pixtral", "smaug-bpe", "dbrx", "chatglm-bpe",
    "glm4", "qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2", "solar-open", "qwen35", "laguna",
    "gemma4", "sarvam-moe",
))  # fmt: skip


def find_overlong_run(metadata: Mapping[str, Any], text: str) -> str | None:
    """Return a run of 8192 characters without whitespace or punctuation that the model's pre-tokenizer cannot take."""
    pre = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre in _WITHOUT_REGEX:
        return None
    found = _RUN.search(text) or (_RUNS[pre].search(text) if pre in _RUNS else None)
    return found[0] if found else None
