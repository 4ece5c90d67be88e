"""What base and trained model say on held-out rows, stored so that an exported file can be compared with them later.

    reference/
      reference.json         version, coding, contract, task, and the SHA-256 of every other file
      tokens.npy row_offsets.npy positions.npy
      trained.*.npy          the trained model's distributions (edgetune/codings.py), streamed and memory-mapped
      trained_nll.npy trained_top.npy trained_floor.npy base_nll.npy base_top.npy base_kld.npy

A writer holds one block of logits at a time and the directory appears whole, by a rename, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgetune.codings import F32, F64, I64, Coding, Columns, Compared, FullVocabulary, TopK
from edgetune.errors import RunDirectoryError
from edgetune.run_directory import sha256_file, write_json

VERSION = 1
MANIFEST = "reference.json"
HINT = "Train again (or `--resume`), so that the reference is written anew."


@dataclass(frozen=True)
class Rows:
    """Held-out rows, one after the other, and which of their tokens are scored."""

    tokens: NDArray[np.int32]
    """[T] token ids of all rows."""
    row_offsets: I64
    """[n + 1] where each row starts in `tokens`; the last entry is T."""
    positions: I64
    """[P] increasing indices into `tokens`; tokens[p] is predicted from the tokens of its row before p."""

    def __post_init__(self) -> None:
        """ValueError for offsets or positions that contradict each other."""
        object.__setattr__(self, "tokens", np.ascontiguousarray(self.tokens, np.int32))
        object.__setattr__(self, "row_offsets", np.ascontiguousarray(self.row_offsets, np.int64))
        object.__setattr__(self, "positions", np.ascontiguousarray(self.positions, np.int64))
        offsets, positions = self.row_offsets, self.positions
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(self.tokens) or np.any(np.diff(offsets) < 1):
            raise ValueError("row_offsets must rise from 0 to the number of tokens")
        if len(positions) and (positions[0] < 0 or positions[-1] >= len(self.tokens) or np.any(np.diff(positions) < 1)):
            raise ValueError("positions must increase and lie within the tokens")
        if np.isin(positions, offsets).any():
            raise ValueError("the first token of a row is predicted from nothing and cannot be scored")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.row_offsets) - 1

    @property
    def targets(self) -> I64:
        """[P] the tokens that are predicted."""
        return self.tokens[self.positions].astype(np.int64)

    def __iter__(self) -> Iterator[tuple[NDArray[np.int32], I64, slice]]:
        """Each row: its ids, the scored positions within it, and where these stand among all P."""
        bounds = np.searchsorted(self.positions, self.row_offsets)
        for row in range(len(self)):
            start, stop = self.row_offsets[row], self.row_offsets[row + 1]
            scored = slice(int(bounds[row]), int(bounds[row + 1]))
            yield self.tokens[start:stop], self.positions[scored] - start, scored

    def first(self, count: int) -> Rows:
        """Only the first `count` rows."""
        end = self.row_offsets[min(count, len(self))]
        positions = self.positions[: np.searchsorted(self.positions, end)]
        return Rows(self.tokens[:end], self.row_offsets[: min(count, len(self)) + 1], positions)


class ReferenceWriter:
    """Writes a reference directory; a context manager that publishes on success and leaves nothing on failure."""

    def __init__(
        self,
        directory: Path,
        rows: Rows,
        *,
        vocab_size: int,
        full_vocabulary_limit: int,
        top_k: int,
        info: Mapping[str, Any],
    ) -> None:
        """`info` is free (device, dtype, ...). Raises RunDirectoryError when no token is scored."""
        if not len(rows.positions):
            raise RunDirectoryError("the held-out rows have no token to score", "Give data.validation more rows.")
        if rows.tokens.min() < 0 or rows.tokens.max() >= vocab_size:
            raise RunDirectoryError(f"a held-out row has a token outside the vocabulary of {vocab_size}", HINT)
        self.directory = directory
        self.rows = rows
        self.vocab_size = vocab_size
        self.coding: Coding = FullVocabulary() if vocab_size <= full_vocabulary_limit else TopK(min(top_k, vocab_size))
        self._header: dict[str, Any] = {"info": dict(info), "contract": [], "task": None}
        self._targets = rows.targets
        self._partial = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files: dict[str, _Column] = {}
        self._trained = self._base = 0
        for name in ("tokens", "row_offsets", "positions"):
            self._append({name: getattr(rows, name)}, total=len(getattr(rows, name)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

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

    def set_contract(self, conversations: Sequence[Mapping[str, Any]]) -> None:
        """Golden conversations: {"messages", "add_generation_prompt", "text", "ids"} as the training side has them."""
        self._header["contract"] = [dict(conversation) for conversation in conversations]

    def set_task(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with a checkable answer: {"messages", "expected", "base", "trained"}; `kind` as in data.answer."""
        self._header["task"] = {"kind": kind, "rows": [dict(row) for row in rows]}

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
        write_json(self._partial / MANIFEST, {**header, "digest": _digest(header)})
        _replace(self._partial, self.directory)

    def abort(self) -> None:
        """Remove what was written; an earlier reference stays."""
        for column in self._files.values():
            column.stream.close()
        shutil.rmtree(self._partial, ignore_errors=True)

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
                self._files[name] = _Column(self._partial / f"{name}.npy", values.dtype, shape)
            self._files[name].append(values)

    def _stored(self, start: int, logits: F32) -> Columns:
        """The trained model's columns at these positions; where they are not there yet, the logits' own."""
        if self._trained < start + len(logits):
            return self.coding.encode(logits)
        prefix = "trained."
        columns = {name: column for name, column in self._files.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): column.read(start, len(logits)) for name, column in columns.items()}


class _Column:
    """A .npy file of known final shape that is written in pieces."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.path = path
        self.dtype = dtype
        self.shape = shape
        self.stream = path.open("w+b")
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.stream, description)
        self._data = self.stream.tell()

    def append(self, values: NDArray[Any]) -> None:
        self.stream.write(np.ascontiguousarray(values).data)

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Rows that were appended before."""
        self.stream.flush()
        row = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        raw = os.pread(self.stream.fileno(), count * row, self._data + start * row)
        return np.frombuffer(raw, self.dtype).reshape(count, *self.shape[1:])

    def finish(self) -> str:
        """Flush to the disk; returns the file's hash."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        return sha256_file(self.path)


def _floor(exact: Compared) -> F32:
    """What coding alone costs: KL(stored || the logits that were stored), in nats."""
    return np.asarray(exact.kld, np.float32)


def _digest(header: Mapping[str, Any]) -> str:
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _replace(new: Path, directory: Path) -> None:
    """Put `new` in the place of `directory`, which may exist."""
    old = directory.with_name(f"{directory.name}.{os.getpid()}.old.partial")
    if directory.exists():
        directory.replace(old)
    new.replace(directory)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Reference:
    """A stored reference, checked against its hashes when opened; its large arrays are memory-mapped."""

    directory: Path
    rows: Rows
    vocab_size: int
    coding: str
    """"u16" (the whole vocabulary) or "top_k" (the KL divergence is a lower bound)."""
    trained_nll: F64
    """[P] nats."""
    trained_top: NDArray[np.int32]
    """[P] the trained model's most likely token."""
    trained_floor: F32
    """[P] nats: KL between what is stored and what was said."""
    base_nll: F64
    """[P] nats."""
    base_top: NDArray[np.int32]
    """[P] the base's most likely token."""
    base_kld: F64
    """[P] nats, KL(trained || base); NaN where the base was captured first."""
    contract: list[dict[str, Any]]
    task: dict[str, Any] | None
    info: dict[str, Any]
    _stored: Columns
    _coding: Coding

    @classmethod
    def open(cls, directory: Path) -> Reference:
        """Read and check; RunDirectoryError for a reference that is missing, truncated or altered."""
        header = _read_header(directory)
        _check_files(directory, header["files"])
        try:
            columns = {
                name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in header["files"]
            }
            return cls._assemble(directory, header, columns)
        except (ValueError, KeyError, EOFError) as error:
            raise _damaged(directory, str(error)) from error

    @classmethod
    def _assemble(cls, directory: Path, header: Mapping[str, Any], columns: Columns) -> Reference:
        stored = {
            name.removeprefix("trained."): array for name, array in columns.items() if name.startswith("trained.")
        }
        coding = _coding_of(header["coding"], stored)
        small = {
            name: np.array(columns[name])
            for name in ("trained_nll", "trained_top", "trained_floor", "base_nll", "base_top", "base_kld")
        }
        rows = Rows(*(np.array(columns[name]) for name in ("tokens", "row_offsets", "positions")))
        if any(len(column) != len(rows.positions) for column in [*stored.values(), *small.values()]):
            raise ValueError("its arrays differ in length")
        return cls(
            directory, rows, header["vocab_size"], header["coding"],
            contract=header["contract"], task=header["task"], info=header["info"],
            _stored=stored, _coding=coding, **small,
        )  # fmt: skip

    @property
    def is_lower_bound(self) -> bool:
        """Whether a KL divergence against this reference is a lower bound."""
        return self._coding.is_lower_bound

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.directory.iterdir())

    def log_probs(self, start: int, stop: int) -> F32:
        """The trained model's log-probabilities [stop - start, V] at scored positions start..stop-1; "u16" only."""
        if not isinstance(self._coding, FullVocabulary):
            raise ValueError("a top-k reference does not hold the whole vocabulary; use compare()")
        return self._coding.decode(self._columns(start, stop))

    def compare(self, start: int, logits: F32, *, threads: int = 0) -> Compared:
        """Another model's logits [m, V] at scored positions start..start+m-1 against the trained model's."""
        stop = start + len(logits)
        targets = self.rows.tokens[self.rows.positions[start:stop]].astype(np.int64)
        return self._coding.compare(self._columns(start, stop), logits, targets, threads)

    def _columns(self, start: int, stop: int) -> Columns:
        return {name: array[start:stop] for name, array in self._stored.items()}


def _coding_of(name: str, stored: Columns) -> Coding:
    if name == FullVocabulary.name:
        return FullVocabulary()
    if name == TopK.name:
        return TopK(stored["ids"].shape[1])
    raise ValueError(f"the coding {name!r} is not known here")


def _damaged(directory: Path, why: str) -> RunDirectoryError:
    return RunDirectoryError(f"the reference in {directory} is damaged: {why}", HINT)


def _read_header(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise RunDirectoryError(f"there is no reference in {directory}", HINT)
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _damaged(directory, f"{MANIFEST} is not valid JSON") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise _damaged(directory, f"{MANIFEST} is not of version {VERSION}")
    if header.pop("digest", None) != _digest(header):
        raise _damaged(directory, f"{MANIFEST} was altered")
    return header


def _check_files(directory: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        path = directory / f"{name}.npy"
        if not path.is_file():
            raise _damaged(directory, f"{path.name} is missing")
        if sha256_file(path) != expected:
            raise _damaged(directory, f"{path.name} is not what was written (its SHA-256 differs)")
