"""The default number of threads, and whether other processes need their cores.

The default is the physical cores that this process may use: two threads on one core share its vector units, and
decoding is bound by memory bandwidth. Threads should spin only on cores that no other process needs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple, Self

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_STATISTICS = Path("/proc/stat")

_SMALL_MODEL = 32 << 20
_MEASURED_SECONDS = 0.1  # the system counts in hundredths
_BACKGROUND = 0.3  # of a core, for the system itself


def default_threads(model_bytes: int) -> int:
    """Return the physical cores, or 1 for a model of less than 32 MiB.

    A token of a 1 MB model takes 0.5 ms in 150 operations, and threads synchronize after each operation: two threads
    were as fast as one on an idle machine, and 20 times slower on a busy one (52 tokens/s against 1268).
    """
    return 1 if model_bytes < _SMALL_MODEL else physical_cores()


def physical_cores() -> int:
    """Return the physical cores that this process may use, at most the container's quota, at least 1."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def usable_cpus() -> int:
    """Return the logical CPUs that this process may use, at most the container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota()))


def _core(cpu: int) -> tuple[str, str]:
    """Return (package, core) of a logical CPU; its own number if the system does not give them."""
    topology = _TOPOLOGY / f"cpu{cpu}" / "topology"
    try:
        package = (topology / "physical_package_id").read_text(encoding="ascii").strip()
        return package, (topology / "core_id").read_text(encoding="ascii").strip()
    except OSError:
        return "cpu", str(cpu)


def _quota() -> int:
    """Return the whole CPUs that a container may use (cgroup v2); a large number without a limit."""
    try:
        quota, period = _CGROUP_QUOTA.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return 1 << 16


class ProcessorTime(NamedTuple):
    """A point in time, with the CPU seconds of the whole machine and of this process until then."""

    at: float
    machine: float | None
    own: float

    @classmethod
    def now(cls) -> Self:
        """Return the current counters; `machine` is None on other systems than Linux."""
        used = os.times()
        return cls(time.monotonic(), _busy_seconds(), used.user + used.system)

    def leaves_idle(self, threads: int) -> bool:
        """Whether other processes have left `threads` cores idle since then, over at least 0.1 seconds.

        True if the system does not give the counters.
        """
        if self.machine is None:
            return True
        time.sleep(max(0.0, self.at + _MEASURED_SECONDS - time.monotonic()))
        now = ProcessorTime.now()
        if now.machine is None:
            return True
        others = (now.machine - self.machine) - (now.own - self.own)
        return others / (now.at - self.at) + threads <= (os.cpu_count() or 1) + _BACKGROUND


def _busy_seconds() -> float | None:
    """Return the seconds of all cores in /proc/stat that were neither idle nor waiting for a disk (man 5 proc)."""
    try:
        line = _STATISTICS.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _idle, _waiting, *interrupts = map(int, line[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
