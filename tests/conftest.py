"""Shared by all tests."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported; see edgetune/training/environment.py
