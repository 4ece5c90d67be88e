"""genai_config.json, which onnxruntime-genai reads to run a graph."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from edgetune_converters.onnx.model import DecoderGraph
from edgetune_converters.tokenizers.special import SpecialTokenIds

# model type of onnxruntime-genai for a plain decoder with this interface
_TYPE = "llama"
_SEARCH_LENGTH = 4096  # prompt and answer; the cache of a context of 128k tokens would take gigabytes


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
