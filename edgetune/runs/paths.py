"""The layout of a run directory. No other module knows its file names.

runs/NAME/
  run.json       the manifest (edgetune/runs/manifest.py). Its name is run.unfinished.json until the run is finished:
                 a tool such as make can take the existence of run.json as "finished"
  adapter/       as PEFT writes it
  tokenizer/     the base's tokenizer files and the chat template of the training
  reference/     outputs of the base and the trained model on held-out rows
  artifacts/     exported files, their receipts and validation results
  evaluations/   scores on tasks of lm-evaluation-harness (edgetune/evaluation/results.py)
  teacher.jsonl  answers of the teacher, of a distillation from an endpoint
  answers.ngrams n-grams of the training answers (edgetune/runtime/ngrams.py)
  calibration.npz  token ids of training rows, for --imatrix auto (edgetune/reference/calibration.py)
  score_head.safetensors, scores.json   of a reward model: its head, and scores of held-out pairs
  checkpoints/   of the trainer, for --resume
  base.partial/  weights of a GGUF base, while they are being loaded
  run.lock       while a process writes here (edgetune/runs/lock.py)
  logs/          metrics.jsonl and TensorBoard events
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunPaths:
    """The paths of one run."""

    path: Path

    @property
    def finished_file(self) -> Path:
        """The manifest of a finished run: run.json."""
        return self.path / "run.json"

    @property
    def unfinished_file(self) -> Path:
        """The manifest of a run that is in progress or was stopped."""
        return self.path / "run.unfinished.json"

    @property
    def manifest_file(self) -> Path:
        """The manifest under its present name."""
        return self.finished_file if self.finished_file.is_file() else self.unfinished_file

    @property
    def base(self) -> Path:
        """Beside this path the weights of a GGUF base are written for the moment of loading."""
        return self.path / "base"

    @property
    def adapter(self) -> Path:
        """The PEFT adapter."""
        return self.path / "adapter"

    @property
    def tokenizer(self) -> Path:
        """The base's tokenizer files and the chat template of the training."""
        return self.path / "tokenizer"

    @property
    def reference(self) -> Path:
        """The stored outputs of the base and the trained model."""
        return self.path / "reference"

    @property
    def reference_file(self) -> Path:
        """The manifest of the reference, which is written with it."""
        return self.reference / "reference.json"

    @property
    def teacher_answers(self) -> Path:
        """The answers of an endpoint as teacher, a line each."""
        return self.path / "teacher.jsonl"

    @property
    def ngrams(self) -> Path:
        """The table of n-grams of the training answers; not in runs of earlier versions."""
        return self.path / "answers.ngrams"

    @property
    def calibration(self) -> Path:
        """Token ids of training rows, for importance matrices; not in runs of earlier versions."""
        return self.path / "calibration.npz"

    @property
    def score_head(self) -> Path:
        """The score head of a reward model: `score.weight`, f32 [1, hidden size]."""
        return self.path / "score_head.safetensors"

    @property
    def scores_file(self) -> Path:
        """Token ids and scores of held-out pairs under the trained reward model."""
        return self.path / "scores.json"

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
        """The default target of merge-export."""
        return self.path / "artifacts"

    @property
    def evaluations(self) -> Path:
        """Scores on tasks of lm-evaluation-harness, one file for each evaluation."""
        return self.path / "evaluations"

    @property
    def metrics_file(self) -> Path:
        """The training log, one JSON object a line: step, loss, learning rate, tokens per second, evaluation loss."""
        return self.logs / "metrics.jsonl"
