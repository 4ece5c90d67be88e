"""Errors of the layers above the converters; see `edgetune_converters.errors` for the contract that all share."""

from __future__ import annotations

import warnings

from edgetune_converters.errors import EdgetuneError

__all__ = [
    "ConfigError", "DataError", "EdgetuneError", "EnvironmentProblem", "GateFailure", "RunDirectoryError",
    "RuntimeNotice", "RuntimeProblem",
]  # fmt: skip


class ConfigError(EdgetuneError):
    """A configuration that cannot be used; found before any work starts."""

    exit_code = 2


class DataError(EdgetuneError):
    """A dataset that is missing, malformed, or would train nothing."""


class RunDirectoryError(EdgetuneError):
    """A run directory that is missing, unfinished, or lacks what a stage needs."""


class EnvironmentProblem(EdgetuneError):
    """Something missing on this machine: an extra that is not installed, a CPU feature, disk space."""


class GateFailure(EdgetuneError):
    """The artifact was measured and does not meet the thresholds."""

    exit_code = 3


class RuntimeProblem(EdgetuneError):
    """A file that cannot be run, or a request that does not fit it."""


class RuntimeNotice(UserWarning):
    """Something about this machine that makes a model slower than it could be.

    Ignored by default, so that a program or a server stays silent; the command line prints it as a warning, and
    `warnings.simplefilter("default", RuntimeNotice)` shows it in a program.
    """


warnings.simplefilter("ignore", RuntimeNotice, append=True)  # behind the user's own filters
