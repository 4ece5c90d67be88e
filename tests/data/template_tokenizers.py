"""For each real template a tokenizer that has its special tokens, and its stop tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from edgetune.data.text_tokenizer import TextTokenizer

_TAG = re.compile(
    r"<\|[^|<>\n]+\|>|<｜[^｜<>\n]+｜>|〈\|[^|]+\|〉|\[/?[A-Z_]+\]|</?[A-Za-z_:|0-9]+>|\][~!a-z]+\[|\[e~\[|\]~b\]"
)
_TEXTS = re.compile(r"think|tool|arg|parameter|function|response", re.IGNORECASE)
STOPS: dict[str, tuple[str, ...]] = {
    "CohereForAI-c4ai-command-r-plus-tool_use": ("<|END_OF_TURN_TOKEN|>",),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|END_OF_TURN_TOKEN|>",),
    "Cohere2MoE": ("<|END_OF_TURN_TOKEN|>",),
    "GLM-4.6": ("<|user|>", "<|observation|>"),
    "GLM-4.7-Flash": ("<|user|>", "<|observation|>"),
    "MiniMax-M1": ("<end_of_sentence>",),
    "MiniMax-M2": ("[e~[",),
    "MiniMax-M3": ("[e~[",),
    "Reka-Edge": ("<sep>",),
    "ByteDance-Seed-OSS": ("<seed:eos>",),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("<|im_end|>",),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("<|im_end|>",),
    "NVIDIA-Nemotron-Nano-v2": ("<SPECIAL_12>",),
    "google-gemma-2-2b-it": ("<end_of_turn>",),
    "google-gemma-4-31B-it": ("<turn|>", "<|tool_response>"),
    "google-gemma-4-31B-it-interleaved": ("<turn|>", "<|tool_response>"),
    "inclusionai-ling-3.0-flash": ("<|role_end|>",),
    "meetkai-functionary-medium-v3.1": ("<|eot_id|>", "<|eom_id|>"),
    "meta-llama-Llama-3.1-8B-Instruct": ("<|eot_id|>", "<|eom_id|>"),
    "meta-llama-Llama-3.2-3B-Instruct": ("<|eot_id|>", "<|eom_id|>"),
    "meta-llama-Llama-3.3-70B-Instruct": ("<|eot_id|>", "<|eom_id|>"),
    "muse-glimmer": ("<|eot|>", "<|eom|>"),
    "openai-gpt-oss-120b": ("<|return|>", "<|call|>"),
    "poolside-Laguna-S-2.1": ("</assistant>",),
    "poolside-Laguna-XS-2.1": ("</assistant>",),
    "poolside-Laguna-XS.2": ("</assistant>",),
    "upstage-Solar-Open-100B": ("<|end|>", "<|calls|>"),
    "Apertus-8B-Instruct": ("<|assistant_end|>",),
    "Apriel-1.6-15b-Thinker-fixed": ("<|end|>",),
    "GigaChat3-10B-A1.8B": ("<|message_sep|>",),
    "GigaChat3.1-10B-A1.8B": ("<|message_sep|>",),
    "Kimi-K3": ("<|end_of_msg|>",),
    "ibm-granite-granite-3.3-2B-Instruct": ("<|end_of_text|>",),
    "ibm-granite-granite-4.0": ("<|end_of_text|>",),
    "ibm-granite-granite-4.1": ("<|end_of_text|>",),
    "tencent-Hy3": ("<｜hy_eos:opensource｜>",),
    "fireworks-ai-llama-3-firefunction-v2": ("<|eot_id|>",),
    "meetkai-functionary-medium-v3.2": ("<|eot_id|>",),
}
"""Stop tokens that a template writes by name. The others write `<|im_end|>`, `<｜end▁of▁sentence｜>` or eos_token."""


def tokenizer_for(name: str, source: str, byte_level: Path) -> TextTokenizer:
    """Return the byte-level tokenizer in a folder with the tags of a template; those of thoughts and calls are text."""
    backend: Any = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    usual = [each for each in ("<|im_end|>", "<｜end▁of▁sentence｜>") if each in source]
    stops = STOPS.get(name) or (*usual, "</s>")
    tags = {*_TAG.findall(source), "<s>", "</s>", "<pad>", *stops}
    if "<|tool_response>" in tags:  # Gemma 4, whose </s> is plain text to its tokenizer and to llama.cpp
        tags.remove("</s>")
    texts = {tag for tag in tags if _TEXTS.search(tag)} - {*stops}
    backend.add_special_tokens([AddedToken(tag, normalized=False) for tag in sorted(tags - texts)])
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in sorted(texts)])
    named = {"eos_token": stops[0], "bos_token": "<s>", "pad_token": "<pad>"}
    declared = tuple(backend.token_to_id(stop) for stop in stops)
    return TextTokenizer(backend, named, declared, declares_bos=False)
