"""Free memory of the machine and of its container."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgetune.training import processor

MEMINFO = "MemTotal:       100 kB\nMemFree:         10 kB\nMemAvailable:    40 kB\n"


def test_memory_that_is_available_counts_as_free(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert processor._available(tmp_path / "meminfo") == 40 * 1024


def test_a_machine_without_meminfo_has_half_of_its_memory_free(tmp_path: Path) -> None:
    assert 0 < processor._available(tmp_path / "meminfo") < 2**50


@pytest.mark.parametrize(("limit", "left"), [("1000", 1000 - 700 + 300), ("max", float("inf"))])
def test_the_limit_of_a_container_counts(tmp_path: Path, limit: str, left: float) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 200\n")
    assert processor._left_in_container(tmp_path) == left
    assert processor._left_in_container(tmp_path / "none") == float("inf")


FAULTS = """
import ctypes, resource, sys
from edgetune.training.processor import keep_pages
if sys.argv[1] == "keep":
    keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 2**26
def use():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of glibc")
def test_memory_that_is_freed_is_used_again_without_new_pages() -> None:
    counts = {
        mode: int(
            subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True).stdout
        )
        for mode in ("keep", "default")
    }
    pages = 5 * 2**26 // 4096
    assert counts["keep"] < pages / 100
    assert counts["default"] > counts["keep"]
