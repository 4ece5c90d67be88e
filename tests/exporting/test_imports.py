"""What an export does not need is not imported: half a second before the first weight is read is half a second."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.converters import tiny

ASK = """
import sys
from edgetune.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*(name for name in sys.modules))
"""
NOT_NEEDED = {
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "edgetune.publish.model_card",
    "edgetune.validation",
    "rich.table",
}


def test_an_export_imports_what_it_needs(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base")
    command = [
        sys.executable,
        "-c",
        ASK,
        "merge-export",
        "--base",
        str(base),
        "-q",
        "q8_0",
        "-o",
        str(tmp_path / "x.gguf"),
    ]
    done = subprocess.run([*command, "--allow-fallback"], capture_output=True, text=True, check=True)
    found = set(done.stdout.splitlines()[-1].split())
    assert "edgetune_converters.exporting" in found
    assert not found & NOT_NEEDED
