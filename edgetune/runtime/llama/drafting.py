"""Where the loop in C takes its guesses from: a table of n-grams beside the file, and a draft model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import edgetune_native
from edgetune.errors import RuntimeNotice, RuntimeProblem
from edgetune.runtime.interface import Runtime
from edgetune.runtime.llama.context import LlamaContext
from edgetune.runtime.ngrams import NgramTable, path_beside, vocabulary_hash
from edgetune.runtime.slots import Speculation
from edgetune_converters.errors import ArtifactError

_TOKENS = "tokenizer.ggml.tokens"
_CACHED_BYTES = 256 << 20  # weights of less stay in the caches of some machines
_COSTS_IN_CACHE = (1.0, 1.9, 3.4, 7.0, 11.0, 21.0)  # measured: each row is as much work as the first
_COSTS_FROM_MEMORY = (1.0, 1.1, 1.3, 1.9, 3.5, 6.5)  # reading the weights is most of the work


class Drafting:
    """A table, a draft model in its own context, or both."""

    def __init__(
        self, table: NgramTable | None, model: Runtime | None = None, context: LlamaContext | None = None
    ) -> None:
        """Take over a model and its context."""
        self._table, self._model, self._context = table, model, context

    @classmethod
    def make(
        cls, path: Path, metadata: Mapping[str, Any], speculation: Speculation,
        open_draft: Callable[[Path], tuple[Runtime, LlamaContext]],
    ) -> Self | None:  # fmt: skip
        """Return what a file and the settings give; None if that is nothing.

        Raises:
            RuntimeProblem: The draft model has another vocabulary, or cannot be opened.
        """
        table = read_table(path, metadata) if speculation.uses_table else None
        if speculation.draft is None:
            return cls(table) if table else None
        if not speculation.draft.is_file():
            raise RuntimeProblem(f"there is no draft model {speculation.draft}", "Give a GGUF file with --draft")
        model, context = open_draft(speculation.draft)
        found = cls(table, model, context)
        if vocabulary_hash(model.metadata.get(_TOKENS, ())) != vocabulary_hash(metadata.get(_TOKENS, ())):
            found.close()
            raise RuntimeProblem(
                f"the draft model {speculation.draft} has another vocabulary than {path}",
                "Give a smaller model of the same family",
            )
        return found

    def install(self, loop: edgetune_native.LlamaSlots) -> None:
        """State the sources to the loop."""
        if self._table:
            loop.set_table(self._table.cells, self._table.longest)
        if self._context:
            loop.set_draft_model(self._context.address)

    def close(self) -> None:
        """Free the draft model."""
        if self._context:
            self._context.close()
        if self._model:
            self._model.close()


def assumed_costs(size: int) -> tuple[float, ...]:
    """Return the time of batches of several rows, relative to the first, for a file of as many bytes."""
    return _COSTS_IN_CACHE if size < _CACHED_BYTES else _COSTS_FROM_MEMORY


def read_table(path: Path, metadata: Mapping[str, Any]) -> NgramTable | None:
    """Return the table of n-grams beside a file, if it has one and that fits; one that does not is warned of."""
    beside = path_beside(path)
    if not beside.is_file():
        return None
    try:
        table = NgramTable.read(beside)
        if table.vocabulary == vocabulary_hash(metadata.get(_TOKENS, ())):
            return table
        problem = f"{beside} is of another vocabulary than {path}"
    except (ArtifactError, OSError) as error:
        problem = str(error)
    warnings.warn(RuntimeNotice(f"{problem}; no tokens are guessed from it"), stacklevel=2)
    return None
