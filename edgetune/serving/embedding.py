"""Embeddings of texts: the mean of the last hidden states, of length 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import EdgetuneError
from edgetune.serving.api_errors import bad_request, from_problem
from edgetune.serving.calls import Call
from edgetune.serving.conversation import TokenUsage
from edgetune.serving.loaded_files import ModelUse
from edgetune.serving.worker_threads import run_in_thread

F32 = NDArray[np.float32]


async def embed_inputs(
    call: Call[Any], model: ModelUse, inputs: Sequence[str | list[int]], dimensions: int | None, *, cut: bool = False
) -> tuple[list[F32], int]:
    """Return the embeddings of texts or token ids, and how many tokens they have.

    Args:
        call: The request.
        model: The model.
        inputs: Texts or token ids.
        dimensions: Leading values to keep; None: all.
        cut: Whether a text that is too long is cut instead of refused.
    """
    if model.adapters:
        raise bad_request(f"embeddings are made without adapters; name {model.file.name}", "model")
    runtime = model.runtime
    vectors, tokens = [], 0
    for index, given in enumerate(inputs):
        name = "input" if len(inputs) == 1 else f"input.{index}"
        try:
            ids = await run_in_thread(runtime.tokenize, given) if isinstance(given, str) else given
            if not ids:
                raise bad_request(f"{name} is empty", name)
            if cut:
                ids = ids[: runtime.context]
            vector = await run_in_thread(runtime.embed, ids)
        except EdgetuneError as problem:
            raise from_problem(problem, name) from None
        if dimensions is not None and dimensions > len(vector):
            raise bad_request(f"dimensions is {dimensions}, but the model has {len(vector)}", "dimensions")
        vector = vector[:dimensions]
        vectors.append(vector / max(float(np.linalg.norm(vector)), 1e-12))
        tokens += len(ids)
    call.server.metrics.count_tokens(TokenUsage(tokens))
    return vectors, tokens
