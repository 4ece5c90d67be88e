"""Both implementations of the kernels, behind the same checked face; every typed test runs for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgetune_native import _native, _twin
from edgetune_native.face import Face

ISAS = ("scalar", "avx2", "avx512", "neon")


@pytest.fixture(scope="session", params=["c", "twin"])
def face(request: pytest.FixtureRequest) -> Face:
    return Face(_native if request.param == "c" else _twin)


@pytest.fixture(scope="session")
def compiled() -> Face:
    return Face(_native)


@pytest.fixture
def isas() -> Iterator[tuple[str, ...]]:
    """The instruction sets that this machine runs; the one in use is put back afterwards."""
    before = _native.cpu()[0]
    here = []
    for isa in ISAS:
        try:
            _native.use_isa(isa)
        except ValueError:
            continue
        here.append(isa)
    yield tuple(here)
    _native.use_isa(before)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The twin runs these types in a child process that builds libggml's search tables each time: seconds per call."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("face") == "twin" and str(parameters.get("name")).startswith(("iq1_", "iq2_")):
            item.add_marker(pytest.mark.slow)
