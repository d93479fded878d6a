"""Figures as inline SVG: axes, steps, labels.

Colours and fonts are classes of the page, so that one figure serves light, dark and print.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moeopt.results.optimiser_comparison.formatting import short
from moeopt.results.optimiser_comparison.statistics import Floats
from moeopt.showing import line

MOST = 24
"""Characters of a name beside its line."""
COLOURS, DASHES = 8, ("", "7 3", "2 2.5")
"""Colours that the page defines as --c0, --c1, ..., and the dashes that tell apart more than that."""


def escape(text: str, most: int = 120) -> str:
    """A name for HTML or SVG, in an attribute too."""
    return html.escape(line(text, most), quote=True)


@dataclass(frozen=True)
class Axis:
    """From values to pixels.

    Attributes:
        low, high: values at its ends; both above 0 where `log`.
        first, last: pixels there.
        log: whether equal ratios are equal lengths.
        most: ticks.
    """

    low: float
    high: float
    first: float
    last: float
    log: bool = False
    most: int = 7

    def __call__(self, values: Floats | float) -> Floats:
        low, high, at = self._scaled(self.low), self._scaled(self.high), self._scaled(values)
        share = np.clip((at - low) / (high - low) if high > low else np.full_like(at, 0.5), 0.0, 1.0)
        return self.first + share * (self.last - self.first)

    def _scaled(self, values: Floats | float) -> Floats:
        array = np.asarray(values, dtype=np.float64)
        return np.log10(np.maximum(array, self.low)) if self.log else array

    def ticks(self) -> list[float]:
        """Round values between the ends, at most `most`."""
        return (_log_ticks if self.log else _linear_ticks)(self.low, self.high, self.most)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    if not high > low:
        return [low]
    raw = (high - low) / (most - 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{m}e{d}") for d in decades for m in digits if low <= float(f"{m}e{d}") <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


@dataclass
class Plot:
    """One pair of axes within an SVG, and what was drawn on it."""

    x: Axis
    y: Axis
    parts: list[str] = field(default_factory=list)

    def axes(
        self,
        *,
        x_label: str = "",
        y_label: str = "",
        x_ticks: bool = True,
        y_ticks: bool = True,
        x_text: Callable[[float], str] = short,
        y_text: Callable[[float], str] = short,
    ) -> None:
        """Grid lines, tick labels and names of the axes."""
        left, right, bottom, top = self.x.first, self.x.last, self.y.first, self.y.last
        for value, at in _placed(self.y):
            self.parts.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:.1f}"/>')
            if y_ticks:
                self.text(left - 7, at + 4, y_text(value), "tick end")
        for value, at in _placed(self.x):
            self.parts.append(f'<path class="tickmark" d="M{at:.1f} {bottom:.1f}v4"/>')
            if x_ticks:
                self.text(at, bottom + 17, x_text(value), "tick middle")
        self.parts.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
        if x_label:
            self.text((left + right) / 2, bottom + 37, x_label, "label middle")
        if y_label:
            self.text(left - 50, top - 14, y_label, "label")

    def text(self, x: float, y: float, text: str, kind: str, style: str = "") -> None:
        styled = f' style="{style}"' if style else ""
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{styled}>{escape(text)}</text>')

    def steps(self, at: Floats, heights: Floats, kind: str, style: str = "", title: str = "") -> None:
        """A step function that has each height, (n,), from its place on, (n,), as far as the last; NaN is left out."""
        path = _step_path(self.x(at), self.y(heights), np.isfinite(heights))
        if path:
            hover = f"<title>{escape(title, 400)}</title>" if title else ""
            self.parts.append(f'<path class="{kind}" style="{style}" d="{path}">{hover}</path>')

    def band(self, at: Floats, low: Floats, high: Floats, style: str) -> None:
        """The area between two step functions, each (n,)."""
        known = np.isfinite(low) & np.isfinite(high)
        if known.sum() < 2:
            return
        x, bottom, top = np.repeat(self.x(at[known]), 2)[1:], self.y(low[known]), self.y(high[known])
        there = _points(x, np.repeat(top, 2)[:-1])
        back = _points(x[::-1], np.repeat(bottom, 2)[:-1][::-1])
        self.parts.append(f'<path class="band" style="{style}" d="M{there}L{back}Z"/>')

    def labels(self, ends: Sequence[tuple[float, str, int]], apart: float = 16.0) -> None:
        """Names right of the plot beside where their lines end, (height, name, series), moved apart."""
        wanted = sorted((float(self.y(height)), name, series) for height, name, series in ends)
        places = spread([at for at, _, _ in wanted], apart, self.y.last, self.y.first)
        for (at, name, series), place in zip(wanted, places):
            right = self.x.last
            path = f"M{right + 3:.1f} {at:.1f}L{right + 16:.1f} {place:.1f}"
            self.parts.append(f'<path class="leader s{series}" style="{stroke(series)}" d="{path}"/>')
            self.text(right + 20, place + 4, line(name, MOST), f"name s{series}", fill(series))


def drawn(plots: Iterable[Plot], width: float, height: float, title: str) -> str:
    """The SVG element."""
    body = "".join(part for plot in plots for part in plot.parts)
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{body}</svg>'


def stroke(series: int) -> str:
    """Style of a line."""
    dash = DASHES[series // (COLOURS // 2) % len(DASHES)]
    return f"stroke:var(--c{series % COLOURS})" + (f";stroke-dasharray:{dash}" if dash else "")


def fill(series: int) -> str:
    """Style of text, of a mark and of a band."""
    return f"fill:var(--c{series % COLOURS})"


def spread(at: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places near `at`, ascending, at least `apart` from each other, between low and high where they fit."""
    blocks: list[list[float]] = []  # sum of wanted places minus offsets, how many
    for place in at:
        blocks.append([place, 1])
        while len(blocks) > 1 and _start(blocks[-2], apart) + blocks[-2][1] * apart > _start(blocks[-1], apart):
            total, many = blocks.pop()
            blocks[-1][0] += total - many * apart * blocks[-1][1]
            blocks[-1][1] += many
    found = [_start(block, apart) + i * apart for block in blocks for i in range(int(block[1]))]
    for i in range(len(found)):
        found[i] = max(found[i], low + i * apart)
    for i in range(len(found)):
        found[-1 - i] = min(found[-1 - i], max(high, low + (len(found) - 1) * apart) - i * apart)
    return found


def _start(block: Sequence[float], apart: float) -> float:
    total, many = block
    return total / many


def _placed(axis: Axis) -> list[tuple[float, float]]:
    return [(value, float(axis(value))) for value in axis.ticks()]


def _step_path(x: Floats, y: Floats, known: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> str:
    x, y = x[known], y[known]
    if not len(x):
        return ""
    parts = [f"M{x[0]:.1f} {y[0]:.1f}"]
    for i in range(1, len(x)):
        if abs(y[i] - y[i - 1]) > 0.02 or i == len(x) - 1:
            parts.append(f"H{x[i]:.1f}" + (f"V{y[i]:.1f}" if abs(y[i] - y[i - 1]) > 0.02 else ""))
    return "".join(parts)


def _points(x: Floats, y: Floats) -> str:
    return "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))
