"""The layout of a run directory; the only place that knows its file names.

runs/NAME/
  run.json       the manifest: resolved config, versions, device, base identity, data hashes, results of training;
                 until the run is finished it is called run.unfinished.json, so that a tool such as make can
                 take the existence of run.json for the fact
  adapter/       as PEFT writes it
  tokenizer/     the base's own files, plus the chat template that training used
  reference/     what the trained model says on held-out rows
  checkpoints/   for --resume
  run.lock       while a process writes here (see run_lock)
  logs/          metrics.jsonl and TensorBoard events
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune.errors import RunDirectoryError
from edgetune.runs import atomic, lock

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class RunDirectory:
    """Paths and manifest of one run. `manifest` is read from disk each time: the file is the truth."""

    path: Path

    @property
    def finished_file(self) -> Path:
        """run.json, which exists once the run is finished."""
        return self.path / "run.json"

    @property
    def unfinished_file(self) -> Path:
        """The manifest of a run that is going on, or was stopped."""
        return self.path / "run.unfinished.json"

    @property
    def is_finished(self) -> bool:
        """Whether training and reference capture have run to their end."""
        return self.finished_file.is_file()

    @property
    def manifest_file(self) -> Path:
        """Where the manifest lies now."""
        return self.finished_file if self.is_finished else self.unfinished_file

    @property
    def adapter(self) -> Path:
        """The PEFT adapter."""
        return self.path / "adapter"

    @property
    def tokenizer(self) -> Path:
        """The base's tokenizer files and the chat template of training."""
        return self.path / "tokenizer"

    @property
    def reference(self) -> Path:
        """The stored outputs of base and trained model."""
        return self.path / "reference"

    @property
    def reference_file(self) -> Path:
        """The reference's manifest, which is written anew with it."""
        return self.reference / "reference.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the trainer."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Metrics and TensorBoard events."""
        return self.path / "logs"

    @property
    def artifacts(self) -> Path:
        """Where merge-export writes unless told otherwise."""
        return self.path / "artifacts"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line: step, loss, learning rate, tokens per second, evaluation loss."""
        return self.logs / "metrics.jsonl"

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Make a run directory, or open an unfinished one that `--resume` goes on with; `finish()` completes it."""
        run = cls(path)
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run directory; RunDirectoryError if `path` is not one."""
        run = cls(path)
        if run.unfinished_file.is_file() and not run.is_finished:
            lock.refuse_if_written(path)
            raise RunDirectoryError(
                f"the run in {path} has not finished", f"Go on with `edgetune train CONFIG.yaml -o {path} --resume`."
            )
        if not path.exists():
            raise RunDirectoryError(
                f"there is no run directory {path}", "Make one with `edgetune train CONFIG.yaml -o DIR`."
            )
        if not run.manifest_file.is_file():
            raise RunDirectoryError(
                f"{path} is not a run directory: it has no run.json", "Give the directory that `edgetune train` wrote."
            )
        _ = run.manifest
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        """The parsed run.json ({} before it is first written)."""
        if not self.manifest_file.exists():
            return {}
        try:
            manifest = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise RunDirectoryError(
                f"{self.manifest_file} is not valid JSON", "Train again, or restore the file."
            ) from None
        if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
            raise RunDirectoryError(
                f"{self.manifest_file} is not a manifest of version {MANIFEST_VERSION}",
                "It was written by another version of edgetune; use that one, or train again.",
            )
        return manifest

    def update_manifest(self, **entries: Any) -> None:
        """Replace top-level entries of run.json, atomically."""
        write_json(self.manifest_file, {"version": MANIFEST_VERSION, **self.manifest, **entries})

    def finish(self) -> None:
        """Declare the run complete: the manifest takes its final name."""
        self.unfinished_file.replace(self.finished_file)

    def reopen(self) -> None:
        """Declare a complete run unfinished, so that `--resume` makes what is missing of it."""
        self.finished_file.replace(self.unfinished_file)

    def record_stage(self, stage: str, results: Mapping[str, Any]) -> None:
        """Store a stage's results; the stages after it read their defaults from there."""
        stages = dict(self.manifest.get("stages", {}))
        stages[stage] = {**results, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
        self.update_manifest(stages=stages)

    def stage(self, stage: str) -> dict[str, Any]:
        """What `record_stage` stored; RunDirectoryError if that stage has not finished."""
        stages: dict[str, dict[str, Any]] = self.manifest.get("stages", {})
        if stage not in stages:
            raise RunDirectoryError(
                f"{self.path}: the stage {stage!r} has not finished",
                "Finish it with `edgetune train CONFIG.yaml --resume`.",
            )
        return stages[stage]

    @property
    def trained_adapter(self) -> dict[str, str]:
        """SHA-256 of the adapter's files as training left them, by name; {} where an older manifest does not say."""
        files: dict[str, str] = self.manifest.get("stages", {}).get("train", {}).get("adapter", {})
        return files

    def base_directory(self) -> Path:
        """Where the base lies on this machine; RunDirectoryError with what to do if it is gone."""
        base = self.manifest.get("base", {})
        path = Path(base.get("path", ""))
        if not base.get("path") or not path.is_dir():
            raise RunDirectoryError(
                f"the base {base.get('name')!r} that this run was trained on is not at {path}",
                "Give its directory with --base DIR; its files are checked against the hashes in run.json.",
            )
        return path

    def adopt(self, **sections: Any) -> None:
        """Take sections of a configuration that had no say in training into a finished run.

        Its manifest and reference are newer than the configuration then, also where nothing differs: make compares
        times.
        """
        config = self.manifest["config"]
        if config != {**config, **sections}:
            self.update_manifest(config={**config, **sections})
        for file in (self.finished_file, self.reference_file):
            file.touch()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(atomic.dumps(value) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
