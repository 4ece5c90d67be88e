"""Which tensors' storage types cost most: the file is exported again with a few of them in 16 bits, and measured.

First every kind of tensor (`ffn_down` of all layers, `attn_v`, the output ...), then the layers of the kind that costs
most, from both ends inwards: quantization usually hurts the first and the last layers most. What was found when the
time is over is what is reported.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgetune.console import Progress
from edgetune.errors import RunDirectoryError
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.runtime import load
from edgetune.validation import scoring
from edgetune_converters.exporting import export
from edgetune_converters.gguf import keys, reader
from edgetune_converters.quantization.overrides import Overrides, overrides_of

WHOLE = "f16"
"""What a tensor is swapped back to."""
_NOT_QUANTIZED = ("f32", "f16", "bf16")
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
TOKENS = 2048
"""Scored tokens on which each swap is measured, at most."""


@dataclass(frozen=True)
class Swap:
    """Some tensors swapped back to 16 bits."""

    tensor: str
    """Their name; `*` stands for every layer."""
    type: str
    """What they are stored in."""
    weights: int
    kld_without: float
    """Mean KL divergence with them swapped back, in nats."""
    gain: float
    """How much that is less."""


@dataclass(frozen=True)
class Located:
    """What was found, the costliest first: kinds of tensors, then layers of the costliest kind."""

    kld: float
    """Mean KL divergence of the file as it is, on the same tokens."""
    kinds: tuple[Swap, ...]
    layers: tuple[Swap, ...]
    complete: bool
    """Whether there was time for all of them."""


@dataclass(frozen=True)
class _Group:
    name: str
    types: str
    weights: int
    layer: int | None = None

    @property
    def pattern(self) -> str:
        return "^" + re.escape(self.name).replace(r"\*", r"\d+") + "$"


def locate(run: RunDirectory, reference: Reference, file: Path, seconds: float, progress: Progress) -> Located:
    """Swap group after group for about `seconds` at most; `progress` counts swaps.

    Raises RunDirectoryError for a file that cannot be made again.
    """
    made = _Remake.of(run, file)
    rows = _enough(reference)
    kinds, layers = groups(file)
    end = time.monotonic() + seconds
    before = _kld(reference, rows, file)
    with _folder(file) as folder:
        swap = _Swapper(made, reference, rows, folder / "swapped.gguf", before)
        total = len(kinds) + max((len(each) for each in layers.values()), default=0)
        tried = list(_until(end, kinds, swap, 0, total, progress))
        tried.sort(key=lambda each: -each.gain)
        inner = layers.get(tried[0].tensor, []) if tried else []
        found = list(_until(end, inner, swap, len(kinds), len(kinds) + len(inner), progress))
    found.sort(key=lambda each: -each.gain)
    return Located(before, tuple(tried), tuple(found), len(tried) == len(kinds) and len(found) == len(inner))


def groups(file: Path) -> tuple[list[_Group], dict[str, list[_Group]]]:
    """Kinds of quantized tensors, the largest first, and the layers of each, from both ends inwards."""
    alone: list[_Group] = []
    layers: dict[str, list[_Group]] = {}
    for entry in reader.read(file).tensors:
        type_, weights = entry.type.lower(), _product(entry.shape)
        if type_ in _NOT_QUANTIZED:
            continue
        match = _LAYER.fullmatch(entry.name)
        if match is None:
            alone.append(_Group(entry.name, type_, weights))
        else:
            layers.setdefault(f"blk.*.{match[2]}", []).append(_Group(entry.name, type_, weights, int(match[1])))
    kinds = [
        _Group(name, "/".join(sorted({each.types for each in found})), sum(each.weights for each in found))
        for name, found in layers.items()
    ]
    ordered = sorted([*alone, *kinds], key=lambda group: -group.weights)
    return ordered, {name: _from_both_ends(found) for name, found in layers.items() if len(found) > 1}


def _from_both_ends(layers: Sequence[_Group]) -> list[_Group]:
    inwards = sorted(layers, key=lambda group: group.layer or 0)
    return [inwards.pop(0 if turn % 2 == 0 else -1) for turn in range(len(inwards))]


def _product(shape: Sequence[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


@dataclass(frozen=True)
class _Remake:
    """How the file was made."""

    run: RunDirectory
    recipe: str
    merge_base: str
    said: Mapping[str, Sequence[str]]
    """Types set by hand: option -> values."""
    imatrix: Path | None

    @classmethod
    def of(cls, run: RunDirectory, file: Path) -> _Remake:
        metadata = reader.read(file).metadata
        recipe = metadata.get(keys.RECIPE)
        if not isinstance(recipe, str):
            raise RunDirectoryError(
                f"{file} does not say how it was made, so it cannot be made again with other types",
                "--locate wants a GGUF file that edgetune exported.",
            )
        said: dict[str, list[str]] = {}
        stated = metadata.get(keys.OVERRIDES)
        for override in stated if isinstance(stated, list) else []:
            option, _, value = str(override).partition(" ")
            said.setdefault(option, []).append(value)
        imatrix = run.manifest.config["export"].get("imatrix")
        measured = any(key.startswith("quantize.imatrix") for key in metadata)
        if measured and not imatrix:
            raise RunDirectoryError(
                f"{file} was made with an importance matrix that the run's configuration does not name",
                "Set export.imatrix in the run's configuration, or export without one.",
            )
        merge_base = str(metadata.get(keys.MERGE_BASE, "original"))
        return cls(run, recipe, merge_base, said, Path(imatrix) if measured else None)

    def write(self, path: Path, group: _Group) -> None:
        """The file again, with one group in 16 bits."""
        run, manifest = self.run, self.run.manifest
        export(
            run.base_directory(), {self.recipe: path}, adapter=run.adapter if run.adapter.is_dir() else None,
            tokenizer=run.tokenizer, overrides=self._overrides(group), imatrix=self.imatrix, allow_fallback=True,
            merge_base=self.merge_base, trained_on=manifest.quantized,
        )  # fmt: skip

    def _overrides(self, group: _Group) -> Overrides:
        one = {option: next(iter(self.said.get(option, [])), None) for option in (_OUTPUT, _EMBEDDING)}
        named = _BY_NAME.get(group.name)
        if named:
            return overrides_of(self.said.get(_TENSOR, ()), **{_KEYWORDS[option]: one[option] for option in one}
                                | {_KEYWORDS[named]: WHOLE})  # fmt: skip
        first = f"{group.pattern}={WHOLE}"
        return overrides_of([first, *self.said.get(_TENSOR, ())], one[_OUTPUT], one[_EMBEDDING])


_TENSOR, _OUTPUT, _EMBEDDING = "--tensor-type", "--output-tensor-type", "--token-embedding-type"
_KEYWORDS = {_OUTPUT: "output_tensor_type", _EMBEDDING: "token_embedding_type"}
_BY_NAME = {"output.weight": _OUTPUT, "token_embd.weight": _EMBEDDING}  # these options go before a tensor's name


@dataclass(frozen=True)
class _Swapper:
    made: _Remake
    reference: Reference
    rows: ScoredRows
    path: Path
    before: float

    def __call__(self, group: _Group) -> Swap:
        try:
            self.made.write(self.path, group)
            kld = _kld(self.reference, self.rows, self.path)
        finally:
            self.path.unlink(missing_ok=True)
        return Swap(group.name, group.types, group.weights, kld, self.before - kld)


def _until(
    end: float, wanted: Sequence[_Group], swap: _Swapper, done: int, total: int, progress: Progress
) -> Iterator[Swap]:
    """As many swaps as there is time for; one that has begun is ended."""
    for group in wanted:
        if time.monotonic() >= end:
            return
        yield swap(group)
        done += 1
        progress(done, total)


def _enough(reference: Reference) -> ScoredRows:
    """The first rows, up to TOKENS scored tokens."""
    rows = reference.main_rows
    count = next((index for index, (_, _, where) in enumerate(rows, 1) if where.stop >= TOKENS), len(rows))
    return rows.first(count)


def _kld(reference: Reference, rows: ScoredRows, file: Path) -> float:
    longest = int(max(len(ids) for ids, _, _ in rows))
    with load(file, context=longest) as runtime:
        return float(scoring.score(runtime, reference, rows, lambda *_: None).kld.mean())


@contextmanager
def _folder(file: Path) -> Iterator[Path]:
    """A folder on the file's disk, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", suffix=".partial", dir=file.parent) as name:
        yield Path(name)
