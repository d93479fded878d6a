"""A flowchart of mermaid, as GitHub draws it, as a picture that needs no script: names in rows, arrows downwards."""

from __future__ import annotations

import html
import re
from graphlib import TopologicalSorter
from itertools import pairwise

BOX, ROW, GAP = 32, 70, 30
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
    lines = []  # each arrow as the points through which it goes; what passes a row takes a place in it
    for upper, below in arrows.items():
        for lower in below:
            passed = [f"{upper} {lower} {level}" for level in range(height[upper] - 1, height[lower], -1)]
            height |= {name: int(name.rpartition(" ")[2]) for name in passed}
            lines.append([upper, *passed, lower])
    widths = {name: 24 + LETTER * len(labels[name]) if name in labels else 0 for name in height}
    rows = [[name for name in reversed(height) if height[name] == level] for level in range(top, -1, -1)]
    across = max(sum(widths[name] + GAP for name in row) for row in rows)
    middle: dict[str, float] = {}
    for row in rows:
        above = {name: [middle[a] for line in lines for a, b in pairwise(line) if b == name] for name in row}
        row.sort(key=lambda name: sum(above[name]) / max(len(above[name]), 1))
        x = (across - sum(widths[name] + GAP for name in row)) / 2
        for name in row:
            middle[name] = x + (widths[name] + GAP) / 2
            x += widths[name] + GAP
    y = {name: (top - height[name]) * ROW + BOX / 2 + 4 for name in height}
    drawn = []
    for line in lines:
        path = f"M{middle[line[0]]:.0f},{y[line[0]] + BOX / 2:.0f}"
        for upper, lower in pairwise(line):
            start = y[upper] + BOX / 2
            end = y[lower] - BOX / 2 - 5 * (lower in labels)
            bend = (start + end) / 2
            path += f" C{middle[upper]:.0f},{bend:.0f} {middle[lower]:.0f},{bend:.0f} {middle[lower]:.0f},{end:.0f}"
            if lower not in labels:
                path += f" v{BOX}"
        drawn.append(f'<path d="{path}"/>')
    for name, label in labels.items():
        left, wide = middle[name] - widths[name] / 2, widths[name]
        drawn.append(
            f'<rect x="{left:.0f}" y="{y[name] - BOX / 2:.0f}" width="{wide:.0f}" height="{BOX}" rx="5"/>'
            f'<text x="{middle[name]:.0f}" y="{y[name] + 5:.0f}">{html.escape(label)}</text>'
        )
    size = f"{across:.0f} {(top + 1) * ROW - (ROW - BOX) + 8}"
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    )
    said = html.escape(", ".join(f"{labels[a]} to {labels[b]}" for a, below in arrows.items() for b in below))
    return (
        f'<svg class="flowchart" viewBox="0 0 {size}" style="max-width: {across:.0f}px" role="img" '
        f'aria-label="Arrows: {said}">{marker}{"".join(drawn)}</svg>\n'
    )


def named(text: str, labels: dict[str, str]) -> str:
    """The name of a node, whose label is put among the others."""
    name, label = re.fullmatch(r'(\w+)(?:\["(.*)"\])?', text.strip()).groups()
    labels[name] = label or labels.get(name, name)
    return name
