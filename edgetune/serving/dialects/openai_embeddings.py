"""OpenAI's embeddings."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from edgetune.serving.api_errors import openai_error
from edgetune.serving.calls import Call, RouteSpec
from edgetune.serving.dialects.openai_completions import Ids
from edgetune.serving.embedding import F32, embed_inputs
from edgetune.serving.request_fields import Fields

_MOST_INPUTS = 2048


class EmbeddingRequest(Fields):
    """The body of /v1/embeddings."""

    model: str | None = None
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_INPUTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=_MOST_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Any = None


async def embeddings(call: Call[EmbeddingRequest]) -> Any:
    """Return the embeddings of texts or token ids."""
    fields = call.fields
    model = await call.model(fields.model)
    given: Any = fields.input
    inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    vectors, tokens = await embed_inputs(call, model, inputs, fields.dimensions)
    data = [
        {"object": "embedding", "index": index, "embedding": _encode(vector, fields.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model.name, "usage": usage}


def _encode(vector: F32, form: str | None) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()
    return vector.tolist()


ROUTES = (RouteSpec("POST", "/v1/embeddings", embeddings, openai_error, EmbeddingRequest),)
