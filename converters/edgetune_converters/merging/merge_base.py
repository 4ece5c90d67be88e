"""The merge base: the original base, or the base as QLoRA training had it, rounded to 4 bits and back.

bitsandbytes keeps one scale per block of weights and quantizes these scales again, around their mean over the tensor.
So a tensor is read twice: once for its scales (1/16 byte per weight stays in memory), once in blocks of rows that begin
and end at block boundaries.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters.errors import AdapterError, CheckpointError, EdgetuneError
from edgetune_converters.merging.stream import MergedTensor, TensorPart
from edgetune_converters.names import MERGE_BASES, NF4, ORIGINAL
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.tensors import ALL, F32, FOUR_BIT, PACKED, Read, RowIndex, TensorInfo, span

_PIECE_BYTES = 8 * 1024 * 1024
# dtypes of PyTorch and safetensors -> those of edgetune_native; F64 is rounded to f32 first
_DTYPES = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "F32": "f32", "F64": "f32", "F16": "f16", "BF16": "bf16",
}  # fmt: skip
Renamed = Callable[[str], str]
_DAMAGED = "run.json is damaged: train again, or use --merge-base original"


@dataclass(frozen=True)
class FourBitSettings:
    """The bitsandbytes settings of one weight. `dtype` None: that of the file; `offset` None: computed."""

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    dtype: str | None = None
    offset: float | None = None
    nested_map: F32 | None = None
    scales_sha256: str | None = None


class MergeBase(Protocol):
    """A merge base of `--merge-base`. `notes` are for the receipt, complete once the stream has been read."""

    name: str

    @property
    def notes(self) -> list[str]:
        """Notes on the base that the adapter was merged into."""

    def apply(self, tensors: Sequence[MergedTensor], renamed: Renamed = str) -> list[MergedTensor]:
        """Return the tensors with the reader of their base; `renamed` maps names to the spelling of the targets."""


@dataclass
class OriginalMergeBase:
    """The base unchanged. `record` is the `quantized` entry of run.json, where training had the base in 4 bits."""

    record: Mapping[str, Any] | None = None
    threads: int = 0
    name: str = ORIGINAL
    _trained: Nf4MergeBase | None = None

    @property
    def notes(self) -> list[str]:
        """Notes on changes that are computed from the base as it was in training."""
        if self._trained is None:
            return []
        return [
            "the adapter is computed from the base as it was in training, in 4 bits (DoRA: its row norms), and is "
            "merged into the original base: --merge-base nf4 is exactly the trained model",
            *self._trained.notes,
        ]

    def apply(self, tensors: Sequence[MergedTensor], renamed: Renamed = str) -> list[MergedTensor]:
        """Return the tensors; changes that need the base as it was in training get its reader."""
        if not any(_needs_trained(part) for tensor in tensors for part in tensor.parts):
            return list(tensors)
        if self.record is None or next(_recorded(self.record), None) is None:
            return list(tensors)
        self._trained = Nf4MergeBase(self.record, self.threads)
        rounded = self._trained.apply(tensors, renamed)
        return [_with_trained(*pair) for pair in zip(tensors, rounded, strict=True)]


def _needs_trained(part: TensorPart) -> bool:
    transform = part.change.transform if part.change else None
    return transform is not None and transform.needs_trained


def _with_trained(tensor: MergedTensor, rounded: MergedTensor) -> MergedTensor:
    """Return a tensor whose changes read the rounded base where they need the base as it was in training."""
    parts = (
        replace(part, trained=other.reader) if _needs_trained(part) else part
        for part, other in zip(tensor.parts, rounded.parts, strict=True)
    )
    return replace(tensor, parts=tuple(parts))


@dataclass
class Nf4MergeBase:
    """The base as training had it in 4 bits.

    `record` is the `quantized` entry of run.json; None without a run: bitsandbytes' defaults apply.
    """

    record: Mapping[str, Any] | None = None
    threads: int = 0
    name: str = NF4
    differing: set[str] = field(default_factory=set)
    _notes: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """Notes on uncertainties of the rounding."""
        if not self.differing:
            return list(self._notes)
        names = sorted(self.differing)
        return [
            *self._notes,
            f"the block scales of {len(names)} rounded tensors (the first is {names[0]}) are not exactly those of the "
            "training, whose device rounds a few of them otherwise: by a few millionths of a scale on average",
        ]

    def apply(self, tensors: Sequence[MergedTensor], renamed: Renamed = str) -> list[MergedTensor]:
        """Return the tensors; the linear layers that were NF4 in training are read as their dequantized values.

        Raises AdapterError when the record is damaged or does not match the base.
        """
        if self.record is None and _are_packed(tensors):
            self._notes.append(
                "the base is quantized already: its weights stay as they are and are not rounded to nf4, because an "
                "adapter on them was trained on these values"
            )
            return list(tensors)
        recorded = () if self.record is None else _recorded(self.record)
        found = {renamed(name): rounding for name, rounding in recorded}
        if self.record is None:
            found = {
                part.piece.target: FourBitSettings()
                for tensor in tensors
                for part in tensor.parts
                if _is_linear(tensor, part)
            }
            if not found:
                return list(tensors)  # the base is stored in 4 bits: the adapter was trained against these values
            self._notes.append(
                "merged into the base rounded as bitsandbytes does it by default (nf4, blocks of 64, nested scales, in "
                "the dtype of the file, all linear layers of the blocks), because there is no record of the training"
            )
        elif not found:
            raise AdapterError(
                "the run held no weight in 4 bits (quantization.bits: 16, or layers without 4-bit support): "
                "there is no rounded base to merge into",
                "Use --merge-base original",
            )
        self._note_misread()
        targets = {part.piece.target for tensor in tensors for part in tensor.parts}
        if unknown := sorted(found.keys() - targets):
            raise AdapterError(
                f"the run held {len(unknown)} tensors in 4 bits that this base does not have, such as {unknown[0]}",
                "Give the base that the run was trained on, or use --merge-base original",
            )
        return [self._applied(tensor, found) for tensor in tensors]

    def _note_misread(self) -> None:
        misread = self.record.get("misread") if self.record else None
        if misread and isinstance(misread, list):
            self._notes.append(
                f"bitsandbytes misread {len(misread)} weights while the run was trained (rows that are no whole number "
                f"of blocks, on a CPU): the base that the adapter knew is not this one (the first is {misread[0]})"
            )

    def _applied(self, tensor: MergedTensor, found: Mapping[str, FourBitSettings]) -> MergedTensor:
        return replace(tensor, parts=tuple(self._with_reader(part, found) for part in tensor.parts))

    def _with_reader(self, part: TensorPart, found: Mapping[str, FourBitSettings]) -> TensorPart:
        rounding = found.get(part.piece.target)
        if rounding is None or (part.change and part.change.replacement) or self._is_as_trained(part):
            return part
        # GPT-2 stores its layers transposed; bitsandbytes quantizes them transposed back
        transposed = part.piece.view.transpose is not None
        return replace(part, reader=partial(self._reader, rounding, transposed))

    def _is_as_trained(self, part: TensorPart) -> bool:
        """Whether training had the weight as the base stores it; edgetune itself trains on packed ones in 4 bits."""
        return _is_rounded(part) and (self.record is None or part.piece.source.dtype in FOUR_BIT)

    def _reader(self, rounding: FourBitSettings, transposed: bool, checkpoint: Checkpoint, source: TensorInfo) -> Read:
        reader = RoundedReader(checkpoint, source, rounding, threads=self.threads, transposed=transposed)
        if rounding.scales_sha256 not in (None, reader.digest):
            self.differing.add(source.name)
        return reader


def merge_base_named(name: str, record: Mapping[str, Any] | None = None, threads: int = 0) -> MergeBase:
    """Return the merge base of this name. Raises EdgetuneError for an unknown one."""
    if name == ORIGINAL:
        return OriginalMergeBase(record, threads)
    if name == NF4:
        return Nf4MergeBase(record, threads)
    raise EdgetuneError(f"there is no merge base {name!r}", f"Known: {', '.join(MERGE_BASES)}")


class RoundedReader:
    """Reads rows of one base tensor, rounded to 4 bits and back; see `TensorPart.reader`.

    `digest` is the SHA-256 of the scales as little-endian f32, to be compared with the run's. Of a `transposed` source,
    bitsandbytes quantized the columns as rows.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: TensorInfo,
        rounding: FourBitSettings,
        *,
        threads: int = 0,
        transposed: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._source = source
        self._rounding = rounding
        self._threads = threads
        self._stored_as = _DTYPES.get(source.dtype, "f32")
        self._dtype = rounding.dtype or self._stored_as
        self._transposed = transposed
        self._count, self._columns = math.prod(source.shape[:-1]), source.shape[-1]
        if transposed:
            self._count, self._columns = self._columns, self._count
        # blocks cross the ends of rows; every `_step` rows, a block begins with a row
        self._step = rounding.blocksize // math.gcd(self._columns, rounding.blocksize)
        self._scales = self._all_scales()
        self.digest = hashlib.sha256(self._scales.astype("<f4").tobytes()).hexdigest()

    def __call__(self, rows: RowIndex, columns: RowIndex = ALL) -> F32:
        """Return rows as a fresh f32 array [n, columns]."""
        if self._transposed:
            return self._rounded(columns)[:, rows].T
        return self._rounded(rows)[:, columns]

    def _rounded(self, rows: RowIndex) -> F32:
        """Rows as bitsandbytes quantized them, all columns."""
        first, last = span(rows, self._count)
        begin, end = self._whole(first), min(self._count, self._whole(last + self._step - 1))
        per_block = self._rounding.blocksize
        rounded = edgetune_native.nf4_roundtrip(
            self._stored(begin, end),
            blocksize=per_block,
            quant_type=self._rounding.quant_type,
            scales=self._scales[begin * self._columns // per_block : -(-end * self._columns // per_block)],
            dtype=self._dtype,
            threads=self._threads,
        )
        wanted: F32 = rounded[first - begin : last - begin] if isinstance(rows, slice) else rounded[rows - begin]
        return wanted

    def _whole(self, row: int) -> int:
        return row // self._step * self._step

    def _stored(self, first: int, last: int) -> F32:
        """Rows in the dtype that bitsandbytes quantized, widened to f32."""
        if self._transposed:
            rows = np.ascontiguousarray(self._checkpoint.rows(self._source, ALL, slice(first, last)).T)
        else:
            rows = self._checkpoint.rows(self._source, slice(first, last))
        return rows if self._dtype in ("f32", self._stored_as) else round_to(rows, self._dtype)

    def _all_scales(self) -> F32:
        """The factors of the codes of each block."""
        piece = self._whole(max(self._step, _PIECE_BYTES // (4 * self._columns)))
        absmax = np.concatenate([self._absmax(first, piece) for first in range(0, self._count, piece)])
        if not self._rounding.double_quant:
            return absmax
        scales: F32 = edgetune_native.nested_scales(
            absmax, offset=self._rounding.offset, nested_quant_map=self._rounding.nested_map, threads=self._threads
        )
        return scales

    def _absmax(self, first: int, piece: int) -> F32:
        rows = self._stored(first, min(first + piece, self._count))
        try:
            absmax: F32 = edgetune_native.block_absmax(rows, blocksize=self._rounding.blocksize, threads=self._threads)
        except ValueError as error:
            bad = int(np.count_nonzero(~np.isfinite(rows)))
            raise CheckpointError(
                f"{self._source.name} holds {bad} weights that are NaN or infinite (as {self._dtype})",
                "The base model is damaged",
            ) from error
        return absmax


def round_to(rows: F32, dtype: str) -> F32:
    """Return f32 rounded to f16 or bf16 (to nearest, ties to even) and widened again, as PyTorch casts."""
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return rows.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(rows).view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def _is_linear(tensor: MergedTensor, part: TensorPart) -> bool:
    """Whether transformers makes a 4-bit layer of it: every matrix of the blocks, not embedding and head."""
    matrix = tensor.layer is not None and tensor.part == "weight" and len(tensor.shape) == 2
    return matrix and not _is_rounded(part)


def _is_rounded(part: TensorPart) -> bool:
    """Whether the base stores it quantized already; a second rounding would change it."""
    return part.piece.source.dtype in (*FOUR_BIT, *PACKED)


def _are_packed(tensors: Sequence[MergedTensor]) -> bool:
    """Whether the base is one of GPTQ, AWQ or the like, which training does not round to 4 bits again."""
    return any(part.piece.source.dtype in PACKED for tensor in tensors for part in tensor.parts)


# -- the record of a run -----------------------------------------------------------------------------------------------


def _recorded(record: Any) -> Iterator[tuple[str, FourBitSettings]]:
    """The weights that a run had in 4 bits. Raises AdapterError for a damaged record."""
    try:
        for group in record["groups"]:
            common = _common(group)
            for name, own in group["tensors"].items():
                yield name, replace(common, offset=_offset(own, common), scales_sha256=own["scales_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise AdapterError(f"the run's record of its 4-bit weights cannot be read: {error!r}", _DAMAGED) from error


def _common(group: Mapping[str, Any]) -> FourBitSettings:
    quant_type, blocksize, double_quant = group["quant_type"], group["blocksize"], group["double_quant"]
    if quant_type not in ("nf4", "fp4") or type(double_quant) is not bool:
        raise ValueError(f"quant_type {quant_type!r}, double_quant {double_quant!r}")
    if type(blocksize) is not int or not 32 <= blocksize <= 4096 or blocksize & (blocksize - 1):
        raise ValueError(f"blocksize {blocksize!r}")
    nested_map = _floats(group["nested_map"]) if double_quant else None
    return FourBitSettings(quant_type, blocksize, double_quant, _DTYPES[group["dtype"]], nested_map=nested_map)


def _floats(text: str) -> F32:
    """The 256 values of the map that quantizes the scales."""
    values: NDArray[np.float32] = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
    if len(values) != 256 or not np.isfinite(values).all() or np.any(np.diff(values) < 0):
        raise ValueError(f"a nested map of {len(values)} values that do not rise")
    return values


def _offset(own: Mapping[str, Any], common: FourBitSettings) -> float | None:
    offset = own["offset"]
    if common.double_quant and not (type(offset) is float and math.isfinite(offset) and abs(offset) < 3e38):
        raise ValueError(f"offset {offset!r}")
    return offset if common.double_quant else None
