"""The class of transformers that holds the network of a family with a score head: ...ForSequenceClassification."""

from __future__ import annotations

from edgetune_converters.architectures.model_types import MODEL_TYPES

# types of MODEL_TYPES for which transformers has no such class
_WITHOUT = frozenset({"granite", "granitemoe", "llama4_text", "cohere", "cohere2", "lfm2"})
_MULTIMODAL = {"Gemma3ForConditionalGeneration": "Gemma3ForSequenceClassification"}
_ENDS = ("ForCausalLM", "LMHeadModel")


def classifier_of(architecture: str) -> str | None:
    """Return the class for the first entry of `architectures` in config.json; None where transformers has none."""
    if architecture in _MULTIMODAL:
        return _MULTIMODAL[architecture]
    model_type = MODEL_TYPES.get(architecture)
    if model_type is None or model_type in _WITHOUT:
        return None
    stem = next(architecture.removesuffix(end) for end in _ENDS if architecture.endswith(end))
    stem = stem + "Text" if model_type.endswith("_text") else stem  # gemma3_text, beside the multimodal gemma3
    return f"{stem}ForSequenceClassification"
