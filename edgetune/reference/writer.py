"""Write a reference block by block. It appears as a whole, by a rename; with a key, a stopped capture is resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgetune.errors import RunDirectoryError
from edgetune.reference.codecs import F32, I64, Codec, Columns, FullVocabulary, TopK
from edgetune.reference.manifest import HINT, ReferenceManifest
from edgetune.reference.partial import PartialReference
from edgetune.reference.scored_rows import ScoredRows

_TRAINED = "trained."


class ReferenceWriter:
    """Writes a reference directory; a context manager that publishes on success and leaves nothing on failure."""

    def __init__(
        self,
        directory: Path,
        rows: ScoredRows,
        *,
        vocab_size: int,
        full_vocabulary_limit: int,
        top_k: int,
        info: Mapping[str, Any],
        key: str | None = None,
    ) -> None:
        """Start a reference, or resume one.

        Args:
            directory: The reference directory to publish.
            rows: The held-out rows.
            vocab_size: V, the size of the vocabulary.
            full_vocabulary_limit: The largest V for which all log-probabilities are stored; else the top k are.
            top_k: k.
            info: Facts about the capture (device, dtype, ...).
            key: Everything that determines the result. A writer that was stopped is resumed by one with the same key.

        Raises:
            RunDirectoryError: No token is scored, or a token is outside the vocabulary.
        """
        if not len(rows.positions):
            raise RunDirectoryError("the held-out rows have no token to score", "Give data.validation more rows")
        if rows.tokens.min() < 0 or rows.tokens.max() >= vocab_size:
            raise RunDirectoryError(f"a held-out row has a token outside the vocabulary of {vocab_size}", HINT)
        self.rows = rows
        self.vocab_size = vocab_size
        self.codec: Codec = FullVocabulary() if vocab_size <= full_vocabulary_limit else TopK(min(top_k, vocab_size))
        self._header: dict[str, Any] = {"info": dict(info), "contract": [], "greedy": [], "task": None}
        self._targets = rows.targets
        self._partial = PartialReference(directory, key)
        self._trained = self._base = self._partial.positions
        for name in ("tokens", "row_offsets", "positions"):
            values = getattr(rows, name)
            self._partial.append({name: values}, len(values))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._partial.key is None or issubclass(kind, RunDirectoryError):
            self._partial.remove()
        else:  # an interrupt, or an error that may not occur the next time
            self._partial.close()

    @property
    def done(self) -> int:
        """The number of scored positions, from the first on, that both models have."""
        return min(self._trained, self._base)

    @property
    def answers_file(self) -> Path | None:
        """Where answers are kept until the reference is complete; None for a writer without a key."""
        return self._partial.answers_file

    def checkpoint(self) -> None:
        """Store the progress. Both models must have the same positions."""
        assert self._trained == self._base
        self._partial.checkpoint(self._trained)

    def add_trained(self, logits: F32) -> None:
        """Add the trained model's logits [m, V] at the next m positions."""
        logits, targets = self._check(logits, self._trained, "trained")
        columns = self.codec.encode(logits)
        exact = self.codec.compare(columns, logits, targets, 0)
        self._append({f"{_TRAINED}{name}": column for name, column in columns.items()})
        top, floor = exact.top.astype(np.int32), exact.kld.astype(np.float32)
        self._append({"trained_nll": exact.nll, "trained_top": top, "trained_floor": floor})
        self._trained += len(logits)

    def add_base(self, logits: F32) -> None:
        """Add the base's logits [m, V] at the next m positions; KLD is NaN where the trained ones are missing."""
        logits, targets = self._check(logits, self._base, "base")
        has_trained = self._trained >= self._base + len(logits)
        stored = self._partial.read(_TRAINED, self._base, len(logits)) if has_trained else self.codec.encode(logits)
        compared = self.codec.compare(stored, logits, targets, 0)
        kld = compared.kld if has_trained else np.full(len(logits), np.nan)
        self._append({"base_nll": compared.nll, "base_top": compared.top.astype(np.int32), "base_kld": kld})
        self._base += len(logits)

    def mean_nll(self, rows: int) -> dict[str, float]:
        """Return the mean negative log-likelihood of both models, in nats per scored token of the first `rows` rows."""
        count = len(self.rows.first(rows).positions)
        columns = self._partial.columns
        return {name: float(columns[f"{name}_nll"].read(0, count).mean()) for name in ("base", "trained")}

    def set_contract(self, conversations: Sequence[Mapping[str, Any]]) -> None:
        """Set the golden conversations: {"messages", "add_generation_prompt", "text", "ids"} of the training side."""
        self._header["contract"] = [dict(conversation) for conversation in conversations]

    def set_summary(self, results: Mapping[str, Any]) -> None:
        """Set the results of the capture (manifest.ReferenceSummary). The same work must give the same figures."""
        self._header["summary"] = dict(results)

    def set_task(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Set the rows with a checkable answer (manifest.Task); `kind` as in data.answer."""
        self._header["task"] = {"kind": kind, "rows": [dict(row) for row in rows]}

    def set_greedy(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Set the trained model's greedy answers: {"prompt", "answer" (ids), "stopped"}."""
        self._header["greedy"] = [dict(answer) for answer in answers]

    def close(self) -> None:
        """Publish the directory.

        Raises:
            RunDirectoryError: Positions are missing; nothing is left then.
        """
        for name, count in (("trained", self._trained), ("base", self._base)):
            if count != len(self._targets):
                self._partial.remove()
                raise RunDirectoryError(
                    f"the {name} model was captured at {count} of {len(self._targets)} positions", HINT
                )
        header = self._header | {"vocab_size": self.vocab_size, "coding": self.codec.name, "files": {}}
        self._partial.publish(ReferenceManifest.model_validate({"version": ReferenceManifest.NEWEST, **header}))

    def abort(self) -> None:
        """Remove what was written; an earlier reference stays."""
        self._partial.remove()

    def _append(self, columns: Columns) -> None:
        self._partial.append(columns, len(self._targets))

    def _check(self, logits: F32, done: int, name: str) -> tuple[F32, I64]:
        logits = np.ascontiguousarray(logits, np.float32)
        if logits.ndim != 2 or logits.shape[1] != self.vocab_size or done + len(logits) > len(self._targets):
            raise ValueError(f"{name}: logits of shape {logits.shape}, {len(self._targets) - done} positions are left")
        if not np.isfinite(logits.max(axis=1)).all():
            raise RunDirectoryError(
                f"the {name} model's output is not a finite number", "Training has diverged: lower the learning rate"
            )
        return logits, self._targets[done : done + len(logits)]
