"""The stored outputs of the base and the trained model on held-out rows, against which exported files are compared.

reference/
  reference.json         the manifest (edgetune/reference/manifest.py)
  tokens.npy row_offsets.npy positions.npy
  trained.*.npy          the trained model's distributions (edgetune/reference/codecs.py), memory-mapped
  trained_nll.npy trained_top.npy trained_floor.npy base_nll.npy base_top.npy base_kld.npy
  merged-original.npz ... the merged models, where they were captured (edgetune/reference/merged.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import RunDirectoryError
from edgetune.reference.codecs import F32, F64, I64, Codec, Columns, FullVocabulary, StoredComparison, TopK
from edgetune.reference.manifest import FILE, HINT, ReferenceManifest, ReferenceSummary
from edgetune.reference.scored_rows import ScoredRows
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
    """[P] nats: KL between the stored and the original distributions."""
    base_nll: F64
    """[P] nats."""
    base_top: NDArray[np.int32]
    """[P] the base's most likely token."""
    base_kld: F64
    """[P] nats, KL(trained || base); NaN where the base was captured first."""
    contract: list[dict[str, Any]]
    task: dict[str, Any] | None
    greedy: list[dict[str, Any]]
    """The trained model's greedy answers: {"prompt", "answer" (ids), "stopped"}."""
    info: dict[str, Any]
    digest: str
    """Of the manifest, which covers everything in the reference."""
    _stored: Columns
    _codec: Codec

    @classmethod
    def open(cls, directory: Path) -> Reference:
        """Open a reference and check its files.

        Raises:
            RunDirectoryError: The reference is missing, truncated or altered.
        """
        manifest = read_manifest(directory)
        _check_files(directory, manifest.files)
        try:
            columns = {
                name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in manifest.files
            }
            return cls._assemble(directory, manifest, columns)
        except (ValueError, KeyError, EOFError) as error:
            raise _damaged(directory, str(error)) from error

    @classmethod
    def _assemble(cls, directory: Path, manifest: ReferenceManifest, columns: Columns) -> Reference:
        stored = {
            name.removeprefix("trained."): array for name, array in columns.items() if name.startswith("trained.")
        }
        codec = _codec_of(manifest.coding, stored)
        small = {
            name: np.array(columns[name])
            for name in ("trained_nll", "trained_top", "trained_floor", "base_nll", "base_top", "base_kld")
        }
        rows = ScoredRows(*(np.array(columns[name]) for name in ("tokens", "row_offsets", "positions")))
        if any(len(column) != len(rows.positions) for column in [*stored.values(), *small.values()]):
            raise ValueError("its arrays differ in length")
        return cls(
            directory, rows, manifest.vocab_size, manifest.coding, contract=manifest.contract,
            task=manifest.task.model_dump() if manifest.task else None, greedy=manifest.greedy, info=manifest.info,
            digest=manifest.digest, _stored=stored, _codec=codec, **small,
        )  # fmt: skip

    @property
    def is_lower_bound(self) -> bool:
        """Whether a KL divergence against this reference is a lower bound."""
        return self._codec.is_lower_bound

    @property
    def long_rows(self) -> int:
        """The number of rows, the last ones, that test long contexts and are not the user's."""
        return int(self.info.get("long_rows", 0))

    @property
    def main_rows(self) -> ScoredRows:
        """The rows without the long ones."""
        return self.rows.first(len(self.rows) - self.long_rows)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.directory.iterdir())

    def log_probs(self, start: int, stop: int) -> F32:
        """Return the trained log-probabilities [stop - start, V] at scored positions start..stop-1; "u16" only."""
        if not isinstance(self._codec, FullVocabulary):
            raise ValueError("a top-k reference does not hold the whole vocabulary; use compare()")
        return self._codec.decode(self._columns(start, stop))

    def compare(self, start: int, logits: F32, *, threads: int = 0) -> StoredComparison:
        """Compare another model's logits [m, V] at scored positions start..start+m-1 with the trained model."""
        stop = start + len(logits)
        targets = self.rows.tokens[self.rows.positions[start:stop]].astype(np.int64)
        return self._codec.compare(self._columns(start, stop), logits, targets, threads)

    def most_likely(self, start: int, stop: int, count: int) -> tuple[I64, F64]:
        """Return the trained model's most likely tokens at these scored positions, and their log-probabilities."""
        return self._codec.most_likely(self._columns(start, stop), count)

    def _columns(self, start: int, stop: int) -> Columns:
        return {name: array[start:stop] for name, array in self._stored.items()}


def _codec_of(name: str, stored: Columns) -> Codec:
    if name == FullVocabulary.name:
        return FullVocabulary()
    if name == TopK.name:
        return TopK(stored["ids"].shape[1])
    raise ValueError(f"the coding {name!r} is not known here")


def _damaged(directory: Path, why: str) -> RunDirectoryError:
    return RunDirectoryError(f"the reference in {directory} is damaged: {why}", HINT)


def read_manifest(directory: Path) -> ReferenceManifest:
    """Read the checked manifest of a reference.

    Raises:
        RunDirectoryError: It is missing, damaged, or of a newer version.
    """
    path = directory / FILE
    if not path.is_file():
        raise RunDirectoryError(f"there is no reference in {directory}", HINT)
    return ReferenceManifest.read(path)


def summary(run: RunDirectory) -> ReferenceSummary:
    """Return the results of the capture.

    They are in reference.json and not in run.json, so that a recaptured reference makes no export out of date.

    Raises:
        RunDirectoryError: The reference is missing or damaged.
    """
    found = read_manifest(run.reference).summary
    if found is not None:
        return found
    earlier = run.manifest.stages.reference  # in runs of edgetune before 0.1
    if earlier is None:
        raise _damaged(run.reference, f"{FILE} has no summary")
    return ReferenceSummary.model_validate(earlier)


def _check_files(directory: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        path = directory / f"{name}.npy"
        if not path.is_file():
            raise _damaged(directory, f"{path.name} is missing")
        if sha256_of(path) != expected:
            raise _damaged(directory, f"{path.name} is not what was written (its SHA-256 differs)")
