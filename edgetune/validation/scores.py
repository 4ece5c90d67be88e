"""The scores of a reward model's file beside those of the trained model, on held-out pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.errors import RunDirectoryError
from edgetune.runs.directory import RunDirectory
from edgetune.runtime.llama.scores import has_score_head, score_rows

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class ScoreComparison:
    """Scores of a file and of the trained model."""

    pairs: int
    largest_difference: float
    """Of a score from that of the trained model."""
    spread: float
    """Standard deviation of the trained model's scores."""
    accuracy: float
    """Share of pairs whose chosen answer has the higher score in the file."""
    trained_accuracy: float
    agreement: float
    """Share of pairs that both rank alike."""

    def describe(self) -> str:
        """Return the figures as a line."""
        return (
            f"scores of {self.pairs} pairs: accuracy {self.accuracy:.1%} (trained {self.trained_accuracy:.1%}), "
            f"{self.agreement:.1%} ranked alike, largest difference {self.largest_difference:.3g} "
            f"(trained scores vary by {self.spread:.3g})"
        )


def compare_scores(run: RunDirectory, file: Path, threads: int | None = None) -> ScoreComparison | None:
    """Return the comparison on the stored pairs of a run; None if the run or the file is no reward model.

    Raises:
        RunDirectoryError: The stored scores are damaged.
    """
    if not run.scores_file.is_file() or not has_score_head(file):
        return None
    try:
        pairs = json.loads(run.scores_file.read_text(encoding="utf-8"))["pairs"]
        rows = [pair[f"{side}_ids"] for side in SIDES for pair in pairs]
        trained = np.array([pair[side] for side in SIDES for pair in pairs])
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{run.scores_file} is damaged: {error}", "Capture the run again") from None
    found = score_rows(file, rows, threads)
    ranked, expected = ((scores[: len(pairs)] > scores[len(pairs) :]) for scores in (found, trained))
    return ScoreComparison(
        len(pairs), float(np.abs(found - trained).max()), float(trained.std()), float(ranked.mean()),
        float(expected.mean()), float((ranked == expected).mean()),
    )  # fmt: skip
