"""The machine that trains: its free memory, and an allocator that keeps its pages."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Options of mallopt in malloc.h of glibc."""
_LARGEST = 2**30
_TOP_PAD = 64 * 2**20


def free_memory() -> float:
    """Return the bytes that a training may take: of the GPU if there is one, else of the machine or its container."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return min(_available(Path("/proc/meminfo")), _left_in_container(_CGROUP))


def _available(file: Path) -> float:
    with suppress(OSError, StopIteration, ValueError):
        lines = file.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):
        return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES") / 2
    return 0.0


def _left_in_container(directory: Path) -> float:
    """Return what the limit of a control group leaves; files that are cached count as free."""
    with suppress(OSError, ValueError):
        limit, used = (int((directory / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        stated = (line.split() for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = sum(int(value) for name, value in stated if name in ("active_file", "inactive_file"))
        return float(limit - used + cached)
    return float("inf")


def keep_pages() -> None:
    """Let glibc keep the memory that a step frees for the next step.

    By default it returns large blocks to the system, which clears each of their pages again at the next step.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - another libc has other options
        for option, value in ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, _TOP_PAD)):
            library.mallopt(option, value)
