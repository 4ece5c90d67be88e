"""How many threads a model runs on by default: at most the physical cores that this process may use.

Two threads on one core share its vector units, and generating is bound by memory; hyper-threads only add waiting.
And whether other work wants these cores, as threads should only spin on cores that nobody else wants.
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
_LONG_ENOUGH = 0.1  # seconds; the system counts in hundredths
_LITTLE = 0.3  # of a core, which any machine needs for itself


def default_threads(model_bytes: int) -> int:
    """Physical cores; one thread for a small model.

    A token of a 1 MB model is 0.5 ms of work in 150 operations, and the threads wait for each other after each of them:
    two threads were no faster than one on an idle machine and 20 times slower on a busy one (52 tokens/s, one: 1268).
    """
    return 1 if model_bytes < _SMALL_MODEL else physical_cores()


def physical_cores() -> int:
    """Physical cores among the CPUs this process may run on, at most the container's quota; at least 1."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def _core(cpu: int) -> tuple[str, str]:
    """(package, core) of a logical CPU; itself where the system does not say."""
    topology = _TOPOLOGY / f"cpu{cpu}" / "topology"
    try:
        package = (topology / "physical_package_id").read_text(encoding="ascii").strip()
        return package, (topology / "core_id").read_text(encoding="ascii").strip()
    except OSError:
        return "cpu", str(cpu)


def _quota() -> int:
    """Whole CPUs that a container may use (cgroup v2); a large number where there is no limit."""
    try:
        quota, period = _CGROUP_QUOTA.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return 1 << 16


class ProcessorTime(NamedTuple):
    """A moment, and seconds that all cores together and this process have worked until then."""

    at: float
    machine: float | None
    own: float

    @classmethod
    def now(cls) -> Self:
        """`machine` is None where the system does not say (it is Linux that does)."""
        used = os.times()
        return cls(time.monotonic(), _worked(), used.user + used.system)

    def leaves(self, threads: int) -> bool:
        """Whether other processes have since then left `threads` cores idle; at least a tenth of a second is looked at.

        True where that is unknown.
        """
        if self.machine is None:
            return True
        time.sleep(max(0.0, self.at + _LONG_ENOUGH - time.monotonic()))
        now = ProcessorTime.now()
        if now.machine is None:
            return True
        others = (now.machine - self.machine) - (now.own - self.own)
        return others / (now.at - self.at) + threads <= (os.cpu_count() or 1) + _LITTLE


def _worked() -> float | None:
    """Seconds of all cores in /proc/stat that were neither idle nor waiting for a disk (man 5 proc)."""
    try:
        line = _STATISTICS.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _idle, _waiting, *interrupts = map(int, line[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
