"""What the figures share: fonts, colours, the plotly template, parts that more than one has, and checks of values."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeopt.errors import FigureError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as Figure

Floats = NDArray[np.float64]

WIDTH, HEIGHT = 1200, 700
"""Pixels that labels and marks are laid out for."""
FONT = "Inter, Helvetica Neue, Arial, sans-serif"
TEXT_SIZE, TITLE_SIZE, TICK_SIZE = 13, 17, 12
INK, FAINT, GRID, GONE = "#333333", "#8c8c8c", "#e6e6e6", "#ececec"
BETWEEN, BEHIND = "#808080", "#a0a0a0"
"""Legible on white and on black; and what stands behind the rest."""
GONE_ANYWHERE = "rgba(128,128,128,0.15)"
"""`GONE` on white, and as much lighter than black."""
SEQUENTIAL = "Viridis"
"""Even steps of lightness, so that it survives greyscale and colour blindness."""
CATEGORICAL = ("#0072b2", "#d55e00", "#009e73", "#c8589a", "#a87400", "#2f8fcf", "#7a828c", "#8a63d2")
"""Okabe and Ito's hues, a grey and a violet, each at least 3 : 1 against white and against a dark page."""
DIVERGING = ((0.0, "#b2182b"), (0.25, "#ef8a62"), (0.5, "#f7f7f7"), (0.75, "#67a9cf"), (1.0, "#2166ac"))
"""From red by white, in the middle, to blue (ColorBrewer's RdBu)."""
SYMBOLS = {
    "circle": "o", "diamond": "D", "square": "s", "triangle-up": "^", "triangle-down": "v", "pentagon": "p",
    "star": "*", "hexagon": "h", "x": "X", "cross": "P", "x-thin": "x",
}  # fmt: skip
"""Marker symbols of plotly, and matplotlib's for the same shape; "-open" leaves them unfilled."""
LAST = 2000
"""Rank in the legend, where 1000 is plotly's default."""
LEGEND_ABOVE = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "xanchor": "left"}
LEGEND_BELOW = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": 0, "yref": "container", "yanchor": "bottom"}
"""Of a figure with a title, which a legend of several rows would cover."""


def plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise FigureError("drawing a figure needs plotly: pip install 'moeopt[figures]'") from None
    return go


# Whole figures --------------------------------------------------------------------------------------------------------


def dressed(figure: Figure) -> Figure:
    """The figure with the template that all have."""
    axis = {
        "gridcolor": GRID, "linecolor": FAINT, "showline": True, "zeroline": False, "ticks": "outside", "ticklen": 4,
        "tickcolor": FAINT, "tickfont": {"size": TICK_SIZE}, "title": {"font": {"size": TEXT_SIZE}, "standoff": 10},
    }  # fmt: skip
    template = {
        "font": {"family": FONT, "size": TEXT_SIZE, "color": INK}, "colorway": list(CATEGORICAL),
        "paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff", "margin": {"l": 70, "r": 30, "t": 90, "b": 65},
        "title": {"x": 0.02, "xanchor": "left", "y": 0.97, "yanchor": "top", "font": {"size": TITLE_SIZE}},
        "xaxis": axis, "yaxis": axis,
        "legend": {"font": {"size": TICK_SIZE}}, "hoverlabel": {"font": {"family": FONT, "size": TICK_SIZE}},
    }  # fmt: skip
    figure.update_layout(template={"layout": template})
    return figure


def empty(title: str, subtitle: str = "") -> Figure:
    """A figure with nothing but the template and a title, and what is to be known of it in a line below."""
    lines = [line for text in (title, subtitle) for line in textwrap.wrap(str(text), 110)]
    return dressed(plotly().Figure(layout={"title": {"text": "<br>".join(map(safe, lines))}, "showlegend": True}))


def nothing(title: str, why: str) -> Figure:
    """A figure that says why there is nothing to draw yet."""
    figure = empty(title)
    axis = {"visible": False, "range": [0, 1]}
    lines = "<br>".join(safe(line) for line in textwrap.wrap(why, 60))
    figure.add_annotation(text=lines, showarrow=False, x=0.5, y=0.5, font={"size": TEXT_SIZE, "color": FAINT})
    return figure.update_layout(xaxis=axis, yaxis=axis, showlegend=False)


def on_any_background(figure: Figure) -> Figure:
    """The same figure, changed in place, with no background of its own and text of a grey that all leave legible.

    Plotly has no colours that follow a page's theme.
    """
    layout = figure.layout.template.layout
    layout.update(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": BETWEEN},
        hoverlabel={"bgcolor": "#ffffff", "font": {"color": INK}}, legend={"bgcolor": "rgba(0,0,0,0)"},
    )  # fmt: skip
    for axis in (layout.xaxis, layout.yaxis):
        axis.gridcolor = "rgba(128,128,128,0.22)"
    if figure.layout.plot_bgcolor is not None:
        figure.layout.plot_bgcolor = GONE_ANYWHERE
    return figure


def compact(figure: Figure) -> Figure:
    """The same figure, changed in place, for a card of half a page: small margins, numbers of a few digits."""
    layout = on_any_background(figure).layout.template.layout
    layout.update(
        margin={"l": 55, "r": 15, "t": 66, "b": 48}, font={"size": TICK_SIZE},
        title={"font": {"size": TEXT_SIZE + 1}}, legend={"font": {"size": TICK_SIZE - 1}},
    )  # fmt: skip
    for axis in (layout.xaxis, layout.yaxis):
        axis.update(tickfont={"size": TICK_SIZE - 1}, title={"font": {"size": TICK_SIZE}, "standoff": 6})
    title, *rest = figure.layout.title.text.split("<br>")
    figure.layout.title.text = "<br>".join([f"<b>{title}</b>", *rest])
    for trace in figure.data:
        bars = [trace[name] for name in ("error_x", "error_y") if name in trace]
        for part, name, digits in (
            *((trace, name, digits) for name, digits in (("x", 5), ("y", 5), ("z", 3))),
            *((bar, name, 3) for bar in bars for name in ("array", "arrayminus")),
        ):
            if name in part and part[name] is not None:
                numbers = short(part[name], digits)
                part[name] = None  # plotly keeps an array that equals the list
                part[name] = numbers
    return figure


def short(values: Any, digits: int) -> Any:
    """Numbers, nested as they are, with so many significant digits; whole ones as integers, NaN as None."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, (list, tuple)):
        return [short(value, digits) for value in values]
    if values is None or math.isnan(values):
        return None
    rounded = float(f"{values:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


# Parts ----------------------------------------------------------------------------------------------------------------


def panel(figure: Figure, p: int, count: int, title: str | None, *, x: dict[str, Any], y: dict[str, Any]) -> None:
    """Panel p of a row of so many: its axes, and its title over it. Only the first shows its y axis's labels."""
    gap = 0.03 if count > 1 else 0.0
    width = (1 - gap * (count - 1)) / count
    left = p * (width + gap)
    across, down = on(p).values()
    x = {"domain": [left, min(1.0, left + width)], "anchor": down, **x}
    y = {"anchor": across, **y} | ({"matches": "y", "showticklabels": False, "title": {"text": ""}} if p else {})
    figure.update_layout({f"xaxis{across[1:]}": x, f"yaxis{down[1:]}": y})
    if title:
        figure.add_annotation(
            text=title, showarrow=False, xref=f"{across} domain", yref=f"{down} domain", x=0.5, y=1.0,
            xanchor="center", yanchor="bottom", yshift=4, font={"size": TEXT_SIZE},
        )  # fmt: skip


def on(p: int) -> dict[str, str]:
    """The axes of panel p, as a trace names them."""
    return {f"{letter}axis": f"{letter}{p + 1 if p else ''}" for letter in "xy"}


def scatter(figure: Figure, p: int, x: Any, y: Any, hover: Sequence[str] | str | None, **style: Any) -> None:
    """Marks or a line in panel p; `hover` is a text for each point, or a template, or None."""
    if isinstance(hover, str):
        said: dict[str, Any] = {"hovertemplate": f"{hover}<extra></extra>"}
    else:
        said = {"hoverinfo": "skip"} if hover is None else {"hovertext": hover, "hoverinfo": "text"}
    figure.add_trace(plotly().Scatter(x=x, y=y, **said, **style, **on(p)))


def line_of_bests(
    figure: Figure, x: Floats, y: Floats, end: float, hover: str, colour: str, width: float, **more: Any
) -> None:
    """A line that stays where it is until the next point, and from the last as far as `end`."""
    line = {"color": colour, "width": width, "shape": "hv"}
    scatter(figure, 0, np.append(x, end), np.append(y, y[-1]), hover, mode="lines", line=line, **more)


def reference_line(
    figure: Figure, p: int, x: list[float], y: list[float], hover: str, *, name: str, colour: str = BETWEEN
) -> None:
    """A dashed line with a legend entry, which no curve can cover as it would a label."""
    line = {"color": colour, "width": 1.5, "dash": "dash"}
    style = {"name": name, "legendgroup": name, "legendrank": LAST, "showlegend": p == 0}
    scatter(figure, p, np.array(x), np.array(y), [hover, hover], mode="lines", line=line, **style)


def heat_maps(
    figure: Figure,
    panels: Mapping[str, Any],
    *,
    hover: Sequence[Any] | str,
    y: dict[str, Any],
    low: float,
    high: float,
    colours: Any = SEQUENTIAL,
    title: str = "",
    bar: Mapping[str, Any],
    gap: float = 0,
) -> None:
    """Heat maps of (rows, experts) beside each other by their titles, with one colour bar; rows down, experts across.

    Args:
        hover: for each panel the texts (rows, experts), or one template for all.
        y: the axis of the rows, but for its range.
        low, high: what the ends of the colours stand for.
        title, bar: of the colours' bar, and what else differs from others.
        gap: pixels between cells.
    """
    figure.update_layout(
        showlegend=False, plot_bgcolor=GONE,
        coloraxis={"cmin": low, "cmax": high, "colorscale": colours, "colorbar": {"outlinewidth": 0, **bar}},
    )  # fmt: skip
    figure.layout.coloraxis.colorbar.title = {"text": title, "side": "right", "font": {"size": TEXT_SIZE}}
    for p, (name, z) in enumerate(panels.items()):
        rows, n = np.shape(z)
        texts = {"hovertemplate": f"{hover}<extra></extra>"} if isinstance(hover, str) else {"hovertext": hover[p]}
        figure.add_trace(
            plotly().Heatmap(
                z=z, x=np.arange(n), y=np.arange(rows), coloraxis="coloraxis", xgap=gap, ygap=gap, name=name,
                hoverinfo=None if isinstance(hover, str) else "text", hoverongaps=not isinstance(hover, str),
                **texts, **on(p),
            )
        )  # fmt: skip
        x = {"title": {"text": "expert"}, "range": [-0.5, n - 0.5], "showgrid": False, **numbered(n, 32 // len(panels))}
        panel(
            figure, p, len(panels), name, x=x | ({"matches": "x"} if p else {}),
            y={"range": [rows - 0.5, -0.5], "showgrid": False, **y},
        )  # fmt: skip


def cell_marks(figure: Figure, p: int, mask: NDArray[np.bool_], symbol: str, size: float) -> None:
    """A mark in every true cell of the heat map in panel p: a white circle, or another symbol in grey."""
    if mask.any():
        rows, columns = np.nonzero(mask)
        fill, edge = ("white", INK) if symbol == "circle" else (FAINT, FAINT)
        marker = {"symbol": symbol, "size": size, "color": fill, "line": {"color": edge, "width": 1}}
        scatter(figure, p, columns, rows, None, mode="markers", marker=marker)


def error_bar(losses: Floats, limits: Floats, colour: str) -> dict[str, Any]:
    """From losses (n,) to the ends of their intervals (n, 2); none where they are NaN."""
    below, above = np.maximum(losses - limits[:, 0], 0.0), np.maximum(limits[:, 1] - losses, 0.0)
    ends = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return {**ends, "color": colour, "thickness": 1.5, "width": 3}


def lanes(count: int, apart: float) -> list[float]:
    """Offsets around 0 that keep `count` intervals of one place beside each other."""
    step = min(apart, 0.7 / max(count, 1))
    return [(i - (count - 1) / 2) * step for i in range(count)]


def numbered(count: int, most: int, *, first: int = 0) -> dict[str, Any]:
    """Ticks at `first`, ..., one for each of `count` places, or at multiples of a power of 2 where `most` is less."""
    step = 2 ** max(0, math.ceil(math.log2(count / most)))
    ticks = [first, *(i for i in range(first + 1, first + count) if i % step == 0)]
    return {"tickvals": ticks, "ticktext": [str(tick) for tick in ticks]}


def named(names: Sequence[str], most: int, at: Sequence[float] | None = None) -> dict[str, Any]:
    """Ticks with names, at 0, 1, ... or `at`; evenly spaced ones of more than `most`."""
    step = -(-len(names) // most)
    places = list(range(len(names))) if at is None else list(at)
    return {"tickvals": places[::step], "ticktext": [label(name) for name in names[::step]]}


# Text -----------------------------------------------------------------------------------------------------------------


def safe(text: str) -> str:
    """Plain text, where plotly would read tags."""
    return html.escape(text, quote=False)


def label(name: str) -> str:
    """A name for a legend or an axis: cut where it would take the figure's width."""
    return safe(name if len(name) <= 32 else name[:31] + "…")


def with_interval(loss: float, low: float, high: float) -> str:
    return f"{loss:.4f}" + ("" if math.isnan(low) or math.isnan(high) else f" [{low:.4f}, {high:.4f}]")


# Checks ---------------------------------------------------------------------------------------------------------------


def numbers(name: str, value: Any, *, what: str, ndim: int, shape: tuple[int, ...] | None = None) -> Floats:
    """A float64 copy of an array; NaN is allowed, infinity is not."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise FigureError(f"{name} must be an array {what} of numbers, got {type(value).__name__}") from None
    if array.ndim != ndim or 0 in array.shape or (shape is not None and array.shape != shape):
        expected = f"{what} = {shape}" if shape is not None else what
        raise FigureError(f"{name} must have shape {expected}, got {array.shape}")
    if np.isinf(array).any():
        raise FigureError(f"{name} must not hold infinite values")
    return array


def shares(name: str, value: Any, *, what: str, shape: tuple[int, ...] | None = None) -> Floats:
    """The same of two axes, with numbers from 0 to 1 or NaN."""
    array = numbers(name, value, what=what, ndim=2, shape=shape)
    wrong = array[(array < 0) | (array > 1 + 1e-6)]
    if wrong.size:
        raise FigureError(f"{name} must hold shares between 0 and 1, got {wrong[0]:g}; divide counts by the tokens")
    return array


def finite(name: str, value: Any) -> float:
    with suppress(TypeError, ValueError):
        if math.isfinite(number := float(value)):
            return number
    raise FigureError(f"{name} must be a finite number, got {value!r}")


def check_intervals(name: str, losses: Floats, limits: Floats) -> None:
    """Losses (n,) must lie in their intervals (n, 2), where these are not NaN."""
    slack = 1e-9 * (1 + np.abs(losses))
    outside = (limits[:, 0] > losses + slack) | (limits[:, 1] < losses - slack)
    if outside.any():
        i = int(np.argmax(outside))
        raise FigureError(f"{name}: the interval {limits[i].tolist()} does not hold its loss {float(losses[i])}")
