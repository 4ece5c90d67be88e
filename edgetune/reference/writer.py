"""Writing a reference: one block of logits at a time, whole or not at all, and resumable where it has a key."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgetune.errors import RunDirectoryError
from edgetune.reference.codecs import F32, I64, Codec, Columns, Comparison, FullVocabulary, TopK
from edgetune.reference.npy_stream import NpyStream
from edgetune.reference.scored_rows import ScoredRows
from edgetune.runs.json_format import write_json

VERSION = 1
MANIFEST = "reference.json"
PROGRESS = "progress.json"
ANSWERS = "answers.json"
_CAPTURED = ("trained", "base_")  # names of the columns that grow with the work
HINT = "Write it anew with `edgetune reference RUN`, or train again (`--resume` goes on)."


def stopped_directory(directory: Path) -> Path:
    """Where a writer with a key works on the reference `directory`."""
    return directory.with_name(f"{directory.name}.stopped.partial")


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
        """`info` is free (device, dtype, ...). Raises RunDirectoryError when no token is scored.

        `key` names everything that has a say in the result. With one, what a stopped writer of the same key left is
        taken up: `done` says how much of it there is.
        """
        if not len(rows.positions):
            raise RunDirectoryError("the held-out rows have no token to score", "Give data.validation more rows.")
        if rows.tokens.min() < 0 or rows.tokens.max() >= vocab_size:
            raise RunDirectoryError(f"a held-out row has a token outside the vocabulary of {vocab_size}", HINT)
        self.directory = directory
        self.rows = rows
        self.vocab_size = vocab_size
        self.coding: Codec = FullVocabulary() if vocab_size <= full_vocabulary_limit else TopK(min(top_k, vocab_size))
        self._header: dict[str, Any] = {"info": dict(info), "contract": [], "greedy": [], "task": None}
        self._targets = rows.targets
        self._key = key
        own = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
        self._partial = own if key is None else stopped_directory(directory)
        self._files: dict[str, NpyStream] = {}
        self._trained = self._base = self._take_up()
        if not self._trained:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        for name in ("tokens", "row_offsets", "positions"):
            self._append({name: getattr(rows, name)}, total=len(getattr(rows, name)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._key is None or (kind is not None and issubclass(kind, RunDirectoryError)):
            self.abort()
        else:  # an interrupt, or something that may go better next time
            self._close_files()

    @property
    def done(self) -> int:
        """Scored positions, from the first on, that are there for both models."""
        return min(self._trained, self._base)

    def _take_up(self) -> int:
        """How many positions an earlier writer of this key has left, after reopening its columns."""
        progress = self._partial / PROGRESS
        if self._key is None or not progress.is_file():
            return 0
        try:
            found = json.loads(progress.read_text(encoding="utf-8"))
            if found["key"] != self._key:
                return 0
            count = int(found["positions"])
            for name in found["columns"]:
                self._files[name] = NpyStream.reopen(self._partial / f"{name}.npy", count)
        except (ValueError, KeyError, TypeError, OSError):
            self._close_files()
            self._files = {}
            return 0
        return count

    def checkpoint(self) -> None:
        """From here on a writer of the same key goes on. Both models must have been added up to the same position."""
        assert self._trained == self._base
        if self._key is None:
            return
        columns = [name for name in self._files if name.startswith(_CAPTURED)]
        for name in columns:
            self._files[name].flush()
        write_json(self._partial / PROGRESS, {"key": self._key, "positions": self._trained, "columns": columns})

    @property
    def answers_file(self) -> Path | None:
        """Where answers may be kept until the reference is whole; None for a writer without a key."""
        return None if self._key is None else self._partial / ANSWERS

    def add_trained(self, logits: F32) -> None:
        """The trained model's logits [m, V] at the next m positions."""
        logits, targets = self._checked(logits, self._trained, "trained")
        columns = self.coding.encode(logits)
        exact = self.coding.compare(columns, logits, targets, 0)
        self._append({f"trained.{name}": column for name, column in columns.items()})
        top = exact.top.astype(np.int32)
        self._append({"trained_nll": exact.nll, "trained_top": top, "trained_floor": _floor(exact)})
        self._trained += len(logits)

    def add_base(self, logits: F32) -> None:
        """The base model's logits [m, V] at the next m positions; compared with the trained ones if they are there."""
        logits, targets = self._checked(logits, self._base, "base")
        compared = self.coding.compare(self._stored(self._base, logits), logits, targets, 0)
        known = self._trained >= self._base + len(logits)
        kld = compared.kld if known else np.full(len(logits), np.nan)
        self._append({"base_nll": compared.nll, "base_top": compared.top.astype(np.int32), "base_kld": kld})
        self._base += len(logits)

    def mean_nll(self, rows: int) -> dict[str, float]:
        """Mean negative log-likelihood of both models, in nats per scored token of the first `rows` rows."""
        count = len(self.rows.first(rows).positions)
        return {which: float(self._files[f"{which}_nll"].read(0, count).mean()) for which in ("base", "trained")}

    def set_contract(self, conversations: Sequence[Mapping[str, Any]]) -> None:
        """Golden conversations: {"messages", "add_generation_prompt", "text", "ids"} as the training side has them."""
        self._header["contract"] = [dict(conversation) for conversation in conversations]

    def set_summary(self, results: Mapping[str, Any]) -> None:
        """What was found, in figures: the results of this stage. The same work must give the same figures."""
        self._header["summary"] = dict(results)

    def set_task(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with a checkable answer: {"messages", "expected", "base", "trained"}; `kind` as in data.answer."""
        self._header["task"] = {"kind": kind, "rows": [dict(row) for row in rows]}

    def set_greedy(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """What the trained model answers: {"prompt", "answer" (ids), "stopped"}."""
        self._header["greedy"] = [dict(answer) for answer in answers]

    def close(self) -> None:
        """Publish the directory. Raises RunDirectoryError, and leaves nothing, when positions are missing."""
        for which, count in (("trained", self._trained), ("base", self._base)):
            if count != len(self._targets):
                self.abort()
                raise RunDirectoryError(
                    f"the {which} model was captured at {count} of {len(self._targets)} positions", HINT
                )
        self._header |= {"version": VERSION, "vocab_size": self.vocab_size, "coding": self.coding.name}
        self._header["files"] = {name: column.finish() for name, column in self._files.items()}
        header = json.loads(json.dumps(self._header))  # as it will be read: tuples are lists, keys are strings
        write_json(self._partial / MANIFEST, {**header, "digest": digest_of(header)})
        for name in (PROGRESS, ANSWERS):
            (self._partial / name).unlink(missing_ok=True)
        _replace(self._partial, self.directory)

    def abort(self) -> None:
        """Remove what was written; an earlier reference stays."""
        self._close_files()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _close_files(self) -> None:
        for column in self._files.values():
            column.stream.close()

    def _checked(self, logits: F32, done: int, which: str) -> tuple[F32, I64]:
        logits = np.ascontiguousarray(logits, np.float32)
        if logits.ndim != 2 or logits.shape[1] != self.vocab_size or done + len(logits) > len(self._targets):
            raise ValueError(f"{which}: logits of shape {logits.shape}, {len(self._targets) - done} positions are left")
        if not np.isfinite(logits.max(axis=1)).all():
            raise RunDirectoryError(
                f"the {which} model's output is not a finite number", "Training has diverged: lower the learning rate."
            )
        return logits, self._targets[done : done + len(logits)]

    def _append(self, columns: Columns, total: int | None = None) -> None:
        for name, values in columns.items():
            if name not in self._files:
                shape = (len(self._targets) if total is None else total, *values.shape[1:])
                self._files[name] = NpyStream(self._partial / f"{name}.npy", values.dtype, shape)
            self._files[name].append(values)

    def _stored(self, start: int, logits: F32) -> Columns:
        """The trained model's columns at these positions; where they are not there yet, the logits' own."""
        if self._trained < start + len(logits):
            return self.coding.encode(logits)
        prefix = "trained."
        columns = {name: column for name, column in self._files.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): column.read(start, len(logits)) for name, column in columns.items()}


def _floor(exact: Comparison) -> F32:
    """What coding alone costs: KL(stored || the logits that were stored), in nats."""
    return np.asarray(exact.kld, np.float32)


def digest_of(header: Mapping[str, Any]) -> str:
    """One hash of a manifest."""
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _replace(new: Path, directory: Path) -> None:
    """Put `new` in the place of `directory`, which may exist."""
    old = directory.with_name(f"{directory.name}.{os.getpid()}.old.partial")
    if directory.exists():
        directory.replace(old)
    new.replace(directory)
    shutil.rmtree(old, ignore_errors=True)
