"""The page in a real browser: light, dark and print, wide and narrow, with a hostile name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser  # noqa: F401

from moeopt.report.optimiser_comparison import save
from moeopt.results.optimiser_comparison import compare

Make = Callable[..., Any]
OPTIMISERS = {f"optimiser{i}": 0.05 * 2**i for i in range(8)} | {"<script>alert(1)</script>": 3.0}
OUTSIDE_OR_OVERLAPPING = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
    const around = plot.getBoundingClientRect();
    const texts = [...plot.querySelectorAll('.main-svg text')].filter(text => text.getBoundingClientRect().width)
        .map(text => [text.textContent, text.getBoundingClientRect()]);
    const outside = texts.filter(([_, at]) =>
        at.left < around.left - 1 || at.right > around.right + 1 || at.bottom > around.bottom + 1);
    const overlapping = texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([b, q]) =>
        p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 4 && q.top < p.bottom - 4
    ).map(([b, q]) => [a, b]));
    return [...outside.map(([text]) => text), ...overlapping];
})"""


@pytest.fixture
def page(grid: Make, tmp_path: Path) -> Path:
    return save(compare(grid(OPTIMISERS, 3)), tmp_path)


@pytest.mark.parametrize("dark", [False, True])
def test_every_figure_draws_and_no_text_overlaps(browser: Browser, page: Path, dark: bool) -> None:  # noqa: F811
    with browser.open(page.as_uri(), dark=dark, width=1280) as tab:
        lines = {name: tab.traces(f"#{name}") for name in ("best", "best-time", "best-trials", "runtime")}
        assert set(lines.values()) == {len(OPTIMISERS)}
        assert tab.traces("#final") == 3 * len(OPTIMISERS)
        assert tab.traces("#each") == 7 * len(OPTIMISERS)  # others, two edges of the band, three seeds, the median
        assert tab.page.evaluate(OUTSIDE_OR_OVERLAPPING) == []
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 1280
        css = "getComputedStyle(document.{}).{}"
        colours = [("body", "backgroundColor"), ("body", "color"), ("querySelector('#best .xtick text')", "fill")]
        paper, *inks = (sum(map(int, tab.page.evaluate(css.format(*c))[4:-1].split(", "))) for c in colours)
        assert [ink > paper for ink in inks] == [dark, dark]
        assert "<script>alert(1)</script>" in tab.page.locator("tbody").first.inner_text()


def test_it_prints_on_white_with_every_table(browser: Browser, page: Path) -> None:  # noqa: F811
    with browser.open(page.as_uri(), dark=True) as tab:
        tab.page.emulate_media(media="print")
        assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        heights = tab.page.evaluate("[...document.querySelectorAll('details table')].map(t => t.offsetHeight)")
        assert len(heights) == 3
        assert min(heights) > 50


def test_a_telephone_scrolls_tables_not_the_page(browser: Browser, page: Path) -> None:  # noqa: F811
    with browser.open(page.as_uri(), width=390) as tab:
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
