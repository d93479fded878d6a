"""A flowchart of mermaid, as GitHub draws it, as a picture that needs no script: names in rows, arrows downwards."""

from __future__ import annotations

import html
import re
from graphlib import TopologicalSorter
from itertools import pairwise

BOX, ROW, GAP = 34, 84, 34
"""Height of a box, and of a row; what is between boxes. In pixels."""
LETTER = 8.6


def picture(chart: str) -> str:
    """The chart as SVG in the colours of the page.

    Args:
        chart: lines ``a --> b --> c["label"]`` or ``a & b --> c & d``, without circles.
    """
    labels: dict[str, str] = {}
    arrows: dict[str, list[str]] = {}
    for line in chart.splitlines()[1:]:
        ends = [[named(name, labels) for name in part.split("&")] for part in line.split("-->")]
        for upper, lower in pairwise(ends):
            for name in upper:
                arrows.setdefault(name, []).extend(lower)
    order = [*TopologicalSorter(arrows).static_order()]  # what is below comes first
    height: dict[str, int] = {}
    for name in order:
        height[name] = 1 + max((height[below] for below in arrows.get(name, ())), default=-1)
    top = max(height.values())
    rows = [[name for name in reversed(order) if height[name] == top - row] for row in range(top + 1)]
    widths = {name: 24 + LETTER * len(labels[name]) for name in order}
    across = max(sum(widths[name] + GAP for name in row) for row in rows)
    middle: dict[str, float] = {}
    for row in rows:
        above = {name: [middle[upper] for upper in arrows if name in arrows[upper]] for name in row}
        row.sort(key=lambda name: sum(above[name]) / max(len(above[name]), 1))
        x = (across - sum(widths[name] + GAP for name in row)) / 2
        for name in row:
            middle[name] = x + (widths[name] + GAP) / 2
            x += widths[name] + GAP
    y = {name: (top - height[name]) * ROW + BOX / 2 + 4 for name in order}
    drawn = []
    for upper, lowers in arrows.items():
        for lower in lowers:
            x1, y1, x2, y2 = middle[upper], y[upper] + BOX / 2, middle[lower], y[lower] - BOX / 2 - 5
            bend = (y2 - y1) / 2
            drawn.append(
                f'<path d="M{x1:.0f},{y1:.0f} C{x1:.0f},{y1 + bend:.0f} {x2:.0f},{y2 - bend:.0f} {x2:.0f},{y2:.0f}"/>'
            )
    for name in order:
        left, wide, label = middle[name] - widths[name] / 2, widths[name], html.escape(labels[name])
        drawn.append(
            f'<rect x="{left:.0f}" y="{y[name] - BOX / 2:.0f}" width="{wide:.0f}" height="{BOX}" rx="5"/>'
            f'<text x="{middle[name]:.0f}" y="{y[name] + 5:.0f}">{label}</text>'
        )
    size = f"{across:.0f} {(top + 1) * ROW - (ROW - BOX) + 8}"
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    )
    said = html.escape(", ".join(f"{labels[a]} to {labels[b]}" for a, lowers in arrows.items() for b in lowers))
    return (
        f'<svg class="flowchart" viewBox="0 0 {size}" style="max-width: {across:.0f}px" role="img" '
        f'aria-label="Arrows: {said}">{marker}{"".join(drawn)}</svg>\n'
    )


def named(text: str, labels: dict[str, str]) -> str:
    """The name of a node, whose label is put among the others."""
    name, label = re.fullmatch(r'(\w+)(?:\["(.*)"\])?', text.strip()).groups()
    labels[name] = label or labels.get(name, name)
    return name
