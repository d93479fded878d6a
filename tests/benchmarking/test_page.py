"""The page in a real browser: light, dark and print, wide and narrow, with a hostile name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser  # noqa: F401

from moeopt.results.optimiser_comparison import compare

Make = Callable[..., Any]
OPTIMISERS = {f"optimiser{i}": 0.05 * 2**i for i in range(8)} | {"<script>alert(1)</script>": 3.0}
WITHIN = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
    const around = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(text => {
        const at = text.getBoundingClientRect();
        return at.left < around.left - 1 || at.right > around.right + 1 || at.bottom > around.bottom + 1;
    }).map(text => text.textContent);
})"""
OVERLAPS = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
    const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    return texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([b, q]) =>
        p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 4 && q.top < p.bottom - 4
    ).map(([b, q]) => [a, b]));
})"""


@pytest.fixture
def page(grid: Make, tmp_path: Path) -> Path:
    compare(grid(OPTIMISERS, 3)).save(tmp_path)
    return tmp_path / "index.html"


@pytest.mark.parametrize("dark", [False, True])
def test_every_figure_draws_and_no_text_overlaps(browser: Browser, page: Path, dark: bool) -> None:  # noqa: F811
    with browser.open(page.as_uri(), dark=dark, width=1280) as tab:
        assert tab.page.locator("svg").count() == 6
        for i in range(len(OPTIMISERS)):
            assert tab.page.locator(f".line.s{i}").count() == 4  # three costs, and the distribution of run time
        assert tab.page.evaluate(WITHIN) == []
        assert tab.page.evaluate(OVERLAPS) == []
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 1280
        ink, paper = (
            tab.page.evaluate(f"getComputedStyle(document.body).{one}") for one in ("color", "backgroundColor")
        )
        assert (sum(map(int, ink[4:-1].split(", "))) > sum(map(int, paper[4:-1].split(", ")))) == dark
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
