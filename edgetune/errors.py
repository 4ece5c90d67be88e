"""Errors of the layers above the converters; see `edgetune_converters.errors` for the contract that all share."""

from __future__ import annotations

from edgetune_converters.errors import EdgetuneError

__all__ = ["ConfigError", "DataError", "EdgetuneError", "EnvironmentProblem", "GateFailure", "RunDirectoryError"]


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
