"""Read and write llama.cpp's importance matrix (`llama-imatrix`): how much each column of a matrix matters.

Two formats: GGUF (sums of squared activations and their counts, per expert) and the older .dat. Source: llama.cpp's
common/imatrix-loader.cpp and tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune_converters.errors import ArtifactError, RecipeError
from edgetune_converters.files.contents import sha256_of
from edgetune_converters.gguf.layout import MAGIC, TensorSpec
from edgetune_converters.gguf.reader import GgufFile, read
from edgetune_converters.gguf.types import BY_NAME
from edgetune_converters.gguf.values import Value, ValueKind, string, strings, u32
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.tensors import F32

# types that are useless, or cannot be computed, without one
NEEDED_BY = frozenset(("iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s"))
UNWEIGHTED = frozenset(("f32", "f16", "bf16", "q8_0"))
"""Storage types whose rounding takes no importance weights."""
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")  # looked up, not multiplied: entries do not fit
_HINT = "Make one with llama-imatrix from a GGUF file of this model"
_USUAL = ": llama-imatrix leaves embedding and output out, and they are rounded without one"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_CHUNK = 512  # tokens of a chunk of llama-imatrix


@dataclass(frozen=True)
class ImportanceMatrix:
    """Importance weights, f32, by GGUF tensor name: one per column (and expert)."""

    path: Path
    sha256: str
    entries: Mapping[str, F32]
    dataset: str | None
    chunks: int

    def check(self, tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> list[str]:
        """Check against (name, shape, type) of the tensors to be written; return notes.

        Raises RecipeError when it belongs to another model, or lacks an entry that a type needs.
        """
        quantized = [(name, shape, kind) for name, shape, kind in tensors if kind not in UNWEIGHTED]
        found = [name for name, _, _ in quantized if name in self.entries]
        if quantized and not found:
            raise RecipeError(f"{self.path} has no entry for any matrix of this model", _HINT)
        for name, shape, _ in quantized:
            entry = self.entries.get(name)
            if entry is not None and entry.size != _columns(shape) and name not in _EMBEDDINGS:
                raise RecipeError(
                    f"{self.path} has {entry.size} weights for {name}, which has {_columns(shape)}", _HINT
                )
        check_needed([(name, kind) for name, _, kind in quantized if name not in self.entries])
        missing = [name for name, _, _ in quantized if name not in self.entries]
        if not missing:
            return []
        which = missing[0] if len(missing) == 1 else f"{len(missing)} matrices, such as {missing[0]}"
        is_usual = set(missing) <= {*_EMBEDDINGS, "output.weight"}
        return [f"the importance matrix has no entry for {which}{_USUAL if is_usual else ''}"]

    def pieces(
        self, name: str, shape: tuple[int, ...], first: int, rows: NDArray[Any]
    ) -> Iterator[tuple[NDArray[Any], F32 | None]]:
        """Yield rows, which begin at row `first` of the tensor, with their weights: one piece per expert."""
        entry = self.entries.get(name)
        if entry is None or entry.size != _columns(shape):
            yield rows, None
            return
        by_expert, height = entry.reshape(-1, shape[-1]), shape[-2]
        done = 0
        while done < len(rows):
            expert, inside = divmod(first + done, height)
            count = min(height - inside, len(rows) - done)
            yield rows[done : done + count], by_expert[expert]
            done += count

    @property
    def receipt_entry(self) -> dict[str, str]:
        """File name and hash, for receipts."""
        return {"file": self.path.name, "sha256": self.sha256}

    @property
    def metadata(self) -> dict[str, Value]:
        """The keys that llama-quantize writes; the file without its directory."""
        keys = {
            "quantize.imatrix.file": string(self.path.name),
            "quantize.imatrix.entries_count": Value(ValueKind.I32, len(self.entries)),
        }
        keys |= {"quantize.imatrix.dataset": string(self.dataset)} if self.dataset else {}
        return keys | ({"quantize.imatrix.chunks_count": Value(ValueKind.I32, self.chunks)} if self.chunks > 0 else {})


def check_needed(tensors: Iterable[tuple[str, str]]) -> None:
    """Raise RecipeError when a (name, type) without importance matrix has a type that needs one."""
    for name, kind in tensors:
        if kind in NEEDED_BY:
            raise RecipeError(f"{name} cannot be stored as {kind} without an importance matrix", "Give --imatrix FILE")


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read a file of either format. Raises RecipeError for another file, or unusable numbers."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        entries, dataset, chunks = _gguf(read(path)) if magic == MAGIC else _legacy(path)
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror or error}", _HINT) from error
    except ArtifactError as error:
        raise RecipeError(error.message, _HINT) from error
    if not entries:
        raise RecipeError(f"{path} holds no importance matrix", _HINT)
    for name, weights in entries.items():
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise RecipeError(f"{path}: the weights of {name} are not all finite and positive", _HINT)
    return ImportanceMatrix(path, sha256_of(path), entries, dataset, chunks)


def write_imatrix(
    path: Path, entries: Mapping[str, tuple[F32, NDArray[np.int64]]], *, dataset: str, tokens: int,
    metadata: Mapping[str, Value],
) -> None:  # fmt: skip
    """Write a file as llama-imatrix does; it is renamed into place.

    Args:
        path: The file.
        entries: GGUF tensor name -> sums of the squared inputs [matrices, columns], and how many inputs each has.
        dataset: What was evaluated, in words.
        tokens: Tokens that were evaluated.
        metadata: Further metadata.
    """
    stated = {
        "general.type": string("imatrix"),
        "imatrix.datasets": strings([dataset]),
        "imatrix.chunk_count": u32(max(1, tokens // _CHUNK)),
        "imatrix.chunk_size": u32(_CHUNK),
        **metadata,
    }
    values: dict[str, F32] = {}
    for name in sorted(entries):
        sums, counts = entries[name]
        values[name + _SUMS] = sums.reshape(len(counts), -1)
        values[name + _COUNTS] = counts.astype(np.float32)[:, None]
    specs = [TensorSpec(name, each.shape, BY_NAME["f32"]) for name, each in values.items()]
    with GgufWriter.open(path, stated, specs) as writer:
        for each in values.values():
            writer.append(each)
        writer.publish()


def _columns(shape: tuple[int, ...]) -> int:
    """The number of weights: one per column, for each of the stacked matrices."""
    return math.prod(shape[:-2]) * shape[-1]


def _gguf(file: GgufFile) -> tuple[dict[str, F32], str | None, int]:
    names = {entry.name: entry for entry in file.tensors}
    entries: dict[str, F32] = {}
    for name in sorted(names):
        if not name.endswith(_SUMS):
            continue
        tensor, counts_name = name.removesuffix(_SUMS), name.removesuffix(_SUMS) + _COUNTS
        if counts_name not in names or any(names[one].type != "f32" for one in (name, counts_name)):
            raise ArtifactError(f"{file.path}: {tensor} has no sums and counts in f32")
        sums, counts = (file.tensor(one).reshape(-1).view(np.float32) for one in (name, counts_name))
        if not counts.size or sums.size % counts.size:
            raise ArtifactError(f"{file.path}: {tensor} has {sums.size} sums for {counts.size} counts")
        entries[tensor] = _means(sums.reshape(counts.size, -1), counts)
    datasets = file.metadata.get("imatrix.datasets")
    chunks = file.metadata.get("imatrix.chunk_count")
    dataset = str(datasets[0]) if isinstance(datasets, list) and datasets else None
    return entries, dataset, chunks if isinstance(chunks, int) else 0


def _means(sums: F32, counts: F32) -> F32:
    """Sums divided by counts; an expert that was never used gets equal weights."""
    whole = np.rint(counts).astype(np.float32)
    means = np.ones_like(sums)
    np.divide(sums, whole[:, None], out=means, where=whole[:, None] > 0)
    return means.reshape(-1)


def _legacy(path: Path) -> tuple[dict[str, F32], str | None, int]:
    data = path.read_bytes()
    reader = _Bytes(path, data)
    count = reader.integer()
    if not 0 < count <= len(data) // 12:
        raise ArtifactError(f"{path} is not an importance matrix")
    entries: dict[str, F32] = {}
    for _ in range(count):
        name = reader.text()
        calls, size = reader.integer(), reader.integer()
        sums = np.frombuffer(reader.take(4 * size), np.float32)
        entries[name] = sums / np.float32(calls) if calls > 0 else sums.copy()
    chunks = reader.integer() if reader.left >= 4 else 0
    return entries, (reader.text() if reader.left >= 4 else None) or None, chunks


class _Bytes:
    """A cursor over a file in memory; every length is checked against the remaining bytes."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path = path
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, length: int) -> bytes:
        if not 0 <= length <= self.left:
            raise ArtifactError(f"{self._path} is not a whole importance matrix")
        self._at += length
        return self._data[self._at - length : self._at]

    def integer(self) -> int:
        number: int = struct.unpack("<i", self.take(4))[0]
        return number

    def text(self) -> str:
        return self.take(self.integer()).decode("utf-8", "replace")
