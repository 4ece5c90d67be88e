"""To come."""

from __future__ import annotations

from edgetune.serving.calls import RouteSpec

ROUTES: tuple[RouteSpec, ...] = ()
