"""The results of a benchmark, as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgetune.benchmarking.memory import PROBE_BYTES, MemorySpeed
from edgetune.benchmarking.speeds import STREAM_ANSWER, STREAM_PROMPT, Speed

_COLUMNS = ("model", "size", "threads", "test", "t/s", "")
_RIGHT = {1, 2, 3, 4}


@dataclass(frozen=True)
class BenchResults:
    """The measurements of one model.

    Attributes:
        path: The model.
        format: "gguf" or "onnx".
        size: Bytes of the model.
        weights: Bytes of weights that decoding one token reads.
        versions: Package -> version.
        processor: Name of the processor.
        cache: Bytes of the largest cache of the processor; None if unknown.
        memory: Number of threads -> what they reach.
        speeds: The measurements.
        fit: The settings of `edgetune fit` with which the model ran, in words; None: the defaults.
    """

    path: Path
    format: str
    size: int
    weights: int
    versions: dict[str, str]
    processor: str
    cache: int | None
    memory: dict[int, MemorySpeed]
    speeds: list[Speed]
    fit: str | None = None

    @property
    def fits_cache(self) -> bool:
        """Whether the weights of a token may stay in the processor's cache."""
        return self.cache is not None and self.weights < self.cache

    def share(self, speed: Speed) -> float | None:
        """Return the share of the memory's bandwidth that decoding reaches; None for what is not decoding alone."""
        return speed.mean * self.weights / self.memory[speed.threads].bandwidth if speed.is_decoding else None

    def table(self) -> str:
        """Return the table with the columns of llama-bench, and what its figures depend on."""
        rows = [_COLUMNS, *(self._row(speed) for speed in self.speeds)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        lines = [_join(row, widths) for row in rows]
        rule = ["-" * (width - 1) + (":" if column in _RIGHT else "-") for column, width in enumerate(widths)]
        lines.insert(1, _join(rule, widths))
        return "\n".join([*lines, "", *self._remarks()])

    def _row(self, speed: Speed) -> tuple[str, ...]:
        rate = f"{speed.mean:.2f} ± {speed.deviation:.2f}"
        return self.path.name, f"{self.size / 2**20:.2f} MiB", str(speed.threads), speed.test, rate, self._remark(speed)

    def _remark(self, speed: Speed) -> str:
        share = self.share(speed)
        if share is not None:
            return f"{speed.mean * self.weights / 1e9:.1f} GB/s, {share:.0%} of the memory's bandwidth"
        if speed.first_token is None:
            return ""
        waiting = "" if speed.together >= speed.streams else f", {speed.together} at once"
        return f"{speed.mean / speed.streams:.2f} each, first token after {speed.first_token:.2f} s{waiting}"

    def _remarks(self) -> list[str]:
        lines = [
            f"memory, {count} thread{'s' if count > 1 else ''}: {each.read / 1e9:.1f} GB/s read, "
            f"{each.copied / 1e9:.1f} GB/s copied; a token reads {self.weights / 1e6:.1f} MB of weights"
            for count, each in self.memory.items()
        ]
        if self.fits_cache:
            lines.append("The weights fit the processor's cache: the share of the memory's bandwidth says little.")
        if any(speed.first_token is not None for speed in self.speeds):
            lines.append(
                f"streams: prompts of {STREAM_PROMPT} tokens and answers of {STREAM_ANSWER}, submitted together"
            )
        lines.append(
            "settings: the defaults; `edgetune fit` measures whether others are faster"
            if self.fit is None
            else f"settings: {self.fit}, as `edgetune fit` remembers; -t goes before its threads"
        )
        return [*lines, f"{self.processor}; {', '.join(f'{name} {value}' for name, value in self.versions.items())}"]

    def to_json(self) -> dict[str, Any]:
        """Return the results for programs: rates in tokens per second, times in seconds, sizes in bytes."""
        return {
            "model": str(self.path), "format": self.format, "size": self.size, "bytes_per_token": self.weights,
            "processor": self.processor, "processor_cache": self.cache, "versions": self.versions, "fit": self.fit,
            "memory": [
                {
                    "threads": count, "probe_bytes": PROBE_BYTES, "read_bytes_per_second": each.read,
                    "copied_bytes_per_second": each.copied, "bytes_per_second": each.bandwidth,
                }
                for count, each in self.memory.items()
            ],
            "tests": [self._test(speed) for speed in self.speeds],
        }  # fmt: skip

    def _test(self, speed: Speed) -> dict[str, Any]:
        return {
            "test": speed.test, "threads": speed.threads, "prompt_tokens": speed.prompt_tokens,
            "answer_tokens": speed.answer_tokens, "streams": speed.streams, "decoded_together": speed.together,
            "tokens_per_second": speed.mean, "deviation": speed.deviation, "samples": list(speed.samples),
            "first_token_seconds": speed.first_token, "bandwidth_share": self.share(speed),
        }  # fmt: skip


def _join(cells: Any, widths: list[int]) -> str:
    padded = (
        cell.rjust(width) if column in _RIGHT else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join(padded)} |"


def runtime_versions(format_: str) -> dict[str, str]:
    """Return the versions of edgetune and of what runs a format."""
    packages = ("edgetune", "llama-cpp-python") if format_ == "gguf" else ("edgetune", "onnxruntime")
    return {name: version(name) for name in packages}
