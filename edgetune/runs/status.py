"""The statuses of a run directory and the stages of a run, by the names that run.json holds."""

from __future__ import annotations

from enum import StrEnum


class RunStatus(StrEnum):
    """How far the run in a directory has come."""

    ABSENT = "absent"
    """Nothing is there: no directory, or an empty one."""
    FOREIGN = "foreign"
    """Something is there that is not a run."""
    RUNNING = "running"
    """A process is writing in the directory, and the run is not finished."""
    UNFINISHED = "unfinished"
    """Training or capture was stopped; `--resume` completes the run."""
    FINISHED = "finished"
    """The adapter is trained and the reference is captured."""


class Stage(StrEnum):
    """A stage whose results are stored in `stages` of run.json."""

    TRAIN = "train"
    REFERENCE = "reference"
    """In runs of edgetune before 0.1; today the results are the `summary` of reference.json."""
