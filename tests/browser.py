"""Headless Chromium for tests of pages: a fixture `browser`, whose tabs collect what goes wrong in them.

    from browser import browser  # noqa: F401

    def test_page_draws(browser, tmp_path):
        with browser.open((tmp_path / "page.html").as_uri(), dark=True) as tab:
            tab.page.wait_for_selector(".plotly")
            assert tab.traces("#figure") == 3

Leaving the block fails the test when the page wrote an error to the console, threw one, asked for something that did
not come, or asked for anything beyond this machine. The browser is `MOEOPT_TEST_CHROMIUM`, or Chromium or Chrome from
the PATH; without one the tests that need it are skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Page, Request, Response, Route

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1")


def binary() -> str | None:
    """The browser to drive, or None."""
    named = os.environ.get("MOEOPT_TEST_CHROMIUM")
    if named:
        return shutil.which(named)
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """A page, and what went wrong in it so far, one line each."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", lambda message: message.type == "error" and self._note(f"console: {message.text}"))
        page.on("pageerror", lambda error: self._note(f"thrown: {error}"))
        page.on("requestfailed", self._failed)
        page.on("response", self._answered)
        page.route("**/*", self._stay_here)

    def traces(self, selector: str) -> int:
        """How many plotly traces with at least one point or cell are drawn inside the element; waits for the first."""
        drawn = f"{selector} .plotly svg.main-svg"
        self.page.wait_for_selector(drawn, state="attached")
        return int(
            self.page.evaluate(
                "selector => { const at = document.querySelector(selector);"
                " const plot = at.classList.contains('js-plotly-plot') ? at : at.querySelector('.js-plotly-plot');"
                " const shapes = ['.scatterlayer .trace', '.heatmaplayer image', '.barlayer .trace'];"
                " return shapes.reduce((sum, one) => sum + plot.querySelectorAll(one).length, 0); }",
                selector,
            )
        )

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        self.page.screenshot(path=path, full_page=True)

    def _note(self, line: str) -> None:
        self.errors.append(line)

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # a download, or left with the page
            self._note(f"failed: {request.url[:200]} ({request.failure})")

    def _answered(self, response: Response) -> None:
        if response.status >= 400:
            self._note(f"status {response.status}: {response.url[:200]}")

    def _stay_here(self, route: Route) -> None:
        url = urlsplit(route.request.url)
        if url.scheme in ("http", "https", "ws", "wss") and url.hostname not in LOCAL:
            self._note(f"asks for {route.request.url[:200]}, which is not of this machine")
            route.abort("blockedbyclient")
        else:
            route.continue_()


class Browser:
    """Opens pages; see `browser`."""

    def __init__(self, chromium: Chromium) -> None:
        self.chromium = chromium

    @contextmanager
    def open(
        self, url: str, *, dark: bool = False, width: int = 1440, height: int = 900, seconds: float = 150
    ) -> Iterator[Tab]:
        """A tab of its own with `url` loaded; leaving the block fails when anything went wrong in it.

        Args:
            dark: what the page learns of the user's preferred colour scheme.
            width, height: of the window, in pixels.
            seconds: how long to wait for anything in it; machines that are busy take their time.
        """
        context = self.chromium.new_context(
            color_scheme="dark" if dark else "light", viewport={"width": width, "height": height}
        )
        context.set_default_timeout(1000 * seconds)
        try:
            tab = Tab(context.new_page())
            tab.page.goto(url)
            yield tab
            assert not tab.errors, "\n".join(tab.errors)
        finally:
            context.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser for a file of tests; skips them where there is none."""
    path = binary()
    if path is None:
        pytest.skip("no browser: install Chromium, or name one in MOEOPT_TEST_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        try:
            yield Browser(chromium)
        finally:
            chromium.close()
