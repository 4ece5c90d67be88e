"""The default number of threads follows the machine, the container and the model."""

from __future__ import annotations

import os
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


def test_only_cpus_that_may_be_used_count(hyper_threaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    assert threads.physical_cores() == 1


def test_a_system_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert threads.physical_cores() == 2


def test_a_small_model_runs_on_one(hyper_threaded: Path) -> None:
    assert threads.default_threads(1 << 20) == 1
    assert threads.default_threads(1 << 30) == 3
