"""Stock llama-perplexity: built once from the pinned source distribution, run, and its figures read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tests.locks import exclusive

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/llama-perplexity"
_NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?|-?nan|-?inf)"
_LINE = re.compile(rf"^(.*?(?:PPL|KLD|Δp|Same top p).*?)\s*:\s*{_NUMBER}(?:\s*±\s*{_NUMBER})?", re.MULTILINE)
_LAST = "Same top p:"


def source() -> Path:
    """llama.cpp as the pinned llama-cpp-python distributes it; LLAMA_CPP_SDIST may name an archive that is there."""
    pinned = version("llama-cpp-python")
    root = BUILD / f"llama_cpp_python-{pinned}"
    if not root.is_dir():
        BUILD.mkdir(parents=True, exist_ok=True)
        archive = Path(os.environ.get("LLAMA_CPP_SDIST") or _downloaded(pinned))
        with tarfile.open(archive) as opened:
            opened.extractall(BUILD, filter="data")
    return root / "vendor/llama.cpp"


def _downloaded(pinned: str) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    subprocess.run([*pip, f"llama-cpp-python=={pinned}", "-d", str(BUILD)], check=True)
    return next(BUILD.glob(f"llama_cpp_python-{pinned}.tar.gz"))


@cache
def program() -> Path:
    """The executable, about five minutes of two cores the first time; another worker waits meanwhile."""
    with exclusive(BUILD):
        return _built()


def _built() -> Path:
    found = BUILD / "cmake/perplexity/llama-perplexity"
    if not found.is_file():
        spec = find_spec("llama_cpp")
        assert spec is not None
        assert spec.origin is not None
        cmake = [str(Path(sys.executable).with_name("cmake")), "-S", str(Path(__file__).with_name("perplexity"))]
        options = [f"-DLLAMA_SOURCE={source()}", f"-DLLAMA_LIBRARIES={Path(spec.origin).parent / 'lib'}"]
        _printing_on_failure([*cmake, "-B", str(BUILD / "cmake"), *options])
        build = [cmake[0], "--build", str(BUILD / "cmake"), "--target", "llama-perplexity", "-j", str(os.cpu_count())]
        _printing_on_failure(build)
    return found


def _printing_on_failure(command: list[str]) -> None:
    # a library that an earlier test imported may have set CXX to a C compiler, which does not link libstdc++
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    assert result.returncode == 0, f"{command}:\n{result.stdout.decode('utf-8', 'replace')[-4000:]}"


def run(*arguments: str | Path | int, complete: str = "") -> str:
    """What it prints. Its log is written by another thread and sometimes loses its end: run again until it is there."""
    for _ in range(10):
        result = subprocess.run([program(), *map(str, arguments)], capture_output=True, timeout=600)
        text = (result.stdout + result.stderr).decode("utf-8", "replace")
        assert result.returncode == 0, text[-2000:]
        if complete in text:
            return text
    raise AssertionError(f"llama-perplexity never printed {complete!r}")


def write_base(model: Path, text: Path, base: Path, context: int, threads: int) -> None:
    """The base file of a model."""
    run("-m", model, "-f", text, "-c", context, "-b", context, "-t", threads, "--kl-divergence-base", base)


def statistics(model: Path, base: Path, context: int, threads: int) -> dict[str, tuple[float, float | None]]:
    """What it says about a model beside a base file: words -> (value, error), as printed."""
    text = run(
        "-m", model, "-c", context, "-b", context, "-t", threads, "--kl-divergence", "--kl-divergence-base", base,
        complete=_LAST,
    )  # fmt: skip
    return parsed(text[text.index("====== Perplexity statistics") :])


def parsed(text: str) -> dict[str, tuple[float, float | None]]:
    """The lines of a table of statistics."""
    return {
        words.strip(): (float(value), float(error) if error else None) for words, value, error in _LINE.findall(text)
    }
