"""A run directory: its manifest, its status and the results of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgetune.errors import RunDirectoryError
from edgetune.runs import lock
from edgetune.runs.manifest import RunManifest, TrainResults
from edgetune.runs.paths import RunPaths
from edgetune.runs.status import RunStatus, Stage
from edgetune_converters.reading.gguf_base import is_gguf


@dataclass(frozen=True)
class RunDirectory(RunPaths):
    """The paths and the manifest of one run. The manifest is read from disk each time."""

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Create the directory, or open an unfinished run for `--resume`; `finish()` completes it."""
        run = cls(path)
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open a finished run.

        Raises:
            RunDirectoryError: `path` is missing, unfinished, or not a run directory.
        """
        run = cls(path)
        match run.status:
            case RunStatus.FINISHED:
                _ = run.manifest  # a damaged one is an error now, not later
                return run
            case RunStatus.RUNNING | RunStatus.UNFINISHED:
                lock.refuse_if_written(path)
                is_adopted = run.manifest_file.exists() and run.manifest.adopted is not None
                start = "adopt ADAPTER --base BASE --data ROWS" if is_adopted else "train CONFIG.yaml"
                raise RunDirectoryError(
                    f"the run in {path} is not finished", f"Resume it with `edgetune {start} -o {path} --resume`"
                )
            case RunStatus.FOREIGN:
                raise RunDirectoryError(
                    f"{path} is not a run directory: it has no run.json",
                    "Give the directory that `edgetune train` wrote",
                )
            case RunStatus.ABSENT:
                raise RunDirectoryError(
                    f"there is no run in {path}", "Train one with `edgetune train CONFIG.yaml -o DIR`"
                )

    @property
    def status(self) -> RunStatus:
        """How far the run has come."""
        if self.finished_file.is_file():
            return RunStatus.FINISHED
        if lock.is_written(self.path):
            return RunStatus.RUNNING
        if self.unfinished_file.is_file():
            return RunStatus.UNFINISHED
        if not self.path.exists():
            return RunStatus.ABSENT
        others = {each.name for each in self.path.iterdir()} - {lock.FILE} if self.path.is_dir() else {self.path.name}
        return RunStatus.FOREIGN if others else RunStatus.ABSENT

    @property
    def is_finished(self) -> bool:
        """Whether the adapter is trained and the reference is captured."""
        return self.finished_file.is_file()

    @property
    def manifest(self) -> RunManifest:
        """The manifest; an empty one before it is first written.

        Raises:
            RunDirectoryError: The manifest is damaged or of a newer version.
        """
        return RunManifest.read(self.manifest_file) if self.manifest_file.exists() else RunManifest()

    def update_manifest(self, **entries: Any) -> None:
        """Replace top-level entries of the manifest, atomically."""
        RunManifest.model_validate(self.manifest.content() | entries).write(self.manifest_file)

    def finish(self) -> None:
        """Mark the run as finished: rename its manifest to run.json."""
        self.unfinished_file.replace(self.finished_file)

    def reopen(self) -> None:
        """Mark a finished run as unfinished, so that `--resume` completes what is missing."""
        self.finished_file.replace(self.unfinished_file)

    def record_stage(self, stage: Stage, results: Mapping[str, Any]) -> None:
        """Store the results of a stage, with the time."""
        stages = self.manifest.content().get("stages", {})
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.update_manifest(stages={**stages, stage.value: {**results, "finished": finished}})

    @property
    def train_results(self) -> TrainResults:
        """The results of the stage `train`.

        Raises:
            RunDirectoryError: The stage has not finished.
        """
        found = self.manifest.stages.train
        if found is None:
            raise RunDirectoryError(
                f"{self.path}: the stage 'train' has not finished",
                "Finish it with `edgetune train CONFIG.yaml --resume`",
            )
        return found

    @property
    def trained_adapter(self) -> dict[str, str]:
        """SHA-256 of the adapter's files as training wrote them, by name; empty for an older manifest."""
        train = self.manifest.stages.train
        return dict(train.adapter) if train else {}

    def base_directory(self) -> Path:
        """Return the directory of the base on this machine, or its GGUF file.

        Raises:
            RunDirectoryError: The base is no longer there.
        """
        base = self.manifest.base
        if base.path is None:
            raise self.damaged_manifest("it does not say where the base is")
        if not Path(base.path).is_dir() and not is_gguf(Path(base.path)):
            raise RunDirectoryError(
                f"the base {base.name!r} of this run is not in {base.path}",
                "Give its directory (or GGUF file) with --base; its files are checked against the hashes in run.json",
            )
        return Path(base.path)

    def config_here(self, base: Path | str | None = None) -> dict[str, Any]:
        """Return the stored configuration with the base and the tokenizer where they are on this machine.

        Args:
            base: Directory or GGUF file of the base, if it has moved.
        """
        config = {**self.manifest.config, "base": str(base or self.base_directory())}
        if self.manifest.adopted is not None and config.get("tokenizer"):
            config["tokenizer"] = str(self.tokenizer)
        return config

    def damaged_manifest(self, why: str) -> RunDirectoryError:
        """Return the error of a finished run whose manifest lacks something."""
        return RunDirectoryError(
            f"{self.finished_file} is damaged: {why}", "Restore the file from a copy, or train again"
        )

    def adopt(self, **sections: Any) -> None:
        """Replace sections of the configuration of a finished run that do not affect training.

        The manifest and the reference get a new modification time even where nothing changed: make compares times.
        """
        config = self.manifest.config
        if config != {**config, **sections}:
            self.update_manifest(config={**config, **sections})
        for file in (self.finished_file, self.reference_file):
            file.touch()
