"""scores.json of a run: the scores that a trained reward model gives to both answers of held-out pairs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

from edgetune.runs.directory import RunDirectory
from edgetune.runs.documents import Document, DocumentSection, Number


class ScoredPair(DocumentSection):
    """The token ids of both answers behind their prompt, and their scores."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen: Number
    rejected: Number


class RewardScores(Document):
    """The scores of the first held-out pairs."""

    KIND: ClassVar[str] = "a list of reward scores"
    HINT: ClassVar[str] = "Resume the training (`edgetune train --resume`): it scores the pairs again"

    version: int = Document.NEWEST
    pairs: list[ScoredPair]

    @classmethod
    def of_run(cls, run: RunDirectory) -> Self | None:
        """Read the scores of a run; None for a run of another objective.

        Raises:
            RunDirectoryError: The file is damaged.
        """
        return cls.read(run.scores_file) if run.scores_file.is_file() else None

    @classmethod
    def from_json(cls, text: bytes | str, path: Path) -> Self:
        """Parse and check the document; the first files had no version."""
        with suppress(ValueError, RecursionError):
            content = json.loads(text)
            if isinstance(content, dict) and "pairs" in content:
                text = json.dumps({"version": 1, **content})
        return super().from_json(text, path)

    def first(self, count: int | None) -> RewardScores:
        """Return the first `count` pairs; all for None."""
        return RewardScores(pairs=self.pairs[:count])

    @property
    def rows(self) -> list[list[int]]:
        """Token ids of the chosen answers of all pairs, then of the rejected ones."""
        return [*(pair.chosen_ids for pair in self.pairs), *(pair.rejected_ids for pair in self.pairs)]

    @property
    def scores(self) -> list[float]:
        """The scores of `rows`."""
        return [*(pair.chosen for pair in self.pairs), *(pair.rejected for pair in self.pairs)]
