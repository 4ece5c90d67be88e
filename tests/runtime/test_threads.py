"""The default number of threads follows the machine, the container and the model."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from edgetune.runtime import threads


def machine(root: Path, cores: dict[int, tuple[int, int]]) -> None:
    """CPU -> (package, core) as Linux shows it."""
    for cpu, (package, core) in cores.items():
        folder = root / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")


@pytest.fixture
def hyper_threaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    machine(tmp_path, {0: (0, 0), 1: (0, 1), 2: (0, 0), 3: (0, 1), 4: (1, 0), 5: (1, 0)})
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    return tmp_path


def test_hyper_threads_count_once(hyper_threaded: Path) -> None:
    assert threads.physical_cores() == 3


@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 3), ("x", 3)])
def test_a_container_gets_no_more_than_its_quota(hyper_threaded: Path, quota: str, cores: int) -> None:
    (hyper_threaded / "cpu.max").write_text(quota)
    assert threads.physical_cores() == cores


def test_only_cpus_of_the_affinity_mask_count(hyper_threaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    assert threads.physical_cores() == 1


def test_without_a_topology_every_cpu_is_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert threads.physical_cores() == 2


def test_a_small_model_runs_on_one_thread(hyper_threaded: Path) -> None:
    assert threads.default_threads(1 << 20) == 1
    assert threads.default_threads(1 << 30) == 3


class Clock:
    """A machine of four cores that counts in hundredths of seconds; other processes use `others` of them."""

    def __init__(self, statistics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.statistics, self.now, self.own, self.others = statistics, 0.0, 0.0, 0.0
        self._worked = 100.0
        monkeypatch.setattr(threads, "_STATISTICS", statistics)
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        monkeypatch.setattr(os, "sysconf", lambda _: 100)
        monkeypatch.setattr(os, "times", lambda: os.times_result((self.own / 2, self.own / 2, 9.0, 9.0, 9.0)))
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.pass_)
        self.pass_(0)

    def pass_(self, seconds: float) -> None:
        """This process uses one core all the time."""
        self.now += seconds
        self.own += seconds
        self._worked += seconds * (1 + self.others)
        ticks = round(100 * self._worked)
        self.statistics.write_text(f"cpu  {ticks - 30} 10 10 7777 888 4 3 3 555 66\ncpu0 1 2 3 4 5 6 7 0 0 0\n")


@pytest.mark.parametrize(
    ("others", "leaves"),
    [(0.0, True), (0.2, True), (1.0, True), (2.0, True), (2.2, True), (2.5, False), (3.0, False), (4.0, False)],
)
@pytest.mark.parametrize("passed", [0.0, 0.05, 2.0])
def test_two_of_four_cores_are_idle_while_others_use_at_most_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: float, leaves: bool, passed: float
) -> None:
    clock = Clock(tmp_path / "stat", monkeypatch)
    before = threads.ProcessorTime.now()
    clock.others = others
    clock.pass_(passed)
    assert before.leaves_idle(2) is leaves
    assert clock.now == max(passed, 0.1), "a model is not kept waiting for longer"


@pytest.mark.parametrize("text", [None, "", "cpu 1 2", "cpu a b c d e f g"])
def test_without_counters_all_cores_count_as_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.setattr(threads, "_STATISTICS", tmp_path / "stat")
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert threads.ProcessorTime.now().leaves_idle(64)
