"""Smoke test of an installed wheel: run it with the Python of an environment that holds edgetune and nothing else.

    python -m venv /tmp/clean && /tmp/clean/bin/pip install dist/*.whl && /tmp/clean/bin/python tests/smoke/smoke.py

It uses the base model of the sample, but no code of this repository, no torch and no network.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "samples/smart-home/base"
COMMAND = Path(sys.executable).with_name("edgetune")


def edgetune(*arguments: str | Path, code: int = 0) -> str:
    """Run the installed command; check its exit code and that an error is no traceback."""
    print("$ edgetune", *arguments, flush=True)
    result = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    if result.returncode != code or "Traceback" in result.stderr:
        raise SystemExit(f"exit code {result.returncode}, expected {code}\n{result.stdout}{result.stderr}")
    return result.stdout


def check(what: str, passed: bool) -> None:
    print(("ok    " if passed else "FAILED"), what, flush=True)
    if not passed:
        raise SystemExit(1)


def check_installation() -> None:
    for name in ("edgetune", "edgetune_converters", "edgetune_native"):
        module = importlib.import_module(name)
        file = Path(module.__file__ or "")
        check(f"{name} is imported from the environment", Path(sys.prefix) in file.parents)
        check(f"{name} is typed", file.with_name("py.typed").is_file())
    native = importlib.import_module("edgetune_native._native")
    check("the extension uses the stable ABI", ".abi3." in Path(native.__file__ or "").name)
    check("torch is not needed", importlib.util.find_spec("torch") is None)


def check_commands(folder: Path) -> None:
    check("--version", edgetune("--version").split()[-1] == importlib.metadata.version("edgetune"))
    edgetune("--help")
    check("doctor --json", bool(json.loads(edgetune("doctor", "--json"))))
    file = folder / "base-q8_0.gguf"
    edgetune("merge-export", "--base", BASE, "-q", "q8_0", "-o", file)
    check("a GGUF file and its receipt", file.is_file() and file.with_name(f"{file.name}.receipt.json").is_file())
    check("inspect", json.loads(edgetune("inspect", file, "--json"))["model"]["architecture"] == "llama")
    check("an answer", bool(edgetune("run", file, "-p", "turn on the light", "--max-tokens", "8").strip()))
    edgetune("merge-export", "--base", BASE, "--format", "onnx", "-q", "int4", "-o", folder / "onnx")
    edgetune("run", folder / "onnx", "-p", "turn on the light", "--max-tokens", "8")
    file.write_bytes(file.read_bytes()[:1000])
    edgetune("inspect", file, code=1)
    edgetune("merge-export", "--base", BASE, "-q", "q9", "-o", folder / "x.gguf", code=2)


def main() -> None:
    """Check the installation, then the commands."""
    check_installation()
    folder = Path(tempfile.mkdtemp(prefix="edgetune-smoke-"))
    try:
        check_commands(folder)
    finally:
        shutil.rmtree(folder)
    print("the smoke test passed")


if __name__ == "__main__":
    main()
