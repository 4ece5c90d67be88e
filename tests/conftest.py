"""Shared by all tests: threads, signals, hypothesis profiles, ids of cases, and the choice of the fast tests."""

from __future__ import annotations

import os
import signal
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import pytest

from tests import fast, profiles
from tests.readable_ids import readable_id

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported; see edgetune/training/environment.py
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread each for BLAS and OpenMP
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A shell starts background jobs with Ctrl-C ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
profiles.register()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="the tests of tests/fast.py only; importing torch is an error")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        sys.meta_path.insert(0, NoTorch())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    inside = Path(__file__).parent in collection_path.parents
    return True if inside and config.getoption("--fast") and not fast.is_fast(collection_path) else None


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    return readable_id(val, argname)


class NoTorch(MetaPathFinder):
    """Importing torch, or what needs it, is an error."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] in fast.TORCH:
            raise ImportError(f"{fullname} must not be imported by a fast test")
