"""Storage types set by the user, with llama-quantize's names and meaning.

`--tensor-type REGEX=TYPE` is searched in tensor names, and the first match counts. `--output-tensor-type` sets the
output matrix, or the embedding where that serves as output. `--token-embedding-type` sets the embedding and takes
precedence over both. One-dimensional tensors always stay in f32.
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
    """One override: `text` is the option as the user wrote it, `type` the storage type."""

    text: str
    type: str
    pattern: re.Pattern[str] | None = None

    def matches(self, name: str) -> bool:
        """Whether the pattern matches this tensor name."""
        return self.pattern is not None and self.pattern.search(name) is not None


@dataclass(frozen=True)
class Overrides:
    """All overrides of one export. Make them with `overrides_of`, which checks them."""

    tensors: tuple[Override, ...] = ()
    output: Override | None = None
    embedding: Override | None = None

    @property
    def texts(self) -> list[str]:
        """The options as the user wrote them."""
        return [item.text for item in (*self.tensors, self.output, self.embedding) if item is not None]

    def find(self, slot: str, name: str, tied: bool) -> Override | None:
        """Return the override of a tensor, None where the recipe decides. `tied`: the embedding serves as output."""
        if slot == slots.EMBEDDING and self.embedding:
            return self.embedding
        if slot == slots.OUTPUT and self.output:
            return self.output
        named = next((item for item in self.tensors if item.matches(name)), None)
        return named or (self.output if tied and slot == slots.EMBEDDING else None)

    def check_matches(self, matrices: Sequence[str], vectors: Sequence[str]) -> None:
        """Raise RecipeError when a pattern matches no tensor that could have another type."""
        for item in self.tensors:
            if any(map(item.matches, matrices)):
                continue
            vector = next(filter(item.matches, vectors), None)
            if vector:
                raise RecipeError(f"{item.text}: it matches only vectors such as {vector}, which stay in f32")
            raise RecipeError(
                f"{item.text}: it matches no tensor of this model",
                "Tensors are named as in the GGUF file, such as blk.0.attn_v.weight; --dry-run lists them",
            )


NONE = Overrides()


def overrides_of(
    tensor_types: Iterable[str] = (), output_tensor_type: str | None = None, token_embedding_type: str | None = None
) -> Overrides:
    """Parse overrides as written on the command line. Raises RecipeError naming the unusable one."""
    return Overrides(
        tuple(_tensor_type(text) for text in tensor_types),
        _named("--output-tensor-type", output_tensor_type),
        _named("--token-embedding-type", token_embedding_type),
    )


def _named(option: str, type_name: str | None) -> Override | None:
    return None if type_name is None else Override(f"{option} {type_name}", _storage_type(option, type_name))


def _tensor_type(text: str) -> Override:
    pattern, separator, type_name = text.rpartition("=")
    option = f"--tensor-type {text}"
    if not separator or not pattern or not type_name:
        raise RecipeError(f"{option} is not of the form REGEX=TYPE", "For instance --tensor-type attn_v=q8_0")
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise RecipeError(f"{option}: {pattern!r} is not a regular expression: {error}") from error
    return Override(option, _storage_type(option, type_name), compiled)


def _storage_type(option: str, type_name: str) -> str:
    lower = type_name.strip().lower()
    known = edgetune_native.types()
    if lower in known:
        return lower
    tensors_only = "a tensor has a storage type such as q4_k, a mix such as q4_k_m is of a whole file; "
    raise RecipeError(
        f"{option}: {type_name!r} is not a type of a tensor",
        (tensors_only if lower.endswith(("_k_s", "_k_m", "_k_l")) else "") + f"known: {', '.join(known)}",
    )
