"""What onnxruntime-genai reads beside a graph: genai_config.json, and the class of the tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, Self

from edgetune_converters.files.contents import read_json
from edgetune_converters.onnx.model import DecoderGraph
from edgetune_converters.tokenizers.special import SpecialTokenIds

# model type of onnxruntime-genai for a plain decoder with this interface
_TYPE = "llama"
_SEARCH_LENGTH = 4096  # prompt and answer; the cache of a context of 128k tokens would take gigabytes
_TOKENIZER_CONFIG, _TOKENIZER = "tokenizer_config.json", "tokenizer.json"
# the tokenizer classes that onnxruntime-genai 0.18 reads, also with "Fast" behind them
_CLASSES = frozenset(
    {
        *(f"{name}Tokenizer" for name in ("Baichuan", "ChatGLM", "CodeGen", "CodeLlama", "GPT2", "GPTNeoX", "Gemma")),
        *(f"{name}Tokenizer" for name in ("InternLM2", "Llama", "Phi3", "PreTrained", "Qwen2", "T5", "XLMRoberta")),
        *("MistralCommonBackend", "PythonBackend", "SentencePieceBackend", "TokenizersBackend"),
    }
)
_GENERAL_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is


class DecoderSizes(NamedTuple):
    """Sizes that a runtime needs; `in_place`: past and present may share one buffer."""

    vocabulary: int
    context: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    in_place: bool

    @classmethod
    def of(cls, model: DecoderGraph) -> Self:
        """Return the sizes of a graph that edgetune builds."""
        decoder = model.decoder
        first = decoder.blocks[0].attention
        sizes = decoder.vocabulary, decoder.context, decoder.hidden, len(decoder.blocks)
        return cls(*sizes, first.heads, first.kv_heads, first.head_dim, model.in_place)


def genai_config(sizes: DecoderSizes, ends: SpecialTokenIds) -> dict[str, Any]:
    """Return the contents of the file. onnxruntime-genai requires a pad token: by default the first stop token."""
    pad = ends.pad if ends.pad is not None else ends.stops[0]
    stops: Any = list(ends.stops) if len(ends.stops) > 1 else ends.stops[0]
    return {
        "model": {
            "type": _TYPE,
            "vocab_size": sizes.vocabulary,
            "context_length": sizes.context,
            **({} if ends.bos is None else {"bos_token_id": ends.bos}),
            "eos_token_id": stops,
            "pad_token_id": pad,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": sizes.hidden,
                "head_size": sizes.head_size,
                "num_attention_heads": sizes.heads,
                "num_key_value_heads": sizes.kv_heads,
                "num_hidden_layers": sizes.layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": _search(sizes),
    }


def _search(sizes: DecoderSizes) -> dict[str, Any]:
    """Return greedy search; except for the length, these are the defaults.

    Runtimes that share one buffer between past and present reserve it for `max_length` tokens at once, so the length is
    bounded as in `edgetune run`; callers can set a larger one, up to `context_length`.
    """
    return {
        "do_sample": False,
        "max_length": min(sizes.context, _SEARCH_LENGTH),
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": sizes.in_place,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }


def set_tokenizer_class(folder: Path) -> None:
    """Name a class that onnxruntime-genai reads in a copied tokenizer_config.json, where it names another one."""
    if (folder / _TOKENIZER).is_file() and (name := _unread_class(folder)):
        path = folder / _TOKENIZER_CONFIG
        stated = re.compile(rb'("tokenizer_class"\s*:\s*)' + re.escape(json.dumps(name)).encode())
        general = json.dumps(_GENERAL_CLASS).encode()
        path.write_bytes(stated.sub(lambda found: found[1] + general, path.read_bytes(), count=1))


def tokenizer_remarks(directory: Path, template: str) -> list[str]:
    """Return what onnxruntime-genai does otherwise than the tokenizer of a directory; `template`: the chat template."""
    if not (directory / _TOKENIZER).is_file():
        return []
    remarks = []
    if name := _unread_class(directory):
        remarks.append(
            f"{_TOKENIZER_CONFIG} names the class {name}, which onnxruntime-genai does not read: the copy names "
            f"{_GENERAL_CLASS}, which reads the same {_TOKENIZER}"
        )
    stated = read_json(directory / _TOKENIZER)
    first = _token_in_front(stated)
    if first and "bos_token" not in template and first not in template:
        remarks.append(
            f"onnxruntime-genai does not put {first} before a text, as {_TOKENIZER} does: write it into the prompt"
        )
    if _prepends(stated.get("normalizer")):
        remarks.append(
            f"onnxruntime-genai does not put a space before a text, as {_TOKENIZER} does: its token ids differ there"
        )
    return remarks


def _unread_class(directory: Path) -> str | None:
    path = directory / _TOKENIZER_CONFIG
    name = read_json(path).get("tokenizer_class") if path.is_file() else None
    return name if isinstance(name, str) and name.removesuffix("Fast") not in _CLASSES else None


def _token_in_front(stated: dict[str, Any]) -> str | None:
    """The special token that the post-processor puts before a single text."""
    processor = stated.get("post_processor") or {}
    for part in (processor, *(processor.get("processors") or [])):
        single = part.get("single") or []
        token = single[0].get("SpecialToken") if single and isinstance(single[0], dict) else None
        if isinstance(token, dict):
            return str(token.get("id"))
    return None


def _prepends(normalizer: Any) -> bool:
    """Whether a normalizer puts something before each text."""
    if not isinstance(normalizer, dict):
        return False
    return normalizer.get("type") == "Prepend" or any(map(_prepends, normalizer.get("normalizers") or []))
