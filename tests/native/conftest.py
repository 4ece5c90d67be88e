"""Both implementations of the kernels behind the same public functions; every typed test runs for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.native.backends import COMPILED, REFERENCE, Backend, native

ISAS = ("scalar", "avx2", "avx512", "neon")


@pytest.fixture(scope="session", params=["c", "numpy"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return COMPILED if request.param == "c" else REFERENCE


@pytest.fixture(scope="session")
def compiled() -> Backend:
    return COMPILED


@pytest.fixture
def isas() -> Iterator[tuple[str, ...]]:
    """The instruction sets that this machine runs; the one in use is put back afterwards."""
    before = native.cpu()[0]
    here = []
    for isa in ISAS:
        try:
            native.use_isa(isa)
        except ValueError:
            continue
        here.append(isa)
    yield tuple(here)
    native.use_isa(before)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The reference backend quantizes these types in a child process, which builds libggml's search tables: seconds."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("backend") == "numpy" and str(parameters.get("name")).startswith(("iq1_", "iq2_")):
            item.add_marker(pytest.mark.slow)
