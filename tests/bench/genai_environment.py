"""An environment with onnxruntime-genai beside ours, whose builder needs what training needs."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

GENAI, ONNX_IR = "0.18.0", "1.1.0"


def genai_python(directory: Path) -> Path:
    """The interpreter of an environment in `directory`, made the first time (some seconds, 60 MB).

    It has the pinned builder and the ONNX Runtime that is installed here; torch and transformers are seen through a
    path file and stay behind its own packages.
    """
    python = directory / "bin" / "python"
    ready = directory / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        wanted = [
            f"onnxruntime-genai=={GENAI}",
            f"onnx-ir=={ONNX_IR}",
            *(f"{name}=={version(name)}" for name in ("onnxruntime", "onnx")),
        ]
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted], check=True)
        purelib = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.run(purelib, check=True, capture_output=True, text=True).stdout.strip())
        ours = sysconfig.get_path("purelib")
        (packages / "zz_ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        ready.touch()
    return python
