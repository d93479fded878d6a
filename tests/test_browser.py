"""The browser fixture: what a page does wrong fails its test, and figures are counted as drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Browser, binary, browser  # noqa: F401

from moeopt.report import figures


def page(folder: Path, body: str) -> str:
    file = folder / "page.html"
    file.write_text(f"<!doctype html><title>page</title>{body}", encoding="utf-8")
    return file.as_uri()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<script>console.error('broken')</script>", "console: broken"),
        ("<script>throw new Error('thrown away')</script>", "thrown away"),
        ("<img src='missing.png'>", "missing.png"),
        ("<img src='https://example.com/tracker.png'>", "not of this machine"),
    ],
)
def test_what_goes_wrong_fails(browser: Browser, tmp_path: Path, body: str, said: str) -> None:  # noqa: F811
    with pytest.raises(AssertionError, match=said), browser.open(page(tmp_path, body)) as tab:
        tab.page.wait_for_timeout(200)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_figures_draw_offline(browser: Browser, tmp_path: Path, dark: bool) -> None:  # noqa: F811
    figures.write_html(figures.ensemble_curve({"all": [3.0, 2.0, 1.0], "layer 1": [2, 2, 2]}), tmp_path / "lines.html")
    with browser.open((tmp_path / "lines.html").as_uri(), dark=dark) as tab:
        assert tab.traces("#figure") == 2
        assert tab.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == dark


def test_a_named_browser_is_taken_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEOPT_TEST_CHROMIUM", "/no/such/browser")
    assert binary() is None
