"""Run exported files on the CPU: one abstract `Runtime`, with llama.cpp and ONNX Runtime behind it.

`load(path)` opens a file with the library that runs its format. Nothing outside this package asks which library that
is.
"""

from __future__ import annotations

from edgetune.errors import RuntimeNotice, RuntimeProblem
from edgetune.runtime.batching import Completion, Finish
from edgetune.runtime.generation_request import GenerationRequest, Grammar, TokenEvent, Usage
from edgetune.runtime.interface import NoChatTemplate, Runtime
from edgetune.runtime.loading import load
from edgetune.runtime.sampling import Sampling
from edgetune.runtime.text import Answer, Generation, Timing
from edgetune.runtime.ticket import Ticket

__all__ = [
    "Answer", "Completion", "Finish", "Generation", "GenerationRequest", "Grammar", "NoChatTemplate", "Runtime",
    "RuntimeNotice", "RuntimeProblem", "Sampling", "Ticket", "Timing", "TokenEvent", "Usage", "load",
]  # fmt: skip
