"""The former name of `exporting`."""

from __future__ import annotations

from edgetune_converters.exporting import export

__all__ = ["export"]
