"""`edgetune plan --try`: two layers of a base with the real tokenizer through training, export, answer, validation."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgetune.config import Config
from edgetune.errors import ConfigError
from edgetune.exporting.run import export_run
from edgetune.planning.base_model import find_base
from edgetune.planning.card import CardSection, Figure
from edgetune.planning.twin import copy_twin, why_no_twin
from edgetune.runtime.loading import load
from edgetune.training.run import train
from edgetune.validation.results import Rung
from edgetune.validation.validate import validate_run
from edgetune_converters.provenance.receipts import Receipt

LAYERS = 2
_STEPS = 2
_ROWS = 32
_TOKENS = 8
Result = TypeVar("Result")


@dataclass
class _Stages:
    """The stages that were run, with their seconds."""

    figures: list[Figure] = field(default_factory=list)

    def run(self, name: str, work: Callable[[], Result], describe: Callable[[Result], str]) -> Result:
        """Run a stage, and note its seconds and what came out of it."""
        start = time.perf_counter()
        result = work()
        self.figures.append(Figure(name, time.perf_counter() - start, "seconds", describe(result)))
        return result


def why_not_tried(config: Config) -> str | None:
    """Return why a configuration cannot be tried on a twin; None if it can."""
    if config.objective.facts.generates or config.objective.facts.is_scorer:
        return f"objective.kind: {config.objective.kind} needs the whole base"
    if not [format_ for format_ in config.export.formats if format_ in ("gguf", "onnx")]:
        return "export.formats has neither gguf nor onnx, and nothing else is run here"
    return why_no_twin(find_base(config))


def rehearse(config: Config) -> CardSection:
    """Train the first two layers of the base for two steps, export them as configured, answer with and validate a file.

    Raises:
        ConfigError: The configuration cannot be tried so.
        EdgetuneError: As the stages; what fails here would fail after the training.
    """
    why = why_not_tried(config)
    if why is not None:
        raise ConfigError(f"--try: {why}", "Leave out --try")
    stages = _Stages()
    with tempfile.TemporaryDirectory(prefix="edgetune-try-") as folder:
        place = Path(folder)
        (place / "base").mkdir()
        copy_twin(find_base(config), LAYERS, place / "base")
        small = _shortened(config, place / "base")
        run = stages.run("train", lambda: train(small, place / "run"), lambda _: f"{LAYERS} layers, {_STEPS} steps")
        options: dict[str, Any] = {"allow_fallback": True}
        receipts = stages.run("export", lambda: export_run(run, **options), _describe_files)
        runnable = [Path(receipt.artifact) for receipt in receipts if receipt.format in ("gguf", "onnx")]
        stages.run("answer", lambda: _answer(runnable[0]), lambda text: f"{runnable[0].name}: {len(text)} characters")
        stages.run("validate", lambda: _validate(run.path, runnable), _describe_rungs)
    return CardSection(f"tried on {LAYERS} layers with the real tokenizer", tuple(stages.figures))


def _shortened(config: Config, base: Path) -> Config:
    """Return the configuration of the rehearsal: a few rows and steps, and no thresholds."""
    training = config.training.model_copy(
        update={"max_steps": _STEPS, "eval_steps": _STEPS, "save_steps": _STEPS, "gradient_accumulation": 1}
    )
    adapter = config.adapter
    if getattr(adapter, "layers", None) is not None:
        adapter = adapter.model_copy(update={"layers": None})
    return config.model_copy(
        update={
            "name": "trial", "base": str(base), "training": training, "adapter": adapter,
            "data": config.data.model_copy(update={"max_rows": max(_ROWS, training.batch_size * _STEPS)}),
            "reference": config.reference.model_copy(update={"rows": 4, "task_rows": 2, "max_new_tokens": _TOKENS}),
            "gate": type(config.gate)(),
        }
    )  # fmt: skip


def _describe_files(receipts: list[Receipt]) -> str:
    return ", ".join(f"{receipt.format} {receipt.recipe}" for receipt in receipts)


def _answer(file: Path) -> str:
    with load(file) as model:
        return model.chat([{"role": "user", "content": "Hello"}], max_tokens=_TOKENS).text()


def _validate(run: Path, files: list[Path]) -> list[Rung]:
    rungs = [rung for rung in validate_run(run, files, with_task=False).rungs if rung.file is not None]
    for rung in rungs:
        if rung.contract is not None and rung.contract.differences:
            first = rung.contract.differences[0]
            raise ConfigError(
                f"--try: {rung.name} breaks the contract: {first.what}: {first.detail}",
                "Every file of this base would; please report it",
            )
    return rungs


def _describe_rungs(rungs: list[Rung]) -> str:
    parts = [
        f"{rung.name}: contract holds, mean KLD {rung.figures.kld.value:.2g}" for rung in rungs if rung.figures.kld
    ]
    return "; ".join(parts) or "contract holds"
