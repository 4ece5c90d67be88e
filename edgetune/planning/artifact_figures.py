"""Figures of the files that an export will write: sizes, key-value cache, and the speed that memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.config import Config
from edgetune.planning.base_model import Base
from edgetune.planning.card import Figure
from edgetune.storage_types import are_given, types_by_format
from edgetune_converters.architectures import completed_config
from edgetune_converters.errors import EdgetuneError
from edgetune_converters.formats import FORMATS
from edgetune_converters.names import FormatName
from edgetune_converters.onnx.plan import OnnxSettings
from edgetune_converters.planning import plan
from edgetune_converters.quantization.recipes import MAX_FALLBACK, StoragePlan
from edgetune_converters.request import ExportRequest, Target

USUAL = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m")
"""Types of GGUF that are listed beside the configured ones, the most faithful first."""
CONTEXTS = (2048, 8192, 32768)
CACHE_ELEMENT = 2
"""Bytes of an element of the key-value cache, in f16."""
_EMBEDDING, _OUTPUT, _EXPERTS = "token_embd.weight", "output.weight", "_exps."


@dataclass(frozen=True)
class PlannedFile:
    """A file that could be exported."""

    format: FormatName
    type: str
    bytes: int
    bits_per_weight: float
    read_per_token: float | None
    """Bytes of weights that decoding a token reads; None where it is not known before the file is written."""
    fallback: float
    """Share of the bytes that needs another type, because rows do not divide its blocks."""
    is_asked: bool
    """Whether the configuration asks for it."""

    @property
    def name(self) -> str:
        """The format and the type."""
        return f"{self.format} {self.type}"


def planned_files(base: Base, config: Config) -> list[PlannedFile]:
    """Return the configured files, and the usual types of GGUF that fit the base, without reading weights."""
    export = config.export
    asked: list[tuple[FormatName, str]] = [
        (format_, type_)
        for format_, types in types_by_format(export, are_given(export)).items()
        if format_ != "gguf-lora"
        for type_ in types or [FORMATS[format_].default_type]
    ]
    wanted: dict[tuple[FormatName, str], bool] = dict.fromkeys(asked, True)
    for type_ in USUAL:
        wanted.setdefault(("gguf", type_), False)
    found = []
    for (format_, type_), is_asked in wanted.items():
        planned = _plan(base, format_, type_, is_asked=is_asked)
        if planned is not None and (is_asked or planned.fallback_share <= MAX_FALLBACK):
            read = _read_per_token(planned, base) if format_ == "gguf" else None
            found.append(
                PlannedFile(
                    format_, type_, planned.bytes, planned.bits_per_weight, read, planned.fallback_share, is_asked
                )
            )
    return found


def _plan(base: Base, format_: FormatName, type_: str, *, is_asked: bool) -> StoragePlan | None:
    settings = OnnxSettings() if format_ == "onnx" else None
    target = Target(format_, type_, Path("plan") / f"{format_}-{type_}")  # nothing is written
    try:
        return plan(ExportRequest(base.path, (target,), onnx_settings=settings))[0]
    except EdgetuneError:
        if is_asked:
            raise
        return None


def _read_per_token(planned: StoragePlan, base: Base) -> float:
    """Return the bytes that decoding reads: all weights, of experts those of one token, of an embedding one row."""
    is_tied = all(row.name != _OUTPUT for row in planned.rows)
    used = _share_of_experts(base.checkpoint.config)
    rows = (row for row in planned.rows if row.name != _EMBEDDING or is_tied)
    return sum(row.bytes * (used if _EXPERTS in row.name else 1.0) for row in rows)


def _share_of_experts(config: Mapping[str, object]) -> float:
    chosen = config.get("num_experts_per_tok")
    count = next((config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in config), 0)
    return chosen / count if isinstance(chosen, int) and isinstance(count, int) and count else 1.0


def cache_bytes(base: Base, tokens: int) -> int:
    """Return the bytes of the keys and values of so many tokens, in f16."""
    model = completed_config(base.checkpoint.config)
    return 2 * model.layers * model.kv_heads * model.head_dim * CACHE_ELEMENT * tokens


def cache_figures(base: Base) -> Iterator[Figure]:
    """Yield the key-value cache at the usual contexts that the base allows, and at its own."""
    model = completed_config(base.checkpoint.config)
    longest = base.context.tokens if base.context else None
    reason = f"2 x {model.layers} layers x {model.kv_heads} heads x {model.head_dim}, f16"
    for tokens in sorted(
        {*(each for each in CONTEXTS if not longest or each < longest), *([longest] if longest else [])}
    ):
        yield Figure(f"{tokens:,} tokens", cache_bytes(base, tokens), "bytes", reason)


def file_figures(files: Sequence[PlannedFile]) -> Iterator[Figure]:
    """Yield the size of each file."""
    for file in files:
        reason = f"{file.bits_per_weight:.2f} bits per weight, every tensor planned"
        reason += "; in export.types" if file.is_asked else ""
        reason += f"; {file.fallback:.0%} in another type" if file.fallback else ""
        yield Figure(file.name, file.bytes, "bytes", reason)


def speed_figures(
    files: Sequence[PlannedFile], bandwidth: float, threads: int, cache: int | None = None
) -> Iterator[Figure]:
    """Yield the tokens per second that the bandwidth of memory allows a single answer.

    Args:
        files: The files.
        bandwidth: Bytes per second that were measured.
        threads: Threads of the measurement.
        cache: Bytes of the processor's largest cache, if it is known.
    """
    measured = f"at most: {bandwidth / 1e9:.1f} GB/s measured on {threads} threads"
    for file in files:
        read = file.read_per_token
        if read is None:
            yield Figure(file.name, None, "tokens/s", "known once the graph is written: `edgetune bench FILE`")
            continue
        reason = f"{measured} / {read / 1e6:,.1f} MB a token"
        if cache is not None and read < cache:
            reason += "; it fits the cache of the processor, from which it is read faster"
        yield Figure(file.name, bandwidth / read, "tokens/s", reason)
