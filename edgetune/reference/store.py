"""What base and trained model say on held-out rows, stored so that an exported file can be compared with them later.

    reference/
      reference.json         version, coding, results, contract, greedy answers, task, the SHA-256 of the other files
      tokens.npy row_offsets.npy positions.npy
      trained.*.npy          the trained model's distributions (edgetune/codings.py), streamed and memory-mapped
      trained_nll.npy trained_top.npy trained_floor.npy base_nll.npy base_top.npy base_kld.npy

      merged-w16.npz ...     the merged model without quantization, where it was captured (edgetune/merged.py)

A writer holds one block of logits at a time and the directory appears whole, by a rename, or not at all. A writer with
a `key` leaves a .partial directory when it is stopped, and the next one with the same key goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RunDirectoryError
from edgetune.reference.codecs import F32, F64, I64, Codec, Columns, Comparison, FullVocabulary, TopK
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.writer import HINT, MANIFEST, VERSION, digest_of
from edgetune.runs.directory import RunDirectory
from edgetune_converters.files.contents import sha256_of


@dataclass(frozen=True)
class Reference:
    """A stored reference, checked against its hashes when opened; its large arrays are memory-mapped."""

    directory: Path
    rows: ScoredRows
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
    greedy: list[dict[str, Any]]
    """What the trained model answers greedily: {"prompt", "answer" (ids), "stopped"}."""
    info: dict[str, Any]
    digest: str
    """Of the manifest, and so of everything in the reference."""
    _stored: Columns
    _coding: Codec

    @classmethod
    def open(cls, directory: Path) -> Reference:
        """Read and check; RunDirectoryError for a reference that is missing, truncated or altered."""
        header = read_manifest(directory)
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
        rows = ScoredRows(*(np.array(columns[name]) for name in ("tokens", "row_offsets", "positions")))
        if any(len(column) != len(rows.positions) for column in [*stored.values(), *small.values()]):
            raise ValueError("its arrays differ in length")
        return cls(
            directory, rows, header["vocab_size"], header["coding"],
            contract=header["contract"], task=header["task"], greedy=header.get("greedy", []), info=header["info"],
            digest=digest_of(header), _stored=stored, _coding=coding, **small,
        )  # fmt: skip

    @property
    def is_lower_bound(self) -> bool:
        """Whether a KL divergence against this reference is a lower bound."""
        return self._coding.is_lower_bound

    @property
    def long_rows(self) -> int:
        """How many of the rows, the last ones, are there to show long contexts, and are no rows of the user's."""
        return int(self.info.get("long_rows", 0))

    @property
    def main_rows(self) -> ScoredRows:
        """The others."""
        return self.rows.first(len(self.rows) - self.long_rows)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.directory.iterdir())

    def log_probs(self, start: int, stop: int) -> F32:
        """The trained model's log-probabilities [stop - start, V] at scored positions start..stop-1; "u16" only."""
        if not isinstance(self._coding, FullVocabulary):
            raise ValueError("a top-k reference does not hold the whole vocabulary; use compare()")
        return self._coding.decode(self._columns(start, stop))

    def compare(self, start: int, logits: F32, *, threads: int = 0) -> Comparison:
        """Another model's logits [m, V] at scored positions start..start+m-1 against the trained model's."""
        stop = start + len(logits)
        targets = self.rows.tokens[self.rows.positions[start:stop]].astype(np.int64)
        return self._coding.compare(self._columns(start, stop), logits, targets, threads)

    def most_likely(self, start: int, stop: int, count: int) -> tuple[I64, F64]:
        """The trained model's likeliest tokens at scored positions start..stop-1, and their log-probabilities."""
        return self._coding.most_likely(self._columns(start, stop), count)

    def _columns(self, start: int, stop: int) -> Columns:
        return {name: array[start:stop] for name, array in self._stored.items()}


def _coding_of(name: str, stored: Columns) -> Codec:
    if name == FullVocabulary.name:
        return FullVocabulary()
    if name == TopK.name:
        return TopK(stored["ids"].shape[1])
    raise ValueError(f"the coding {name!r} is not known here")


def _damaged(directory: Path, why: str) -> RunDirectoryError:
    return RunDirectoryError(f"the reference in {directory} is damaged: {why}", HINT)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The checked contents of reference.json. Raises RunDirectoryError when it is missing or damaged."""
    path = directory / MANIFEST
    if not path.is_file():
        raise RunDirectoryError(f"there is no reference in {directory}", HINT)
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _damaged(directory, f"{MANIFEST} is not valid JSON") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise _damaged(directory, f"{MANIFEST} is not of version {VERSION}")
    if header.pop("digest", None) != digest_of(header):
        raise _damaged(directory, f"{MANIFEST} was altered")
    return header


def summary(run: RunDirectory) -> dict[str, Any]:
    """The results of the stage that captured it. They are kept here and not in run.json, so that a reference that is
    written anew makes no export out of date. Raises RunDirectoryError when it is missing or damaged."""
    found: dict[str, Any] | None = read_manifest(run.reference).get("summary") or run.manifest.stages.reference
    if found is None:
        raise _damaged(run.reference, f"{MANIFEST} has no summary")
    return found


def _check_files(directory: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        path = directory / f"{name}.npy"
        if not path.is_file():
            raise _damaged(directory, f"{path.name} is missing")
        if sha256_of(path) != expected:
            raise _damaged(directory, f"{path.name} is not what was written (its SHA-256 differs)")
