"""CPU choice, the AMX probe, the GIL, the import, the library."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgetune_native
from edgetune_native import _library
from tests.native.backends import Backend, native


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_cpu_names_the_instruction_set_in_use(backend: Backend) -> None:
    cpu = backend.cpu()
    assert cpu.isa in ("scalar", "avx2", "avx512", "neon", "numpy")
    assert cpu.reason


def test_isa_override() -> None:
    code = "import edgetune_native as e; print(*e.cpu()[:2])"
    assert run(code, EDGETUNE_ISA="scalar").stdout == "scalar selected by EDGETUNE_ISA=scalar\n"
    refused = run(code, EDGETUNE_ISA="mmx")
    assert refused.returncode == 1
    assert "ImportError: EDGETUNE_ISA=mmx cannot be used; this CPU runs scalar" in refused.stderr


def test_edgetune_pure_selects_the_reference_backend() -> None:
    code = (
        "import sys, numpy as np, edgetune_native as e;"
        "print(e.cpu().isa, 'edgetune_native._native' in sys.modules, e.quantize(np.ones((1, 32), 'f4'), 'q8_0').shape)"
    )
    result = run(code, EDGETUNE_PURE="1")
    assert result.stdout == "numpy False (1, 34)\n", result.stderr


def test_import_is_light() -> None:
    code = "import sys, edgetune_native; print({'llama_cpp', 'gguf', 'torch', 'ctypes.util'} & set(sys.modules))"
    assert run(code).stdout == "set()\n"


def test_probe_amx(backend: Backend) -> None:
    probe = backend.probe_amx()
    assert probe.reason
    assert not (probe.usable and not probe.advertised)
    assert backend.probe_amx() is probe


def test_probe_amx_survives_a_fault() -> None:
    """Tried even where it is not advertised, in a process whose faulthandler must stay silent."""
    code = "import faulthandler as f; f.enable(); from edgetune_native import _native as n; print(n.probe_amx(True))"
    result = run(code)
    assert result.returncode == 0
    assert result.stderr == ""
    _, usable, reason = ast.literal_eval(result.stdout)
    assert usable or "tile" in reason or "not applicable" in reason


def test_ggml_library(backend: Backend) -> None:
    library = backend.ggml_library()
    assert Path(library.path).is_file()
    assert library.version[0].isdigit()


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="llama-cpp-python is not installed"):
        _library.ggml_path.__wrapped__()


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "libggml-base.so").write_text("no library")
    code = (
        "import sys; from edgetune_native import {0}\n"
        "try: {0}.open_ggml(sys.argv[1] if len(sys.argv) > 1 else {1!r})\n"
        "except ImportError as error: print(error)"
    )
    for implementation in ("_native", "_numpy"):
        result = run(code.format(implementation, str(tmp_path / "libggml-base.so")))
        assert "libggml-base.so could not be used" in result.stdout, result.stderr


# One call each, on the slowest kernels, of a tenth of a second or so: between two calls the lock would be free anyway.
WORK: dict[str, tuple[int, Callable[[Backend, NDArray[np.float32]], object]]] = {
    "libggml": (5000, lambda backend, rows: backend.quantize(rows, "mxfp4", threads=1)),
    "quantize": (3000, lambda backend, rows: backend.quantize(rows, "q4_k", threads=1)),
    "quantize_blocks": (3000, lambda backend, rows: backend.quantize_blocks(rows, 4, block_size=32, threads=1)),
    "nf4_roundtrip": (20000, lambda backend, rows: backend.nf4_roundtrip(rows, threads=1)),
    "compare": (20000, lambda backend, rows: backend.compare(rows, rows, np.zeros(len(rows), np.int64), threads=1)),
}


@pytest.mark.parametrize("work", WORK)
def test_the_gil_is_released(compiled: Backend, isas: tuple[str, ...], work: str) -> None:
    """While one call runs on another thread, this one keeps counting; with the GIL held it could not begin."""
    count, function = WORK[work]
    rows = np.tile(np.random.default_rng(0).standard_normal((500, 2560)).astype(np.float32), (count // 500, 1))
    inside, done = threading.Event(), threading.Event()
    native.use_isa(isas[0])

    def call() -> None:
        inside.set()
        function(compiled, rows)
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    inside.wait()
    ticks = 0
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    assert ticks >= 5  # one or two, if it were held: before the call begins and after it has ended


def test_public_functions_are_documented() -> None:
    for name in edgetune_native.__all__:
        assert getattr(edgetune_native, name).__doc__, name


def test_isa_of_tests_must_run_here() -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        native.use_isa("avx10")
