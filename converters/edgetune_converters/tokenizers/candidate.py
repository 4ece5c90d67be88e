"""One way of writing a tokenizer as a vocabulary of llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgetune_converters.gguf.values import Value
from edgetune_converters.tokenizers.normalization import NormalForm, Space


@dataclass(frozen=True)
class Candidate:
    """A model and pre-tokenizer of llama.cpp, their metadata, and the normalization before them.

    `limits` are known reasons why some ids may differ; without one, a difference is an error.
    """

    model: str
    pre: str
    metadata: dict[str, Value] = field(default_factory=dict)
    form: NormalForm = ""
    space: Space = ""
    limits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
