"""The former name of `exporting`, for code that still imports it."""

from __future__ import annotations

from edgetune_converters.exporting import export, plan_export, plan_onnx

__all__ = ["export", "plan_export", "plan_onnx"]
