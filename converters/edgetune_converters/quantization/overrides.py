"""Types that the user sets by hand, with the names and the meaning of llama-quantize.

`--tensor-type REGEX=TYPE` is searched for in tensor names, the first that is found counts; `--output-tensor-type` is
the output matrix, or the embedding where that serves as the output; `--token-embedding-type` is the embedding and goes
before both. Tensors of one dimension stay in f32 whatever is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import edgetune_native
from edgetune_converters.architectures import slots
from edgetune_converters.errors import RecipeError


@dataclass(frozen=True)
class Override:
    """One choice: `text` is how the user wrote it, `type` what it asks for."""

    text: str
    type: str
    pattern: re.Pattern[str] | None = None

    def matches(self, name: str) -> bool:
        """Whether a tensor of this name is meant."""
        return self.pattern is not None and self.pattern.search(name) is not None


@dataclass(frozen=True)
class Overrides:
    """All choices of one export. Made by `overrides_of`, which checks them."""

    tensors: tuple[Override, ...] = ()
    output: Override | None = None
    embedding: Override | None = None

    @property
    def texts(self) -> list[str]:
        """The choices as they were written."""
        return [item.text for item in (*self.tensors, self.output, self.embedding) if item is not None]

    def find(self, slot: str, name: str, tied: bool) -> Override | None:
        """What was chosen for a tensor, None where the recipe decides. `tied`: the embedding serves as the output."""
        if slot == slots.EMBEDDING and self.embedding:
            return self.embedding
        if slot == slots.OUTPUT and self.output:
            return self.output
        named = next((item for item in self.tensors if item.matches(name)), None)
        return named or (self.output if tied and slot == slots.EMBEDDING else None)

    def check_matches(self, matrices: Sequence[str], vectors: Sequence[str]) -> None:
        """Errors: RecipeError when a pattern matches no tensor that could have another type."""
        for item in self.tensors:
            if any(map(item.matches, matrices)):
                continue
            vector = next(filter(item.matches, vectors), None)
            if vector:
                raise RecipeError(f"{item.text}: it matches only vectors such as {vector}, which stay in f32")
            raise RecipeError(
                f"{item.text}: it matches no tensor of this model",
                "Tensors are named as in the GGUF file, such as blk.0.attn_v.weight; --plan lists them",
            )


NONE = Overrides()


def overrides_of(
    tensor_types: Iterable[str] = (), output_tensor_type: str | None = None, token_embedding_type: str | None = None
) -> Overrides:
    """Overrides as they are written on the command line. Errors: RecipeError naming the one that cannot be used."""
    return Overrides(
        tuple(_tensor_type(text) for text in tensor_types),
        _named("--output-tensor-type", output_tensor_type),
        _named("--token-embedding-type", token_embedding_type),
    )


def _named(option: str, type_name: str | None) -> Override | None:
    return None if type_name is None else Override(f"{option} {type_name}", _storage_type(option, type_name))


def _tensor_type(text: str) -> Override:
    pattern, separator, type_name = text.rpartition("=")
    said = f"--tensor-type {text}"
    if not separator or not pattern or not type_name:
        raise RecipeError(f"{said} is not of the form REGEX=TYPE", "For instance --tensor-type attn_v=q8_0")
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise RecipeError(f"{said}: {pattern!r} is not a regular expression: {error}") from error
    return Override(said, _storage_type(said, type_name), compiled)


def _storage_type(said: str, type_name: str) -> str:
    lower = type_name.strip().lower()
    known = edgetune_native.types()
    if lower in known:
        return lower
    tensors_only = "a tensor has a storage type such as q4_k, a mix such as q4_k_m is of a whole file; "
    raise RecipeError(
        f"{said}: {type_name!r} is not a type of a tensor",
        (tensors_only if lower.endswith(("_k_s", "_k_m", "_k_l")) else "") + f"known: {', '.join(known)}",
    )
