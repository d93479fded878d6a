"""A plotly figure with matplotlib, for a PNG without a browser.

One point is one pixel of the plotly layout, so that sizes carry over. What it does not know it refuses.
"""

from __future__ import annotations

import html
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import FigureError
from moeopt.report.figures import style
from moeopt.report.figures.style import CATEGORICAL, FAINT, GONE, GRID, INK, SYMBOLS, TEXT_SIZE, TICK_SIZE, TITLE_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.lines import Line2D

DASHES = {"None": "-", "solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
KNOWN: dict[str, dict[str, Collection[str]]] = {
    "heatmap": {"coloraxis": ["coloraxis"]},
    "scatter": {"fill": ["None", "none"], "line.dash": DASHES, "marker.symbol": ["None", *SYMBOLS]},
}
"""Attributes of a trace, and the values that are drawn; symbols may be followed by "-open"."""
TEXT: dict[str, Any] = {"fontsize": TEXT_SIZE, "color": INK}
TICKS: dict[str, Any] = {"labelsize": TICK_SIZE, "labelcolor": INK, "color": FAINT, "length": 4}


def redrawn(figure: style.Figure, width: int, height: int, scale: float) -> FigureCanvasAgg:
    """The canvas of a matplotlib figure that shows the same."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise FigureError("writing a PNG needs matplotlib: pip install 'moeopt[figures]'") from None
    _check_parts(figure)
    layout = figure.layout
    panels = sorted({trace.xaxis or "x" for trace in figure.data}, key=lambda name: int(name[1:] or 1))
    dpi = 72 * scale
    size = ((round(width * scale) + 0.01) / dpi, (round(height * scale) + 0.01) / dpi)  # Agg cuts down to integers
    engine = ConstrainedLayoutEngine(w_pad=8 / 72, h_pad=8 / 72, wspace=0.02)
    drawing = Figure(figsize=size, dpi=dpi, facecolor="white", layout=engine)
    canvas = FigureCanvasAgg(drawing)
    axes = dict(zip(panels, drawing.subplots(1, len(panels), squeeze=False)[0]))
    entries: list[tuple[float, Line2D, str]] = []
    image = None
    for order, trace in enumerate(figure.data):
        ax = axes[trace.xaxis or "x"]
        if trace.type == "heatmap":
            image = _draw_heatmap(ax, trace, layout.coloraxis)
            continue
        line = _draw_scatter(ax, trace, zorder=3 + order)
        if layout.showlegend and trace.showlegend is not False and trace.name:
            entries.append((trace.legendrank or 1000, line, _plain(trace.name)))
    for shape in layout.shapes:
        look = {"color": shape.line.color, "linewidth": shape.line.width, "linestyle": DASHES[str(shape.line.dash)]}
        axes[shape.xref.split()[0]].axhline(shape.y0, zorder=1, **look)
    for name, ax in axes.items():
        _draw_axes(ax, layout, name[1:])
    for note in layout.annotations:
        axes[note.xref.split()[0]].set_title(_plain(note.text), pad=7, parse_math=False, **TEXT)
    if layout.title.text:
        text = _plain(layout.title.text)
        drawing.suptitle(text, x=0.02, ha="left", fontsize=TITLE_SIZE, color=INK, parse_math=False)
    if image is not None:
        spec = layout.coloraxis.colorbar
        bar = drawing.colorbar(image, ax=list(axes.values()), fraction=0.03, pad=0.02, aspect=30)
        if spec.tickvals is not None:
            bar.set_ticks(list(spec.tickvals), labels=list(spec.ticktext))
        bar.set_label(_plain(spec.title.text), labelpad=8, **TEXT)
        bar.ax.tick_params(**TICKS)
        bar.outline.set_visible(False)  # type: ignore[operator]
    if entries:
        _, lines, names = zip(*sorted(entries, key=lambda entry: entry[0]))
        legend = drawing.legend(
            lines, names, loc="outside right upper", fontsize=TICK_SIZE, labelcolor=INK, frameon=False, handlelength=2.2
        )
        for entry in legend.get_texts():
            entry.set_parse_math(False)
    return canvas


def _check_parts(figure: style.Figure) -> None:
    """Refuse what `redrawn` would leave out or get wrong."""
    if not figure.data:
        raise FigureError("the figure has no traces to draw")
    panels = set()
    for i, trace in enumerate(figure.data):
        if trace.type not in KNOWN:
            raise FigureError(f"trace {i} is of type {trace.type!r}; a PNG can hold heatmap and scatter, HTML any")
        suffix = (trace.xaxis or "x")[1:]
        panels.add(f"x{suffix}")
        domain = figure.layout[f"yaxis{suffix}"].domain
        if (trace.yaxis or "y")[1:] != suffix or (domain is not None and tuple(domain) != (0, 1)):
            raise FigureError(f"trace {i}: panels must stand in one row, each with a pair of axes of its own")
        parts = [(part, str(trace[part]).removesuffix("-open"), drawn) for part, drawn in KNOWN[trace.type].items()]
        if trace.type == "scatter":
            parts += [("mode", part, ["lines", "markers"]) for part in _mode(trace)]
        for part, value, drawn in parts:
            if value not in drawn:
                raise FigureError(f"trace {i}, a {trace.type}, has the {part} {value!r}, which a PNG cannot hold")
        for name in "xyz" if trace.type == "heatmap" else "xy":
            if trace[name] is None or np.asarray(trace[name]).dtype.kind not in "iuf":
                raise FigureError(f"trace {i}, a {trace.type}, needs numbers as {name}")
    for shape in figure.layout.shapes:
        if shape.type != "line" or shape.y0 != shape.y1 or str(shape.xref).split()[0] not in panels:
            raise FigureError(f"the layout has a {shape.type!r} shape; a PNG can hold a panel's horizontal lines")
    for note in figure.layout.annotations:
        if note.xref not in {f"{panel} domain" for panel in panels}:
            raise FigureError(f"the annotation {note.text!r} is not a panel's title, and a PNG can hold no other")


def _plain(text: str | None) -> str:
    return html.unescape((text or "").replace("<br>", "\n"))


def _mode(trace: Any) -> list[str]:
    return str(trace.mode or "lines").split("+")


def _draw_heatmap(ax: Axes, trace: Any, coloraxis: Any) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    x, y = (np.append(np.asarray(centres) - 0.5, centres[-1] + 0.5) for centres in (trace.x, trace.y))
    stops = [(float(at), str(colour)) for at, colour in coloraxis.colorscale]
    return ax.pcolormesh(
        x, y, np.asarray(trace.z), cmap=LinearSegmentedColormap.from_list("sequential", stops), vmin=coloraxis.cmin,
        vmax=coloraxis.cmax, edgecolors=GONE, linewidth=trace.xgap or 0,
    )  # fmt: skip


def _draw_scatter(ax: Axes, trace: Any, *, zorder: int) -> Line2D:
    marker, line, mode = trace.marker, trace.line, _mode(trace)
    symbol = str(marker.symbol or "circle")
    colour = marker.color or line.color or CATEGORICAL[0]
    x, y = np.asarray(trace.x, dtype=np.float64), np.asarray(trace.y, dtype=np.float64)
    for letter in "xy":
        bar = trace[f"error_{letter}"]
        if bar.array is not None:
            limits = np.array([bar.array if bar.arrayminus is None else bar.arrayminus, bar.array], dtype=np.float64)
            look: dict[str, Any] = {f"{letter}err": limits, "elinewidth": bar.thickness, "capthick": bar.thickness}
            ax.errorbar(x, y, fmt="none", ecolor=bar.color, capsize=bar.width, zorder=zorder, **look)
    (drawn,) = ax.plot(
        x, y, color=line.color or colour, linewidth=line.width or 2, zorder=zorder,
        linestyle=DASHES[str(line.dash)] if "lines" in mode else "",
        marker=SYMBOLS[symbol.removesuffix("-open")] if "markers" in mode else "", markersize=marker.size or 6,
        markerfacecolor="none" if symbol.endswith("-open") else colour, alpha=marker.opacity,
        markeredgecolor=marker.line.color or colour, markeredgewidth=marker.line.width or 0,
    )  # fmt: skip
    return drawn


def _draw_axes(ax: Axes, layout: Any, suffix: str) -> None:
    """Ranges, ticks, titles, grid: whatever the layout says about axes x<suffix> and y<suffix>."""
    from matplotlib.ticker import MaxNLocator

    ax.set_facecolor(layout.plot_bgcolor or "white")
    ax.set_axisbelow(True)
    ax.margins(0.06)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=FAINT, linewidth=1)
    ax.tick_params(**TICKS)
    for letter, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        spec = layout[f"{letter}axis{suffix}"]
        log = spec.type == "log"
        if log:
            ax.set(**{f"{letter}scale": "log"})
        elif spec.nticks:
            axis.set_major_locator(MaxNLocator(spec.nticks))
        if spec.tickvals is not None:
            axis.set_ticks(list(spec.tickvals), labels=[_plain(text) for text in spec.ticktext])
            axis.set_ticks([], minor=True)
            for label in axis.get_ticklabels():
                label.set_parse_math(False)
        if spec.range is not None:
            ax.set(**{f"{letter}lim": [10.0**end if log else end for end in spec.range]})
        if spec.showticklabels is False:
            axis.set_ticklabels([])
        if spec.showgrid is not False:
            axis.grid(True, color=GRID, linewidth=1)
        axis.labelpad = 8
        axis.set_label_text(_plain(spec.title.text), **TEXT)
