"""Checks of this machine, one function each, without torch; what could crash runs in a child process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import edgetune

MIN_PYTHON = (3, 11)
LOW_MEMORY = 2 << 30
LOW_DISK = 5 << 30
KLD_LIMIT = 0.3  # nats; the self-test gives 0.044 at q4_k and 0.0003 at q8_0, a faulty kernel several nats
NBITS_LIMIT = 0.03  # relative error of a product; rounding activations to 8 bits gives 0.006
REBUILD = (
    "Rebuild it for this machine: `CMAKE_ARGS=\"-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16' "
    "-DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'\" pip install --force-reinstall --no-deps "
    "--no-cache-dir llama-cpp-python==0.3.36`"
)


class Status(StrEnum):
    """The result of a check."""

    OK = "ok"
    WARN = "warn"
    """It works, with a restriction."""
    FAIL = "fail"
    """Something essential is broken."""


@dataclass(frozen=True)
class Finding:
    """The result of a check: what was found, and what to do about it if it is not ok."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


def _ok(name: str, detail: str) -> Finding:
    return Finding(name, Status.OK, detail)


# -- software ----------------------------------------------------------------------------------------------------------


def python() -> Finding:
    """Check the version of Python."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return Finding("python", Status.FAIL, f"{found}, {wanted} or newer is needed", f"Install Python {wanted}")
    return _ok("python", f"{found} ({sys.executable})")


def package() -> Finding:
    """Report the version of edgetune."""
    return _ok("edgetune", edgetune.__version__)


def dependencies() -> Finding:
    """Check the requirements of a plain installation."""
    found, problems = _requirements(lambda marker: "extra" not in marker)
    if problems:
        return Finding("dependencies", Status.FAIL, "; ".join(problems), "Run `pip install --upgrade edgetune`")
    return _ok("dependencies", ", ".join(found))


def training_extra() -> Finding:
    """Check the requirements of the `train` extra."""
    found, problems = _requirements(lambda marker: re.search(r"extra\s*==\s*['\"]train['\"]", marker) is not None)
    if problems:
        hint = "Only training needs them: `pip install 'edgetune[train]'`"
        return Finding("training", Status.WARN, "; ".join(problems), hint)
    return _ok("training", ", ".join(found))


def _requirements(wanted: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Return (installed, problems) of the requirements whose marker is wanted."""
    try:
        stated = importlib.metadata.requires("edgetune") or []
    except importlib.metadata.PackageNotFoundError:
        return [], ["edgetune is not installed as a package"]
    found, problems = [], []
    for requirement in stated:
        text, _, marker = requirement.partition(";")
        if not wanted(marker):
            continue
        name, operator, bound = _parts(text)
        version = _version(name)
        if version is None:
            problems.append(f"{name} is not installed")
        elif not _satisfies(version, operator, bound):
            problems.append(f"{name} is {version}, required is {operator}{bound}")
        else:
            found.append(f"{name} {version}")
    return found, problems


def _parts(requirement: str) -> tuple[str, str, str]:
    """Split a requirement: `numpy>=1.26` -> (numpy, >=, 1.26)."""
    match = re.match(r"\s*([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?(==|>=)?\s*([\w.]*)", requirement)
    assert match is not None
    return match[1], match[2] or "", match[3]


def _satisfies(version: str, operator: str, bound: str) -> bool:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])

    if operator == "==":
        return numbers(version) == numbers(bound)
    return not operator or numbers(version) >= numbers(bound)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- processor ---------------------------------------------------------------------------------------------------------


def cpu() -> Finding:
    """Report which kernels run on this CPU, and why."""
    try:
        import edgetune_native
    except ImportError as error:
        return Finding("cpu", Status.FAIL, f"edgetune_native: {error}", "Reinstall edgetune; it needs a C compiler")
    chosen = edgetune_native.cpu()
    return _ok("cpu", f"{chosen.isa} kernels: {chosen.reason}; has {' '.join(chosen.features) or 'nothing special'}")


def cores() -> Finding:
    """Report the number of cores."""
    from edgetune.runtime.threads import physical_cores

    return _ok("cores", f"{physical_cores()} physical, {os.cpu_count()} logical; models run on the physical ones")


def amx() -> Finding:
    """Check AMX: some virtual machines advertise it and fault on its first instruction."""
    try:
        import edgetune_native
    except ImportError:
        return Finding("amx", Status.WARN, "not tried: edgetune_native is missing", "See the line `cpu`")
    probe = edgetune_native.probe_amx()
    if probe.advertised and not probe.usable:
        hint = "Models run without it, somewhat slower. " + REBUILD
        return Finding("amx", Status.WARN, probe.reason, hint)
    return _ok("amx", probe.reason)


def ggml() -> Finding:
    """Find libggml, which quantizes the types without a kernel of ours."""
    try:
        import edgetune_native

        library = edgetune_native.ggml_library()
    except (ImportError, OSError) as error:
        return Finding("ggml", Status.FAIL, str(error), "Run `pip install --force-reinstall llama-cpp-python==0.3.36`")
    return _ok("ggml", f"{library.version} ({library.path})")


def llama_cpp() -> Finding:
    """Run a small model through llama.cpp, in a process that may crash."""
    result = _child([sys.executable, "-m", "edgetune.runtime.llama.self_test"], 120)
    if result is None:
        return Finding("llama.cpp", Status.FAIL, "the self-test did not end within two minutes", REBUILD)
    if result.returncode < 0:
        died = signal.Signals(-result.returncode).name
        return Finding("llama.cpp", Status.FAIL, f"the self-test died of {died}", REBUILD)
    if result.returncode:
        return Finding("llama.cpp", Status.FAIL, f"the self-test failed: {_last(result)}", REBUILD)
    divergences: dict[str, float] = json.loads(result.stdout)
    said = ", ".join(f"KLD {value:.2g} at {type_}" for type_, value in divergences.items())
    if not all(value < KLD_LIMIT for value in divergences.values()):
        return Finding("llama.cpp", Status.FAIL, f"it computes wrongly: {said}", REBUILD)
    return _ok("llama.cpp", f"runs a test model: {said}")


def onnx_runtime() -> Finding:
    """Multiply quantized weights with ONNX Runtime, in a process that may crash."""
    upgrade = "Run `pip install --upgrade onnxruntime`"
    result = _child([sys.executable, "-m", "edgetune.runtime.onnx.self_test"], 120)
    if result is None:
        return Finding("onnxruntime", Status.FAIL, "the self-test did not end within two minutes", upgrade)
    if result.returncode:
        died = (
            f"died of {signal.Signals(-result.returncode).name}"
            if result.returncode < 0
            else "failed: " + _last(result)
        )
        return Finding("onnxruntime", Status.FAIL, f"the self-test {died}", upgrade)
    found = json.loads(result.stdout)
    said = ", ".join(f"error {value:.2%} in {bits} bits" for bits, value in found["errors"].items())
    if not all(value < NBITS_LIMIT for value in found["errors"].values()):
        return Finding("onnxruntime", Status.FAIL, f"{found['version']} computes wrongly: {said}", upgrade)
    if found["missing"]:
        wanted = max(found["missing"].values(), key=lambda text: tuple(map(int, text.split("."))))
        detail = f"{found['version']} lacks {', '.join(found['missing'])}, which some exports use"
        return Finding("onnxruntime", Status.WARN, detail, f"Run `pip install 'onnxruntime>={wanted}'`")
    return _ok("onnxruntime", f"{found['version']} multiplies quantized weights: {said}")


def _last(result: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of standard error."""
    return (result.stderr.strip().splitlines() or ["no message"])[-1]


# -- machine -----------------------------------------------------------------------------------------------------------


def gpu() -> Finding:
    """Check the GPU, which only training uses."""
    if shutil.which("nvidia-smi") is None:
        return Finding("gpu", Status.OK, "none found; training runs on the CPU, which suits small models only")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    result = _child(query, 20)
    if result is None or result.returncode or not result.stdout.strip():
        return Finding(
            "gpu", Status.WARN, "nvidia-smi is there but finds no GPU", "Check the driver; or train on the CPU"
        )
    card = "; ".join(line.strip() for line in result.stdout.strip().splitlines())
    return _torch_sees(card)


def _torch_sees(card: str) -> Finding:
    """Check in a child process whether torch can use the GPU; importing torch takes seconds."""
    if importlib.util.find_spec("torch") is None:
        return Finding("gpu", Status.WARN, f"{card}; torch is not installed", "Run `pip install 'edgetune[train]'`")
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    result = _child([sys.executable, "-c", code], 120)
    said = result.stdout.split() if result is not None and result.returncode == 0 else []
    if len(said) == 3 and said[2] == "True":
        return _ok("gpu", f"{card}; torch {said[0]} with CUDA {said[1]}")
    hint = "Install a torch built for your CUDA: see https://pytorch.org/get-started/locally"
    return Finding("gpu", Status.WARN, f"{card}; torch {' '.join(said[:1])} cannot use it", hint)


def memory() -> Finding:
    """Check the free memory."""
    available = _available_memory()
    if available is None:
        return _ok("memory", "unknown on this system")
    detail = f"{available / 2**30:.1f} GiB available"
    if available < LOW_MEMORY:
        return Finding("memory", Status.WARN, detail, "Close other programs; a 1B model at q4_k_m takes about 1.5 GiB")
    return _ok("memory", detail)


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def disk() -> Finding:
    """Check the free disk space of the working directory and of the temporary directory."""
    free = {str(place): shutil.disk_usage(place).free for place in (Path.cwd(), Path(tempfile.gettempdir()))}
    detail = ", ".join(f"{size / 2**30:.1f} GiB free in {place}" for place, size in free.items())
    if min(free.values()) < LOW_DISK:
        return Finding("disk", Status.WARN, detail, "Write elsewhere with -o, or free some space")
    return _ok("disk", detail)


def _child(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str] | None:
    """Run a process; return None if it does not end in time or cannot be started."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return None


CHECKS: tuple[Callable[[], Finding], ...] = (
    python, package, dependencies, training_extra, cpu, cores, amx, ggml, llama_cpp, onnx_runtime, gpu, memory, disk,
)  # fmt: skip
