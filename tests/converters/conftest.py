"""Makes `tests.converters` importable, so that the helpers beside the tests are ordinary modules."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
