"""Measure how fast threads read and copy memory, and count what decoding reads for each token."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.runtime.artifacts import artifact_format
from edgetune_converters.gguf.joined import read_joined

PROBE_BYTES = 256 << 20
_PASSES = 5
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_PER_ROW = ("token_embd.weight", "per_layer_token_embd.weight")  # tables of which a token reads one row
_LOOKUPS = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "GroupQueryAttention": (7, 8),
    "RotaryEmbedding": (1, 2, 3),
}
"""Operator -> its inputs of which a token reads one row."""


@dataclass(frozen=True)
class MemorySpeed:
    """What threads reach together on arrays that fit no cache.

    Attributes:
        threads: Number of threads.
        read: Bytes per second of reading: the largest element of an f32 array.
        copied: Bytes per second of copying an array, read and written bytes together.
    """

    threads: int
    read: float
    copied: float

    @property
    def bandwidth(self) -> float:
        """The larger of both."""
        return max(self.read, self.copied)

    def best(self, other: MemorySpeed) -> MemorySpeed:
        """Return the better figures of two measurements."""
        return MemorySpeed(self.threads, max(self.read, other.read), max(self.copied, other.copied))


def measure_memory(threads: int, size: int | None = None) -> MemorySpeed:
    """Return the fastest of five passes over `size` bytes (PROBE_BYTES), which the threads share equally."""
    size = size or PROBE_BYTES
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    copies = [np.zeros_like(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:

        def fastest(work: Callable[[int], Any]) -> float:
            seconds = []
            for _ in range(_PASSES):
                start = time.perf_counter()
                list(pool.map(work, range(threads)))
                seconds.append(time.perf_counter() - start)
            return min(seconds)

        read = size / fastest(lambda part: parts[part].max())
        copied = 2 * size / fastest(lambda part: np.copyto(copies[part], parts[part]))
    return MemorySpeed(threads, read, copied)


def cache_size() -> int | None:
    """Return the bytes of the largest cache of the processor; None if the system does not give it."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=None)


def bytes_per_token(path: Path) -> int:
    """Return the bytes of weights that decoding one token reads: all, but one row of a lookup table counts as none.

    Of the experts of a layer those count that one token uses. Keys and values are not counted.
    """
    return _of_graph(path) if artifact_format(path) == "onnx" else _of_gguf(path)


def _of_gguf(path: Path) -> int:
    file = read_joined(path)
    names = {entry.name for entry in file.tensors}
    is_tied = "output.weight" not in names
    used = _share_of_experts(file.metadata)
    total = 0.0
    for entry in file.tensors:
        if entry.name in _PER_ROW and not (is_tied and entry.name == _PER_ROW[0]):
            continue
        total += entry.bytes * (used if "_exps." in entry.name else 1)
    return round(total)


def _share_of_experts(metadata: Mapping[str, Any]) -> float:
    family = metadata.get("general.architecture")
    count, used = (metadata.get(f"{family}.{key}") for key in ("expert_count", "expert_used_count"))
    return used / count if isinstance(count, int) and isinstance(used, int) and count else 1.0


def _of_graph(path: Path) -> int:
    from edgetune.runtime.onnx import model_file
    from edgetune.runtime.onnx.folder import OnnxFolder

    model = model_file.read(OnnxFolder.open(path).graph)
    looked_up, read, experts = set[str](), set[str](), dict[str, int]()
    for node in model.nodes:
        rows = _LOOKUPS.get(node.op_type, ())
        for place, name in enumerate(node.input):
            (looked_up if place in rows else read).add(name)
        if node.op_type == "QMoE":
            used = next((attribute.i for attribute in node.attribute if attribute.name == "k"), 1)
            experts |= dict.fromkeys(node.input[2:], used)
    total = 0.0
    for tensor in model.tensors:
        if tensor.name in looked_up and tensor.name not in read:
            continue
        used = experts.get(tensor.name)
        total += tensor.bytes * (min(1.0, used / tensor.shape[0]) if used and tensor.shape else 1)
    return round(total)


def processor_name() -> str:
    """Return the name of the processor, and how many this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPUs"
