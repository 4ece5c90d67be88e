"""Trainable tokens: the rows of some tokens in the embedding are trained, of existing tokens or of new ones."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from edgetune.methods.base import Facts, Layers, Method


class TrainableTokens(Method):
    """Trainable tokens: the rows of some tokens in embedding and head are trained, of old tokens or of new ones."""

    facts: ClassVar[Facts] = Facts(
        "trainable tokens", "PEFT", "selective", "TRAINABLE_TOKENS",
        not_as={"gguf-lora": "it replaces rows of the embedding, which llama.cpp does not read from an adapter"},
    )  # fmt: skip

    kind: Literal["trainable-tokens"] = "trainable-tokens"
    """The PEFT method."""
    tokens: list[str] = []
    """Tokens of the base whose rows are trained."""
    new_tokens: list[str] = []
    """Texts that become tokens of their own. Their rows are trained; each starts as the mean of its former tokens."""
    new_special_tokens: list[str] = []
    """The same for special tokens, which are left out of the text that is shown."""

    @model_validator(mode="after")
    def _each_token_once(self) -> Self:
        named = [*self.tokens, *self.added]
        if twice := sorted({token for token in named if named.count(token) > 1}):
            raise ValueError(f"tokens, new_tokens and new_special_tokens name {twice[0]!r} twice")
        if any(not token or token != token.strip() for token in self.added):
            raise ValueError("a new token is empty, or begins or ends with a space")
        return self

    @property
    def added(self) -> tuple[str, ...]:
        """The new tokens, in the order of their ids."""
        return (*self.new_tokens, *self.new_special_tokens)

    def peft_options(self) -> dict[str, Any]:
        """Return no options: the ids of the tokens depend on the base."""
        return {}

    def count_trainable(self, layers: Layers) -> int:
        """Return 0: linear layers are not trained, and rows of tokens are few."""
        return 0

    @property
    def names_layers(self) -> bool:
        """Whether the options name what must be compared with the base."""
        return True
