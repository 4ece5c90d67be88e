"""Shared by all tests."""

import os
import signal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported; see edgetune/training/environment.py
# A shell starts background jobs with Ctrl-C ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
