"""llama.cpp's own sources, from the source distribution of the pinned llama-cpp-python.

Its converter is the oracle of ours, its vocabularies are real ones with stated token ids. They are too large for this
repository: they are read from the directory in EDGETUNE_LLAMA_CPP (one that holds convert_hf_to_gguf.py), or else
downloaded once with pip into build/.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path

import pytest

from tests.locks import exclusive

_ROOT = Path(__file__).resolve().parents[2]
_VARIABLE = "EDGETUNE_LLAMA_CPP"
_WANTED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "models/ggml-vocab-")


@cache
def _source() -> Path | str:
    """The directory, or why it is not available."""
    if os.environ.get(_VARIABLE):
        return Path(os.environ[_VARIABLE])
    kept = _ROOT / "build" / "llama-cpp-source"
    with exclusive(kept):  # another worker may want it at the same time
        return _kept(kept)


def _kept(kept: Path) -> Path | str:
    if not (kept / "convert_hf_to_gguf.py").is_file():
        pinned = (_ROOT / "constraints.txt").read_text(encoding="utf-8")
        pin = next(line for line in pinned.splitlines() if line.startswith("llama_cpp_python"))
        kept.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", "-d", str(kept), pin]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"the source distribution of {pin} cannot be downloaded, and {_VARIABLE} is not set"
        _unpack(kept)
    return kept


def directory() -> Path:
    """Return llama.cpp's directory; skip the test with the reason where it is not available."""
    found = _source()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def _unpack(kept: Path) -> None:
    """Keep the needed files of the archive, and delete the archive."""
    archive = next(kept.glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        for member in packed:
            name = member.name.partition("/vendor/llama.cpp/")[2]
            content = packed.extractfile(member) if member.isfile() and name.startswith(_WANTED) else None
            if content is not None:
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                (kept / name).write_bytes(content.read())
    archive.unlink()
