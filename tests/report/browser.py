"""A real browser: the system's Chromium, driven by Playwright's Python package (which brings none of its own)."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH = {"desktop": (1280, 900), "phone": (360, 740)}
CHARTS = ("ladder-chart", "sizes-chart", "spread-chart", "survival-chart", "loss-chart", "rate-chart", "norm-chart")


def executable() -> str:
    """Where the browser is. Skips where there is none; on CI, which installs one, that is a failure."""
    named = os.environ.get("EDGETUNE_BROWSER")
    found = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    reason = None
    if importlib.util.find_spec("playwright") is None:
        reason = "Playwright is not installed: pip install -e '.[dev]'"
    elif found is None:
        reason = "no Chromium was found: apt-get install chromium, or name one in EDGETUNE_BROWSER"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    assert found is not None
    return found


@contextmanager
def started() -> Iterator[Any]:
    """A headless Chromium."""
    path = executable()
    from playwright.sync_api import sync_playwright

    # Chromium's sandbox does not work for root, and CI runs in containers as root; the pages are our own
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as library:
        browser = library.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Opened:
    """A page that notes all it says and asks for."""

    def __init__(self, browser: Any, path: Path, *, size: str = "desktop", scheme: str = "light") -> None:
        width, height = WIDTH[size]
        is_phone = size == "phone"
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, is_mobile=is_phone, has_touch=is_phone
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = path.resolve().as_uri()
        self.page.goto(self.url)
        self.page.wait_for_function("document.querySelectorAll('.chart svg').length > 0")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def js(self, code: str, argument: object = None) -> Any:
        """The value of a JavaScript expression or function."""
        return self.page.evaluate(code, argument)

    def check_quiet(self) -> None:
        """Nothing on the console, and nothing was loaded but the page itself."""
        assert self.said == []
        assert {url for url in self.asked if not url.startswith("data:")} == {self.url}

    def marks(self, chart: str) -> int:
        """Shapes of a chart that can be seen."""
        count: int = self.js(
            """(id) => [...document.querySelectorAll(`#${id} svg :is(path, circle, rect, line)`)].filter((mark) => {
                const box = mark.getBBox();
                return box.width + box.height > 0;
            }).length""",
            chart,
        )
        return count
