"""LLaMA Pro: copies of blocks are inserted and trained alone (arXiv:2401.02415)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Facts
from edgetune.methods.freeze import Freeze
from edgetune.methods.selective import NO_LOW_RANK, SelectiveMethod


class LlamaPro(SelectiveMethod):
    """LLaMA Pro: new blocks, which change nothing at first, are inserted and trained alone (arXiv:2401.02415)."""

    facts: ClassVar[Facts] = Facts(
        "LLaMA Pro",
        "arXiv:2401.02415",
        "selective",
        None,
        not_on={8: "its new blocks are copies in 32 bits, and int8 weights are not dequantized for them"},
        not_as={"gguf-lora": NO_LOW_RANK},
    )

    kind: Literal["llama-pro"] = "llama-pro"
    """The method."""
    new_blocks: Annotated[int, Field(ge=1)] = 1
    """Number of new blocks. The blocks of the base are divided into as many groups of equal size, and each group is
    followed by a copy of its last block, whose output matrices are zero."""

    def count_in(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the weights of as many blocks of the base."""
        return Freeze(layers=1).count_in(shapes) * self.new_blocks
