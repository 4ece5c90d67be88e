"""What is exported: a run, or a base model with or without an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.errors import ConfigError, RunDirectoryError
from edgetune.objectives import SCORERS
from edgetune.runs.directory import RunDirectory
from edgetune.runs.manifest import RunManifest

if TYPE_CHECKING:
    from edgetune_converters.merging.score_head import ScoreHead


@dataclass(frozen=True)
class Source:
    """The model to export and where its parts are."""

    name: str
    """Name of the model, from which the names of the files are made."""
    base: Path
    """Base model: a directory or a GGUF file."""
    adapter: Path | None
    tokenizer: Path | None
    """Directory of tokenizer and chat template. None: those beside the adapter, over those of the base."""
    default_folder: Path
    """Where artifacts go without `-o`."""
    run: RunDirectory | None = None
    manifest: RunManifest = field(default_factory=RunManifest)
    """The run's manifest; an empty one without a run."""
    expected_base: Mapping[str, str] | None = None
    """SHA-256 of the base that the run was trained on, by file name."""
    expected_adapter: Mapping[str, str] | None = None
    """SHA-256 of the adapter as training left it, by file name."""
    trainings: Mapping[Path, RunManifest] = field(default_factory=dict)
    """The runs that the adapters come from -> their manifests."""
    further_adapters: tuple[Path, ...] = ()
    """Adapters that are combined with the first."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata that `edgetune verify` and the rendering of the file need."""
    score_head: ScoreHead | None = None
    """Score head of a reward model."""

    @property
    def bnb_record(self) -> Mapping[str, Any] | None:
        """Return how bitsandbytes quantized the base of the run; None if it did not."""
        return self.manifest.quantized

    @property
    def tasks(self) -> Sequence[str]:
        """Return the tasks of multitask prompt tuning by number; none of another method or of an unknown training."""
        manifest = next(iter(self.trainings.values()), self.manifest)
        return (manifest.config.get("adapter") or {}).get("tasks") or ()

    @property
    def captured_task(self) -> int | None:
        """Return the number of the task that the run's reference was captured with; None without several tasks."""
        return None if self.run is None else self.manifest.captured_task

    @property
    def export_section(self) -> Mapping[str, Any]:
        """Return the `export:` section of the run's configuration."""
        section: Mapping[str, Any] = self.manifest.config.get("export", {})
        return section


def find_source(
    run: Path | None, base: Path | None = None, adapter: Path | None = None, further_adapters: Sequence[Path] = ()
) -> Source:
    """Find the run, or the base and its adapters. With a run, `base` is where the base of the run is now.

    Raises:
        ConfigError: Nothing is named, or a run and an adapter are.
    """
    if run is None and base is None:
        raise ConfigError("nothing to export was named", "Give a run directory, or --base DIR (and --adapter DIR)")
    if run is not None and adapter is not None:
        raise ConfigError(f"both a run ({run}) and an adapter ({adapter}) were given", "Give one of them")
    if run is not None:
        return _source_of_run(run, base)
    assert base is not None
    adapters = [] if adapter is None else [adapter, *further_adapters]
    name = "+".join(path.resolve().name.removesuffix(".gguf") for path in adapters or [base])
    runs = [_run_of_adapter(path) for path in adapters]
    return Source(
        name=name,
        base=base,
        adapter=adapter,
        tokenizer=runs[0].tokenizer if runs and runs[0] and runs[0].tokenizer.is_dir() else None,
        default_folder=Path.cwd(),
        trainings=_trainings(runs),
        score_head=_score_head_beside(adapters, _trainings(runs)),
        further_adapters=tuple(further_adapters),
    )


def _score_head_beside(adapters: Sequence[Path], trainings: Mapping[Path, RunManifest]) -> ScoreHead | None:
    """Return the score head of the run or checkpoint in which an adapter lies; None for one of a language model.

    Raises:
        ConfigError: Several adapters are combined, and one is of a reward model.
    """
    found = {path: _score_head(RunDirectory(path), manifest, adapters[0]) for path, manifest in trainings.items()}
    heads = {path: head for path, head in found.items() if head is not None}
    if heads and len(adapters) > 1:
        path = next(iter(heads))
        raise ConfigError(
            f"{path} is the run of a reward model, whose score head fits its own adapter alone",
            f"Export it alone: `edgetune merge-export {path}`",
        )
    return next(iter(heads.values()), None)


def _source_of_run(run: Path, base: Path | None) -> Source:
    from edgetune.data.chat import options_metadata
    from edgetune.reference import golden

    directory = RunDirectory.open(run)
    manifest = directory.manifest
    if not manifest.base.files:
        raise directory.damaged_manifest("it has no hashes of the base")
    return Source(
        name=manifest.config["name"],
        base=base or directory.base_directory(),
        adapter=directory.adapter,
        tokenizer=directory.tokenizer,
        default_folder=directory.artifacts,
        run=directory,
        manifest=manifest,
        trainings={directory.path: manifest},
        expected_base=manifest.base.files,
        expected_adapter=directory.trained_adapter,
        metadata={**golden.metadata(directory), **options_metadata(manifest.template_options)},
        score_head=_score_head(directory, manifest),
    )


def _score_head(run: RunDirectory, manifest: RunManifest, adapter: Path | None = None) -> ScoreHead | None:
    """Return the score head of a reward model, that beside an adapter first; None for other runs.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    objective = manifest.config.get("objective") or {}
    if objective.get("kind") not in SCORERS:
        return None
    from edgetune.data.text_tokenizer import TextTokenizer
    from edgetune_converters.merging.score_head import ScoreHead

    tokenizer = TextTokenizer.from_directory(run.tokenizer)
    train = manifest.stages.train
    pad = tokenizer.id_of(train.pad_token) if train else None
    pad = tokenizer.choose_pad()[0] if pad is None else pad
    of_checkpoint = adapter / run.score_head.name if adapter else None
    path = of_checkpoint if of_checkpoint and of_checkpoint.is_file() else run.score_head
    return ScoreHead.read(path, pad, tokenizer.text_of(pad))


def _trainings(runs: Sequence[RunDirectory | None]) -> dict[Path, RunManifest]:
    """Return the manifests that can be read: an adapter is exported beside a damaged one too."""
    found = {}
    for run in runs:
        if run is not None:
            with suppress(RunDirectoryError):
                found[run.path] = run.manifest
    return found


def _run_of_adapter(adapter: Path) -> RunDirectory | None:
    """Return the run in which an adapter lies, finished or not; None for an adapter from elsewhere."""
    path = adapter.resolve()
    for folder in (path, path.parent, path.parent.parent):  # the run, its adapter/, or a checkpoint
        run = RunDirectory(folder)
        if run.finished_file.is_file() or run.unfinished_file.is_file():
            return run
    return None
