"""`edgetune doctor`: each line with its verdict; broken machines are simulated check by check."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import edgetune_native
from edgetune.inspect import doctor
from edgetune.inspect.doctor import Finding, Status
from tests.cli_runner import edgetune


def test_every_check_passes_on_this_machine() -> None:
    result = edgetune("doctor")
    assert result.returncode == 0, result.stdout
    text = result.stdout.decode()
    for word in (
        "python",
        "edgetune",
        "dependencies",
        "cpu",
        "amx",
        "ggml",
        "llama.cpp",
        "onnxruntime",
        "gpu",
        "memory",
        "disk",
    ):
        assert word in text
    assert "KLD" in text


def test_findings_are_printed_as_json() -> None:
    findings = json.loads(edgetune("doctor", "--json").stdout)
    assert [finding["name"] for finding in findings][:2] == ["python", "edgetune"]
    assert {finding["status"] for finding in findings} <= {"ok", "warn"}


def test_torch_is_not_imported() -> None:
    code = "import sys; from edgetune.cli import run; run(['doctor', '--json']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_every_finding_that_is_not_ok_has_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    for check, breaks in BREAKAGES:
        with monkeypatch.context() as patch:
            breaks(patch)
            finding: Finding = getattr(doctor, check)()
            assert finding.status is not Status.OK, check
            assert finding.hint, check


def answer(code: int, out: str = "", err: str = "") -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *_: subprocess.CompletedProcess([], code, out, err)


def set_to(target: object, name: str, value: object) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(target, name, value)


class Usage(NamedTuple):
    free: int


def without_native(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "edgetune_native", None)


def with_gpu(result: Callable[..., object], torch: object = object()) -> Callable[[pytest.MonkeyPatch], None]:
    def breaks(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(shutil, "which", lambda _: "nvidia-smi")
        patch.setattr(doctor, "_child", result)
        patch.setattr(importlib.util, "find_spec", lambda _: torch)

    return breaks


BREAKAGES: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("python", set_to(sys, "version_info", (3, 9, 1, "final", 0))),
    ("dependencies", set_to(doctor, "_version", lambda _: None)),
    ("dependencies", set_to(doctor, "_version", lambda name: "0.0.1")),
    ("training_extra", set_to(doctor, "_version", lambda _: None)),
    ("cpu", without_native),
    ("amx", without_native),
    ("amx", set_to(edgetune_native, "probe_amx", lambda: edgetune_native.AmxProbe(True, False, "it faults"))),
    ("ggml", without_native),
    ("llama_cpp", set_to(doctor, "_child", lambda *_: None)),
    ("llama_cpp", set_to(doctor, "_child", answer(-4))),
    ("llama_cpp", set_to(doctor, "_child", answer(1, err="ImportError: no library"))),
    ("llama_cpp", set_to(doctor, "_child", answer(0, '{"q4_k": 3.0}'))),
    ("llama_cpp", set_to(doctor, "_child", answer(0, '{"q4_k": NaN}'))),
    ("onnx_runtime", set_to(doctor, "_child", lambda *_: None)),
    ("onnx_runtime", set_to(doctor, "_child", answer(-11))),
    ("onnx_runtime", set_to(doctor, "_child", answer(1, err="ImportError: no library"))),
    ("onnx_runtime", set_to(doctor, "_child", answer(0, '{"version": "1", "missing": {}, "errors": {"4": 0.9}}'))),
    ("onnx_runtime", set_to(doctor, "_child", answer(0, '{"version": "1", "missing": {}, "errors": {"4": NaN}}'))),
    (
        "onnx_runtime",
        set_to(doctor, "_child", answer(0, '{"version": "1", "missing": {"QMoE": "1.23"}, "errors": {"4": 0.01}}')),
    ),
    ("gpu", with_gpu(answer(9))),
    ("gpu", with_gpu(answer(0, "NVIDIA X, 8 GB, 570"), torch=None)),
    ("gpu", with_gpu(answer(0, "2.9.0 None False"))),
    ("memory", set_to(doctor, "_available_memory", lambda: 1 << 30)),
    ("disk", set_to(shutil, "disk_usage", lambda _: Usage(1 << 30))),
]


def test_a_gpu_that_torch_can_use_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(answer(0, "2.9.0 12.8 True"))(monkeypatch)
    assert doctor.gpu().status is Status.OK


def test_something_essential_that_is_broken_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgetune.cli import run

    monkeypatch.setattr(doctor, "_child", answer(-11))
    assert run(["doctor"]) == 1
    assert "died of SIGSEGV" in " ".join(capsys.readouterr().out.split())


def test_an_edgetune_that_is_not_installed_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert doctor.dependencies().status is Status.FAIL


@pytest.mark.parametrize(
    ("requirement", "parts"),
    [
        ("numpy>=1.26", ("numpy", ">=", "1.26")), ("llama-cpp-python==0.3.36", ("llama-cpp-python", "==", "0.3.36")),
        ("click", ("click", "", "")), ("x[extra] >= 2", ("x", ">=", "2")),
    ],
)  # fmt: skip
def test_requirements_are_read(requirement: str, parts: tuple[str, str, str]) -> None:
    assert doctor._parts(requirement) == parts


@pytest.mark.parametrize(
    ("version", "operator", "bound", "met"),
    [
        ("2.13.0+cpu", ">=", "2.7", True), ("1.9", ">=", "1.10", False), ("0.3.36", "==", "0.3.36", True),
        ("0.3.37", "==", "0.3.36", False), ("5", "", "", True),
    ],
)  # fmt: skip
def test_versions_compare_by_number(version: str, operator: str, bound: str, met: bool) -> None:
    assert doctor._satisfies(version, operator, bound) is met


def test_a_child_that_cannot_start_or_does_not_end(tmp_path: Path) -> None:
    assert doctor._child([str(tmp_path / "none")], 1) is None
    assert doctor._child([sys.executable, "-c", "import time; time.sleep(9)"], 0.2) is None
