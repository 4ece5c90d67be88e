"""How a file runs fastest on this machine, as `edgetune fit` measured it, remembered in the user's cache directory."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Self

from edgetune.runtime.artifacts import artifact_format
from edgetune.runtime.threads import physical_cores
from edgetune_converters.files.atomic import write_text

_VERSION = 1
_LIBRARIES = {"gguf": "llama-cpp-python", "onnx": "onnxruntime"}
_SAMPLE = 1 << 20  # bytes of a file's beginning and end that its hash takes in
_ROWS = 6  # of `MachineFit.costs`


@dataclass(frozen=True)
class MachineFit:
    """Settings under which a file runs.

    Attributes:
        threads: Threads that evaluate the model; None: the runtime's default.
        repacks: Whether llama.cpp may repack weights for its fast matrix products.
        flash_attention: Whether llama.cpp computes attention in one fused operation; None: as it chooses.
        batch: Tokens of a prompt that llama.cpp evaluates at once.
        maps_file: Whether llama.cpp maps the file into memory in place of reading it.
        quantizes_cache: Whether llama.cpp keeps keys and values in q8_0, which changes answers: only measured.
        costs: Seconds of batches of 1, 2, 4, 8, 16 and 32 rows, relative to the first; None where not measured.
        measured: When it was measured, in seconds since 1970; 0 for settings that were not.
    """

    threads: int | None = None
    repacks: bool = True
    flash_attention: bool | None = None
    batch: int = 512
    maps_file: bool = True
    quantizes_cache: bool = False
    costs: tuple[float, ...] | None = None
    measured: float = 0.0

    def describe(self) -> str:
        """Return the settings in words."""
        parts = [] if self.threads is None else [f"{self.threads} thread{'s' if self.threads > 1 else ''}"]
        attention = {True: "flash attention", False: "no flash attention", None: ""}[self.flash_attention]
        others = [
            "" if self.repacks else "weights not repacked", attention, "" if self.maps_file else "file not mapped",
            f"batches of {self.batch}" if self.batch != _DEFAULT.batch else "",
        ]  # fmt: skip
        return ", ".join([*parts, *(other for other in others if other)]) or "the defaults"

    @classmethod
    def from_json(cls, content: Any) -> Self | None:
        """Return the settings of a JSON object; None if it is not one that this version wrote."""
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or content.keys() != names | {"version"} or content["version"] != _VERSION:
            return None
        values = {name: content[name] for name in names}
        costs = values["costs"]
        has_types = (
            (values["threads"] is None or (type(values["threads"]) is int and 0 < values["threads"] <= 4096))
            and all(type(values[name]) is bool for name in ("repacks", "maps_file"))
            and values["quantizes_cache"] is False
            and values["flash_attention"] in (True, False, None)
            and type(values["batch"]) is int and 0 < values["batch"] <= _DEFAULT.batch
            and isinstance(values["measured"], (int, float))
            and (costs is None or (isinstance(costs, list) and len(costs) == _ROWS and all(_is_cost(c) for c in costs)))
        )  # fmt: skip
        return cls(**{**values, "costs": costs and tuple(map(float, costs))}) if has_types else None


_DEFAULT = MachineFit()


def _is_cost(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < 1e6


def find_fit(path: Path) -> MachineFit | None:
    """Return what `edgetune fit` remembered for a file on this machine; None if there is nothing."""
    try:
        if not _folder().is_dir():
            return None
        return MachineFit.from_json(json.loads(fit_file(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RuntimeError):
        return None


def remember_fit(path: Path, fit: MachineFit) -> Path:
    """Remember settings for a file; return where. Raises OSError."""
    file = fit_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"version": _VERSION, **asdict(fit)}) + "\n")
    return file


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "edgetune/fits"


def fit_file(path: Path) -> Path:
    """Return where the settings for a file are, by machine, file and version of the library. Raises OSError."""
    from importlib.metadata import PackageNotFoundError, version  # takes as long as opening a small file

    library = _LIBRARIES[artifact_format(path) or "onnx"]
    try:
        installed = version(library)
    except PackageNotFoundError:
        installed = ""
    key = json.dumps([*_machine(), _file_hash(path), library, installed])
    return _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


@cache
def _machine() -> tuple[str, int, int]:
    """Return processor, physical cores and logical CPUs that this process may use."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{platform.machine()} {name}", physical_cores(), allowed


def _file_hash(path: Path) -> str:
    """Return a hash of the sizes of a model's files, and of the beginning and end of each."""
    digest = hashlib.sha256()
    folder = path if path.is_dir() else path.parent if path.suffix == ".onnx" else None
    for file in sorted(folder.glob("*.onnx*")) if folder else [path]:
        size = file.stat().st_size
        digest.update(f"{file.name if folder else ''}:{size}:".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE))
            stream.seek(max(0, size - _SAMPLE))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def now() -> float:
    """Return the time for `MachineFit.measured`."""
    return round(time.time(), 1)
