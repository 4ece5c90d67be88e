"""A soft prompt in the vocabulary of an exported file, which a runtime evaluates before every text.

The chat template of such a file begins with the soft tokens, for programs that know nothing of them. Here they are
taken off it: template, ids and positions are those of training, and the tokens stand in the cache before each text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data.chat import ChatTemplate
from edgetune.errors import RuntimeProblem
from edgetune_converters.gguf import keys
from edgetune_converters.tokenizers.chat_files import DEFAULT, TOOL_USE


@dataclass(frozen=True)
class SoftPrompt:
    """The place of a soft prompt in a vocabulary."""

    first: int
    """Id of the first soft token."""
    count: int
    added: int
    """Soft tokens behind the rows of the base; their logits are no part of the distribution that was trained."""
    adds_bos: bool
    """Whether the tokenizer of training adds BOS to a text."""
    with_bos: tuple[str, ...] = ()
    """Names of the chat templates in which BOS was written behind the soft tokens."""

    @property
    def ids(self) -> NDArray[np.int32]:
        """The soft tokens [count]."""
        return np.arange(self.first, self.first + self.count, dtype=np.int32)

    def plain_template(self, template: ChatTemplate | None, texts: str) -> ChatTemplate | None:
        """Return the template as it was in training; `texts` are those of the soft tokens."""
        if template is None:
            return None
        bos = template.bos_token or ""
        default, tools = (texts + bos * (name in self.with_bos) for name in (DEFAULT, TOOL_USE))
        tool_use = template.tool_use and template.tool_use.removeprefix(tools)
        return replace(template, source=template.source.removeprefix(default), tool_use=tool_use)


def read_soft_prompt(metadata: Mapping[str, Any], rows: int) -> SoftPrompt | None:
    """Return the soft prompt that the metadata of a file state; None without one.

    Args:
        metadata: Metadata of the file.
        rows: Rows of its vocabulary.

    Raises:
        RuntimeProblem: It cannot be read.
    """
    text = metadata.get(keys.SOFT_PROMPT)
    if text is None:
        return None
    try:
        stated = json.loads(text)
        found = SoftPrompt(**{**stated, "with_bos": tuple(stated.get("with_bos", ()))})
        numbers = (found.first, found.count, found.added)
        if (
            any(type(number) is not int or number < 0 for number in numbers)
            or not 0 < found.count <= rows - found.first
        ):
            raise ValueError(f"{found.count} tokens from {found.first} on are not in a vocabulary of {rows}")
        if found.added > found.count:
            raise ValueError(f"{found.added} of {found.count} tokens are added")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RuntimeProblem(
            f"{keys.SOFT_PROMPT} of the file cannot be read: {error}", "Export the file again"
        ) from None
    return found
