"""Figures of the EEP and NAEE papers from plain arrays, drawn with plotly, written as HTML or, without a browser, PNG.

Nothing here knows a model or a study: arrays in, a `plotly.graph_objects.Figure` out. `write_png` draws such a figure
again with matplotlib, so that no browser is needed; it knows the parts that this module uses and refuses others.

    figure = activation_pattern(before, after)
    write_html(figure, "experts.html")
    write_png(figure, "experts.png")
"""

from __future__ import annotations

import html
import io
import math
import os
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import MoeoptError
from moeopt.plan import Plan, write_atomically

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.lines import Line2D

Floats = NDArray[np.float64]
Kept = tuple[int, ...] | int
"""A kept set by its experts, ascending, or by its column where the sets are not named."""

WIDTH, HEIGHT = 1200, 700
"""Pixels that labels and marks are laid out for."""
DISTINCT_LINES = 10
"""Lines that colour, dash and marker still tell apart."""
SINGLE = re.compile(r"layer \d+")
"""Names of curves that stand behind where there are too many."""
DRAWN_SETS = 400
"""Kept sets drawn for a layer; of more, evenly spaced ranks."""

FONT = "Inter, Helvetica Neue, Arial, sans-serif"
TEXT_SIZE, TITLE_SIZE, TICK_SIZE = 13, 17, 12
INK, FAINT, GRID, GONE = "#333333", "#8c8c8c", "#e6e6e6", "#ececec"
SEQUENTIAL = (
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725",
)  # fmt: skip
"""Viridis: even steps of lightness, so that it survives greyscale and colour blindness."""
CATEGORICAL = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")
"""Okabe and Ito's colours, without the yellow that white swallows."""
SYMBOLS = {
    "circle": "o", "diamond": "D", "square": "s", "triangle-up": "^", "triangle-down": "v", "pentagon": "p",
    "star": "*", "hexagon": "h", "x": "X", "cross": "P", "x-thin": "x",
}  # fmt: skip
"""Marker symbols of plotly, and matplotlib's for the same shape; "-open" leaves them unfilled."""
LAST = 2000
"""Rank in the legend, where 1000 is plotly's default."""
GOLDEN = 0.6180339887498949
"""Its multiples, less their integers, spread evenly however many there are."""
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


class FigureError(MoeoptError, ValueError):
    """A figure cannot be drawn from these values or written as asked, or a package that draws is missing."""


def activation_pattern(
    before: ArrayLike,
    after: ArrayLike | None = None,
    plan: Plan | None = None,
    *,
    title: str = "How often each expert is used",
) -> go.Figure:
    """Heat maps of expert use, layers down and experts across (EEP, arXiv 2407.00945, figure 4).

    Args:
        before: (layers, n), the share of tokens, 0 to 1, that the full model routes to each expert.
        after: (layers, n), the same of the pruned model, in the full model's numbering, NaN where an expert is gone.
            It becomes a second panel on the same colour scale; experts that are gone are grey and crossed out.
        plan: marks the experts it keeps, or merges into others, by a dot in the first panel; `after` must then hold
            numbers for the experts kept, where a layer is pruned, and for no others.

    Raises:
        FigureError: when shapes differ, a share is not between 0 and 1, or `plan` does not fit.
    """
    go = _plotly()
    panels = [("full model", _shares("before", before))]
    shape = panels[0][1].shape
    layers, n = shape
    if after is not None:
        panels.append(("after pruning (× removed)", _shares("after", after, shape=shape)))
    of = len(panels)
    largest = max((float(np.nanmax(z)) for _, z in panels if not np.isnan(z).all()), default=0.0)
    high = largest if largest > 1e-9 else 1.0
    ticks = _ticks(high)
    bar = {
        "title": {"text": "share of tokens routed to the expert (%)", "side": "right"},
        "tickvals": ticks,
        "ticktext": [f"{100 * tick:.6g}" for tick in ticks],
        "outlinewidth": 0,
        "thickness": 16,
    }
    scale = [(i / (len(SEQUENTIAL) - 1), colour) for i, colour in enumerate(SEQUENTIAL)]
    figure = _figure(title)
    figure.update_layout(showlegend=False, plot_bgcolor=GONE)
    figure.update_layout(coloraxis={"cmin": 0.0, "cmax": high, "colorscale": scale, "colorbar": bar})
    size = _mark_size(layers, n * of)
    cross = {"symbol": "x-thin", "size": size, "color": FAINT, "line": {"color": FAINT, "width": 1}}
    marks = [(p, np.isnan(z), cross) for p, (_, z) in enumerate(panels)]
    if plan is not None:
        kept = _kept_mask(plan, shape, panels[1][1] if after is not None else None)
        panels[0] = ("full model (○ kept by the plan)", panels[0][1])
        marks.append(
            (0, kept, {"symbol": "circle", "size": size, "color": "white", "line": {"color": INK, "width": 1}})
        )
    gap = 1 if n * of <= 64 else 0.5
    x = {"title": {"text": "expert"}, "range": [-0.5, n - 0.5], "showgrid": False, **_numbered(n, 32 // of)}
    y = {"title": {"text": "layer"}, "range": [layers - 0.5, -0.5], "showgrid": False, **_numbered(layers, 20)}
    for p, (name, z) in enumerate(panels):
        hover = [
            [f"layer {i}, expert {j}: " + ("removed" if math.isnan(v) else f"{v:.2%} of tokens") for j, v in cells]
            for i, cells in ((i, enumerate(row)) for i, row in enumerate(z.tolist()))
        ]
        heat = go.Heatmap(z=z, x=np.arange(n), y=np.arange(layers), coloraxis="coloraxis", xgap=gap, ygap=gap)
        figure.add_trace(heat.update(name=name, hovertext=hover, hoverinfo="text", **_on(p)))
        _panel(figure, p, of, name, x={**x, **({"matches": "x"} if p else {})}, y=y)
    for p, mask, marker in marks:
        if mask.any():
            rows, columns = np.nonzero(mask)
            figure.add_trace(go.Scatter(x=columns, y=rows, mode="markers", marker=marker, hoverinfo="skip", **_on(p)))
    return figure


def ensemble_curve(
    curves: Mapping[str, ArrayLike | tuple[ArrayLike, ArrayLike]],
    reference: float | None = None,
    *,
    top: Collection[str] | None = None,
    title: str = "Loss against the number of experts kept",
) -> go.Figure:
    """Lines of loss over 1 to n experts kept (EEP, arXiv 2407.00945, figure 3).

    Up to ten curves have a colour and a marker of their own. Of more, only those named in `top` do, and the others are
    thin and grey behind them.

    Args:
        curves: for each name ("all layers", "layer 3") the losses (n,) with 1, 2, ..., n experts kept, NaN where one
            was not measured; or a tuple of these and their intervals (n, 2).
        reference: loss of the full model, a dashed line.
        top: of more than ten curves, the names to draw in colour, at most ten. By default those that are not called
            "layer" and a number (the first ten of them); where all are, the first, the middle and the last.

    Raises:
        FigureError: when there is no curve, lengths differ, a value is infinite, or `top` names an unknown curve.
    """
    if not curves:
        raise FigureError("curves must hold at least one curve, got none")
    parsed = {name: _curve(name, value) for name, value in curves.items()}
    lengths = {name: len(values) for name, (values, _) in parsed.items()}
    n = max(lengths.values())
    if len(set(lengths.values())) > 1:
        raise FigureError(f"curves must all have one loss for each of 1 to n experts kept, got lengths {lengths}")
    bright = _bright(list(parsed), top)
    grey = [name for name in parsed if name not in bright]
    crowd = f"{len(grey)} {'single layers' if all(SINGLE.fullmatch(name) for name in grey) else 'others'}"
    figure = _figure(title)
    kept = np.arange(1, n + 1)
    barred = [name for name in bright if parsed[name][1] is not None]
    lanes = dict(zip(barred, _lanes(len(barred), 0.05)))
    for name in grey + bright:
        values, interval = parsed[name]
        limits = np.full((n, 2), np.nan) if interval is None else interval
        hover = [f"{_safe(name)}, {k} kept: {_with_interval(v, *ends)}" for k, v, ends in zip(kept, values, limits)]
        style: dict[str, Any]
        if name in bright:
            c = bright.index(name)
            colour, dash = CATEGORICAL[c % len(CATEGORICAL)], "solid" if c < len(CATEGORICAL) else "dash"
            style = {
                "mode": "lines+markers",
                "line": {"color": colour, "width": 2, "dash": dash},
                "marker": {"symbol": list(SYMBOLS)[c], "size": 8, "color": colour},
                "name": _label(name),
            }
            if interval is not None:
                style["error_y"] = _error_bar(values, interval, colour)
        else:
            style = {
                "mode": "lines",
                "line": {"color": "#c4c4c4", "width": 1},
                "name": crowd,
                "legendgroup": "others",
                "legendrank": LAST,
                "showlegend": name == grey[0],
            }
        _scatter(figure, 0, kept + lanes.get(name, 0.0), values, hover, **style)
    if reference is not None:
        level = _finite("reference", reference)
        _reference(figure, 0, [0.5, n + 0.5], [level, level], f"full model: {level:.4f}", name="full model")
    x = {"title": {"text": "experts kept in each layer pruned"}, "range": [0.5, n + 0.5], "showgrid": False}
    _panel(figure, 0, 1, None, x={**x, **_numbered(n, 24, first=1)}, y={"title": {"text": "loss (nats)"}})
    return figure


def kept_set_errors(
    losses: Sequence[Mapping[tuple[int, ...], float]] | ArrayLike,
    chosen: Plan | Sequence[Collection[int] | int | None] | None = None,
    *,
    sets: Sequence[Collection[int]] | None = None,
    raw: bool = False,
    title: str = "Output error of every kept set",
) -> go.Figure:
    """For every layer, the output error of all the sets of experts it could keep (NAEE, arXiv 2402.14800).

    Of more than 400 sets in a layer, 400 evenly spaced ranks are drawn, the best and the worst among them.

    Args:
        losses: one dictionary a layer, {experts kept: error}; or an array (layers, sets).
        chosen: the set to mark in each layer: a plan (layers it merges get no mark), or one set a layer, or None; for
            an array without `sets`, column numbers.
        sets: the experts kept in each column, where `losses` is an array.
        raw: draw the errors themselves, on a log axis where all are above 0, instead of errors over the layer's median.

    Raises:
        FigureError: when an error is not finite, a layer's median is not above 0 (unless `raw`), or a chosen set is not
            among its layer's sets.
    """
    rows = _set_rows(losses, sets)
    clouds: list[tuple[Any, Any, list[str]]] = []
    best: list[tuple[int, float, str]] = []
    picked: list[tuple[int, float, str]] = []
    for i, ((names, values), choice) in enumerate(zip(rows, _chosen_sets(chosen, len(rows)))):
        median = 1.0 if raw else float(np.median(values))
        if median <= 0:
            raise FigureError(f"layer {i}: its median error, {median:g}, must be above 0 to divide by; or use raw=True")
        order = np.argsort(values, kind="stable")
        drawn = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), DRAWN_SETS)).round().astype(int))]
        rank = np.empty(len(order), dtype=int)
        rank[order] = np.arange(1, len(order) + 1)
        hover = partial(_set_hover, i, names, values, None if raw else median, rank)
        marked = [int(order[0])]
        best.append((i, values[order[0]] / median, "best: " + hover(marked[0])))
        if choice is not None:
            if choice not in names:
                hint = "; name the columns by sets" if isinstance(names[0], int) and not isinstance(choice, int) else ""
                raise FigureError(f"layer {i}: the chosen {_set_name(choice)} is not among its {len(names)} sets{hint}")
            marked.append(names.index(choice))
            picked.append((i, values[marked[-1]] / median, "chosen: " + hover(marked[-1])))
        spread = np.where(np.isin(drawn, marked), 0.0, 0.56 * ((drawn * GOLDEN) % 1 - 0.5))
        clouds.append((i + spread, values[drawn] / median, [hover(s) for s in drawn]))
    counts = sorted({len(names) for names, _ in rows})
    name = f"all {counts[0]:,} sets" if len(counts) == 1 else "all sets"
    if counts[-1] > DRAWN_SETS:
        name = f"{DRAWN_SETS} of {counts[-1]:,} sets"
    figure = _figure(title)
    cloud = {"symbol": "circle", "size": 4 if len(rows) > 8 else 6, "color": CATEGORICAL[0], "opacity": 0.4}
    ring = {"symbol": "circle-open", "size": 12, "color": INK, "line": {"color": INK, "width": 1.5}}
    diamond = {"symbol": "diamond", "size": 7, "color": CATEGORICAL[1]}
    x, y = (np.concatenate([layer[c] for layer in clouds]) for c in (0, 1))
    _scatter(figure, 0, x, y, [text for *_, texts in clouds for text in texts], mode="markers", marker=cloud, name=name)
    for name, points, marker in (("best set", best, ring), ("chosen set", picked, diamond)):
        if points:
            at, error = (np.array([point[c] for point in points]) for c in (0, 1))
            _scatter(figure, 0, at, error, [text for *_, text in points], mode="markers", marker=marker, name=name)
    if not raw:
        line = {"color": FAINT, "width": 1, "dash": "dash"}
        figure.add_shape(type="line", xref="x domain", x0=0, x1=1, yref="y", y0=1.0, y1=1.0, line=line, layer="below")
    errors: dict[str, Any] = {
        "title": {"text": "layer output error" + ("" if raw else " / the layer's median (ratio)")}
    }
    if raw and all((values > 0).all() for _, values in rows):
        errors["type"] = "log"
    layer = {"title": {"text": "layer"}, "range": [-0.6, len(rows) - 0.4], "showgrid": False}
    _panel(figure, 0, 1, None, x={**layer, **_numbered(len(rows), 40)}, y=errors)
    return figure


def methods_bar(
    rows: Iterable[Mapping[str, Any]],
    *,
    reference: float | Mapping[str, float] | None = None,
    title: str = "Loss of each method",
) -> go.Figure:
    """Loss of each method as a dot with its interval as a bar, one panel for each number of experts kept.

    The bars are the intervals: losses that differ in their third digit are told apart by position on an axis that does
    not start at 0, which the length of a bar would misstate. Each panel has a loss axis of its own. Methods stand in
    one order everywhere, the least loss (against the others of its panel and split, on average) on top.

    Args:
        rows: with the keys name, loss, low, high (both None: no interval), split ("test") and keep, an integer.
        reference: loss of the full model, one number or one for each split: dashed lines.

    Raises:
        FigureError: when there is no row, a key is missing, a value is not finite, an interval does not hold its loss,
            or two rows have the same name, split and keep.
    """
    table = _method_rows(rows)
    keeps = sorted({row["keep"] for row in table}, reverse=True)
    splits = list(dict.fromkeys(row["split"] for row in table))
    if isinstance(reference, Mapping):
        if unknown := [split for split in reference if split not in splits]:
            raise FigureError(f"reference names splits that no row has: {unknown}; the rows have {splits}")
        references = {split: _finite(f"reference of {split!r}", value) for split, value in reference.items()}
    else:
        references = {} if reference is None else {"": _finite("reference", reference)}
    names = _by_loss(table)
    styles = {
        split: (CATEGORICAL[i % len(CATEGORICAL)], list(SYMBOLS)[i % 5], lane)
        for i, (split, lane) in enumerate(zip(splits, _lanes(len(splits), 0.28)))
    }
    y = {"range": [len(names) - 0.5, -0.5], "tickvals": list(range(len(names))), "automargin": True}
    x = {"title": {"text": "loss (nats)"}, "nticks": max(3, 10 // len(keeps))}
    figure = _figure(title)
    shown: set[str] = set()
    for p, keep in enumerate(keeps):
        for split, level in references.items():
            name, colour = ("full model", INK) if not split else (f"full model, {_label(split)}", styles[split][0])
            ends, hover = [-0.5, len(names) - 0.5], f"{name}: {level:.4f}"
            _reference(figure, p, [level, level], ends, hover, name=name, colour=colour, showlegend=p == 0)
        for split, (colour, symbol, lane) in styles.items():
            mine = [row for row in table if row["keep"] == keep and row["split"] == split]
            if not mine:
                continue
            loss, low, high = (np.array([row[key] for row in mine]) for key in ("loss", "low", "high"))
            hovers = [
                f"{_safe(row['name'])}, keep {keep}, {_safe(split)}: "
                + _with_interval(row["loss"], row["low"], row["high"])
                for row in mine
            ]
            _scatter(
                figure, p, loss, np.array([names.index(row["name"]) for row in mine]) + lane, hovers,
                mode="markers", marker={"symbol": symbol, "size": 8, "color": colour},
                error_x=_error_bar(loss, np.stack([low, high], axis=1), colour),
                name=_label(split), legendgroup=split, showlegend=split not in shown,
            )  # fmt: skip
            shown.add(split)
        heading = f"{keep} experts kept" if keep > 1 else "1 expert kept"
        _panel(figure, p, len(keeps), heading, x=x, y={**y, "ticktext": [_label(name) for name in names]})
    return figure


def write_html(figure: go.Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as one HTML file that needs no network; a file of that name is replaced whole.

    Raises:
        FigureError: when the folder does not exist, or `figure` is not a plotly figure.
    """
    _check_figure(figure)
    page = figure.to_html(full_html=True, include_plotlyjs=True, div_id="figure", config={"displaylogo": False})
    write_atomically(_target(path), page.encode())


def write_png(
    figure: go.Figure, path: str | os.PathLike[str], *, width: int = WIDTH, height: int = HEIGHT, scale: float = 2
) -> None:
    """Write a figure of this module as a PNG of (width * scale, height * scale) pixels, without a browser.

    matplotlib draws it again. It knows heat maps, scatter traces of lines and markers with error bars, straight
    reference lines, panels in a row with titles, and one colour bar.

    Raises:
        FigureError: when the figure has anything else (the trace type is named), the size is out of range, or the
            folder does not exist.
    """
    _check_figure(figure)
    for name, value in (("width", width), ("height", height)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 100 <= value <= 10_000:
            raise FigureError(f"{name} must be an integer between 100 and 10000 pixels, got {value!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0.25 <= scale <= 8:
        raise FigureError(f"scale must be a number between 0.25 and 8, got {scale!r}")
    target = _target(path)
    buffer = io.BytesIO()
    _redrawn(figure, int(width), int(height), float(scale)).print_png(buffer)
    write_atomically(target, buffer.getvalue())


# Parts of the plotly figures.


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise FigureError("drawing a figure needs plotly: pip install 'moeopt[figures]'") from None
    return go


def _figure(title: str) -> go.Figure:
    """An empty figure with the shared template; everything about fonts, greys and spacing is here."""
    go = _plotly()
    axis = {
        "gridcolor": GRID,
        "linecolor": FAINT,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": FAINT,
        "tickfont": {"size": TICK_SIZE},
        "title": {"font": {"size": TEXT_SIZE}, "standoff": 10},
        "zeroline": False,
    }
    template = go.layout.Template(
        layout={
            "font": {"family": FONT, "size": TEXT_SIZE, "color": INK},
            "title": {"x": 0.02, "xanchor": "left", "font": {"size": TITLE_SIZE}},
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "colorway": list(CATEGORICAL),
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"font": {"size": TICK_SIZE}},
            "margin": {"l": 70, "r": 30, "t": 90, "b": 65},
            "hoverlabel": {"font": {"family": FONT, "size": TICK_SIZE}},
        }
    )
    lines = [_safe(line) for line in textwrap.wrap(str(title), 110)]
    return go.Figure(layout={"template": template, "title": {"text": "<br>".join(lines)}, "showlegend": True})


def _scatter(figure: go.Figure, panel: int, x: Any, y: Any, hover: list[str], **style: Any) -> None:
    figure.add_trace(_plotly().Scatter(x=x, y=y, hovertext=hover, hoverinfo="text", **style, **_on(panel)))


def _reference(
    figure: go.Figure,
    panel: int,
    x: list[float],
    y: list[float],
    hover: str,
    *,
    name: str,
    colour: str = INK,
    showlegend: bool = True,
) -> None:
    """A dashed line with a legend entry, which no curve can cover as it would a label."""
    line = {"color": colour, "width": 1.5, "dash": "dash"}
    style = {"name": name, "legendgroup": name, "legendrank": LAST, "showlegend": showlegend}
    _scatter(figure, panel, np.array(x), np.array(y), [hover, hover], mode="lines", line=line, **style)


def _lanes(count: int, apart: float) -> Floats:
    """Offsets around 0 that keep `count` intervals of one place beside each other."""
    return np.asarray((np.arange(count) - (count - 1) / 2) * min(apart, 0.7 / max(count, 1)), dtype=np.float64)


def _axis(name: str, panel: int) -> str:
    return f"{name}{panel + 1 if panel else ''}"


def _on(panel: int) -> dict[str, str]:
    return {"xaxis": _axis("x", panel), "yaxis": _axis("y", panel)}


def _panel(figure: go.Figure, p: int, of: int, title: str | None, *, x: dict[str, Any], y: dict[str, Any]) -> None:
    """Panel p of a row: its axes, and its title over it. Only the first shows its y axis's labels."""
    gap = 0.03 if of > 1 else 0.0
    width = (1 - gap * (of - 1)) / of
    left = p * (width + gap)
    figure.update_layout(
        {
            _axis("xaxis", p): {"domain": [left, min(1.0, left + width)], "anchor": _axis("y", p), **x},
            _axis("yaxis", p): {"anchor": _axis("x", p), **y},
        }
    )
    if p:
        figure.update_layout({_axis("yaxis", p): {"matches": "y", "showticklabels": False, "title": {"text": ""}}})
    if title:
        figure.add_annotation(
            text=title, showarrow=False, xref=f"{_axis('x', p)} domain", yref=f"{_axis('y', p)} domain", x=0.5, y=1.0,
            xanchor="center", yanchor="bottom", yshift=4, font={"size": TEXT_SIZE},
        )  # fmt: skip


def _numbered(count: int, most: int, *, first: int = 0) -> dict[str, Any]:
    """Ticks at `first`, ..., one for each of `count` places, or at multiples of a power of 2 where `most` is less."""
    step = 1
    while math.ceil(count / step) > most:
        step *= 2
    ticks = [first, *(i for i in range(first + 1, first + count) if i % step == 0)]
    return {"tickvals": ticks, "ticktext": [str(tick) for tick in ticks]}


def _ticks(high: float) -> list[float]:
    """About five round numbers from 0 to `high`."""
    power = 10.0 ** math.floor(math.log10(high / 5))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if high / (m * power) <= 5.5)
    return [i * step for i in range(math.floor(high / step * (1 + 1e-9)) + 1)]


def _mark_size(rows: int, columns: int) -> float:
    """Of a mark in a cell of a heat map, at `WIDTH` by `HEIGHT`."""
    return float(np.clip(0.4 * min(0.8 * HEIGHT / rows, 0.85 * WIDTH / columns), 3, 9))


def _error_bar(values: Floats, interval: Floats, colour: str) -> dict[str, Any]:
    below, above = values - interval[:, 0], interval[:, 1] - values
    return {
        "type": "data",
        "symmetric": False,
        "array": np.maximum(above, 0.0),
        "arrayminus": np.maximum(below, 0.0),
        "color": colour,
        "thickness": 1.5,
        "width": 3,
    }


def _safe(text: str) -> str:
    """Plain text, where plotly would read tags."""
    return html.escape(text, quote=False)


def _label(name: str) -> str:
    """A name for a legend or an axis: cut where it would take the figure's width."""
    return _safe(name if len(name) <= 32 else name[:31] + "…")


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.4f}" + ("" if math.isnan(low) or math.isnan(high) else f" [{low:.4f}, {high:.4f}]")


def _set_hover(layer: int, names: list[Kept], values: Floats, median: float | None, rank: Any, s: int) -> str:
    ratio = "" if median is None else f", {values[s] / median:.3f} of the median"
    return f"layer {layer}, {_set_name(names[s])}: error {values[s]:.4g}{ratio}, rank {rank[s]} of {len(names)}"


def _set_name(kept: Kept) -> str:
    return f"set {kept}" if isinstance(kept, int) else "kept " + " ".join(map(str, kept))


# Checks of what comes in.


def _numbers(name: str, value: Any, *, what: str, ndim: int, shape: tuple[int, ...] | None = None) -> Floats:
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


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise FigureError(f"{name} must be a finite number, got {value!r}")
    return number


def _shares(name: str, value: ArrayLike, *, shape: tuple[int, ...] | None = None) -> Floats:
    shares = _numbers(name, value, what="(layers, n)", ndim=2, shape=shape)
    wrong = shares[(shares < 0) | (shares > 1 + 1e-6)]
    if wrong.size:
        raise FigureError(
            f"{name} must hold shares of tokens between 0 and 1, got {wrong[0]:g}; divide counts by the tokens"
        )
    return shares


def _kept_mask(plan: Plan, shape: tuple[int, ...], after: Floats | None) -> NDArray[np.bool_]:
    """(layers, n), True for experts that live on under the plan, alone or merged."""
    layers, n = shape
    sizes = {layer.experts for layer in plan.layers}
    if len(plan.layers) != layers or sizes != {n}:
        raise FigureError(
            f"plan must have {layers} layers of {n} experts, as before has; got {len(plan.layers)} layers of "
            f"{' or '.join(map(str, sorted(sizes)))}"
        )
    mask = np.stack([(layer.expert_matrix != 0).any(axis=0) for layer in plan.layers])
    if after is not None:
        for i, layer in enumerate(plan.layers):
            there = ~np.isnan(after[i])
            if layer.kept is not None and (there != mask[i]).any():
                raise FigureError(
                    f"after has numbers for experts {np.flatnonzero(there).tolist()} of layer {i}, but the plan keeps "
                    f"{sorted(layer.kept)}; the others must be NaN, in the full model's numbering"
                )
    return np.asarray(mask, dtype=np.bool_)


def _curve(name: str, value: Any) -> tuple[Floats, Floats | None]:
    interval = None
    if isinstance(value, tuple) and len(value) == 2 and np.ndim(value[1]) == 2:
        value, interval = value
    values = _numbers(f"curve {name!r}", value, what="(n,)", ndim=1)
    if interval is None:
        return values, None
    limits = _numbers(f"intervals of {name!r}", interval, what="(n, 2)", ndim=2, shape=(len(values), 2))
    _check_intervals(f"curve {name!r}", values, limits)
    return values, limits


def _check_intervals(name: str, values: Floats, limits: Floats) -> None:
    slack = 1e-9 * (1 + np.abs(values))
    outside = (limits[:, 0] > values + slack) | (limits[:, 1] < values - slack)
    if outside.any():
        i = int(np.argmax(outside))
        raise FigureError(f"{name}: the interval {limits[i].tolist()} does not hold its loss {float(values[i])}")


def _bright(names: list[str], top: Collection[str] | None) -> list[str]:
    """Names of the curves to draw in colour, in the order of `names`."""
    if isinstance(top, str):
        raise FigureError(f"top must be a collection of names, got the string {top!r}")
    if unknown := [name for name in top or () if name not in names]:
        raise FigureError(f"top names curves that are not there: {unknown}; there are {names}")
    if len(names) <= DISTINCT_LINES:
        return names
    if top is None:
        top = [name for name in names if not SINGLE.fullmatch(name)][:DISTINCT_LINES]
        top = top or [names[0], names[len(names) // 2], names[-1]]
    if len(set(top)) > DISTINCT_LINES:
        raise FigureError(f"top must name at most {DISTINCT_LINES} curves, got {len(set(top))}")
    return [name for name in names if name in top]


def _expert_set(kept: Any, where: str) -> tuple[int, ...]:
    try:
        experts = tuple(sorted(int(expert) for expert in kept))
    except (TypeError, ValueError):
        raise FigureError(f"{where}: a set must be experts kept, as (0, 2), got {kept!r}") from None
    return experts


def _set_rows(losses: Any, sets: Sequence[Collection[int]] | None) -> list[tuple[list[Kept], Floats]]:
    """For each layer its sets and their errors (sets,)."""
    rows: list[tuple[list[Kept], Floats]] = []
    if isinstance(losses, Sequence) and losses and all(isinstance(row, Mapping) for row in losses):
        if sets is not None:
            raise FigureError("sets names the columns of an array; dictionaries name their sets themselves")
        for i, row in enumerate(losses):
            names: list[Kept] = [_expert_set(kept, f"layer {i}") for kept in row]
            if len(set(names)) < len(names):
                raise FigureError(f"layer {i} has the same set of experts twice, in another order")
            rows.append((names, _numbers(f"losses of layer {i}", list(row.values()), what="(sets,)", ndim=1)))
    else:
        array = _numbers("losses", losses, what="(layers, sets)", ndim=2)
        columns: list[Kept] = list(range(array.shape[1]))
        if sets is not None:
            columns = [_expert_set(kept, f"sets, entry {i}") for i, kept in enumerate(sets)]
            if len(columns) != array.shape[1] or len(set(columns)) < len(columns):
                raise FigureError(
                    f"sets must name each of the {array.shape[1]} columns of losses, each differently; got "
                    f"{len(columns)} sets, {len(set(columns))} different"
                )
        rows = [(columns, row) for row in array]
    for i, (_, values) in enumerate(rows):
        if np.isnan(values).any():
            raise FigureError(f"losses of layer {i} must be finite, got NaN")
    return rows


def _chosen_sets(chosen: Any, layers: int) -> list[Kept | None]:
    if chosen is None:
        return [None] * layers
    if isinstance(chosen, Plan):
        chosen = [layer.kept for layer in chosen.layers]
    if len(chosen) != layers:
        raise FigureError(f"chosen must have one set for each of the {layers} layers of losses, got {len(chosen)}")
    found: list[Kept | None] = []
    for i, kept in enumerate(chosen):
        if kept is None or isinstance(kept, (int, np.integer)):
            found.append(None if kept is None else int(kept))
        else:
            found.append(_expert_set(kept, f"chosen, layer {i}"))
    return found


def _method_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        if missing := [key for key in ("name", "loss", "low", "high", "split", "keep") if key not in row]:
            raise FigureError(f"row {i} has no {', '.join(missing)}; it has {sorted(row)}")
        where = f"row {i} ({row['name']})"
        keep = row["keep"]
        if isinstance(keep, bool) or not isinstance(keep, (int, np.integer)) or keep < 1:
            raise FigureError(f"{where}: keep must be an integer of at least 1, got {keep!r}")
        if (row["low"] is None) != (row["high"] is None):
            raise FigureError(f"{where}: low and high must both be numbers or both None")
        loss = _finite(f"{where}: loss", row["loss"])
        low, high = (math.nan if row[key] is None else _finite(f"{where}: {key}", row[key]) for key in ("low", "high"))
        _check_intervals(where, np.array([loss]), np.array([[low, high]]))
        texts = {key: str(row[key]) for key in ("name", "split")}
        table.append({**texts, "keep": int(keep), "loss": loss, "low": low, "high": high})
    if not table:
        raise FigureError("rows must hold at least one row, got none")
    keys = [(row["name"], row["split"], row["keep"]) for row in table]
    if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
        raise FigureError(f"two rows have the name, split and keep {twice[0]}")
    return table


def _by_loss(table: list[dict[str, Any]]) -> list[str]:
    """Names of the methods, the least loss against the mean of its panel and split first."""
    groups: dict[tuple[int, str], list[float]] = {}
    for row in table:
        groups.setdefault((row["keep"], row["split"]), []).append(row["loss"])
    excess: dict[str, list[float]] = {}
    for row in table:
        excess.setdefault(row["name"], []).append(row["loss"] - float(np.mean(groups[row["keep"], row["split"]])))
    return sorted(excess, key=lambda name: float(np.mean(excess[name])))


def _check_figure(figure: Any) -> None:
    if not isinstance(figure, _plotly().Figure):
        raise FigureError(f"a plotly figure is needed, got {type(figure).__name__}")


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if not target.parent.is_dir():
        raise FigureError(f"no folder {str(target.parent)!r} to write {target.name!r} into")
    if target.is_dir():
        raise FigureError(f"{str(target)!r} is a folder, not a file to write")
    return target


# The same figures with matplotlib. One point is one pixel of the plotly layout, so that sizes carry over.


def _redrawn(figure: go.Figure, width: int, height: int, scale: float) -> FigureCanvasAgg:
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
    handles: list[tuple[float, Line2D, str]] = []
    image = None
    for order, trace in enumerate(figure.data):
        ax = axes[trace.xaxis or "x"]
        if trace.type == "heatmap":
            image = _draw_heatmap(ax, trace, layout.coloraxis)
            continue
        line = _draw_scatter(ax, trace, zorder=3 + order)
        if layout.showlegend and trace.showlegend is not False and trace.name:
            handles.append((trace.legendrank or 1000, line, _plain(trace.name)))
    for shape in layout.shapes:
        ax, line = axes[shape.xref.split()[0]], shape.line
        across, at = (ax.axhline, shape.y0) if shape.y0 == shape.y1 else (ax.axvline, shape.x0)
        across(at, color=line.color or INK, linewidth=line.width or 2, linestyle=DASHES[line.dash or "solid"], zorder=1)
    for name, ax in axes.items():
        _draw_axes(ax, layout, name[1:])
    for note in layout.annotations:
        axes[note.xref.split()[0]].set_title(_plain(note.text), fontsize=TEXT_SIZE, color=INK, pad=7, parse_math=False)
    if layout.title.text:
        heading = drawing.suptitle(_plain(layout.title.text), x=0.02, ha="left", fontsize=TITLE_SIZE, color=INK)
        heading.set_parse_math(False)
    if image is not None:
        spec = layout.coloraxis.colorbar
        bar = drawing.colorbar(image, ax=list(axes.values()), fraction=0.03, pad=0.02, aspect=30)
        bar.set_ticks(list(spec.tickvals), labels=list(spec.ticktext))
        bar.set_label(_plain(spec.title.text), fontsize=TEXT_SIZE, color=INK, labelpad=8)
        bar.ax.tick_params(labelsize=TICK_SIZE, labelcolor=INK, color=FAINT, length=4)
        bar.outline.set_visible(False)  # type: ignore[operator]
    if handles:
        handles.sort(key=lambda entry: entry[0])
        legend = drawing.legend(
            [line for _, line, _ in handles], [text for *_, text in handles], loc="outside right upper",
            fontsize=TICK_SIZE, labelcolor=INK, frameon=False, handlelength=2.2,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    return canvas


def _check_parts(figure: go.Figure) -> None:
    """Refuse what `_redrawn` would leave out or get wrong."""
    if not figure.data:
        raise FigureError("the figure has no traces to draw")
    suffixes = set()
    for i, trace in enumerate(figure.data):
        if trace.type not in ("heatmap", "scatter"):
            raise FigureError(f"trace {i} is of type {trace.type!r}; a PNG can hold heatmap and scatter, HTML any")
        suffix = (trace.xaxis or "x")[1:]
        suffixes.add(suffix)
        domain = figure.layout[f"yaxis{suffix}"].domain
        if (trace.yaxis or "y")[1:] != suffix or (domain is not None and tuple(domain) != (0, 1)):
            raise FigureError(f"trace {i}: panels must stand in one row, each with a pair of axes of its own")
        arrays = {"x": trace.x, "y": trace.y}
        if trace.type == "heatmap":
            arrays["z"] = trace.z
            features = [("coloraxis", trace.coloraxis, ["coloraxis"])]
        else:
            mode = "+".join(sorted(set((trace.mode or "lines").split("+")) - {"lines", "markers"}))
            features = [
                ("mode", mode, [""]),
                ("fill", trace.fill or "none", ["none"]),
                ("marker.symbol", _symbol(trace)[0], list(SYMBOLS)),
                ("line.dash", trace.line.dash or "solid", list(DASHES)),
            ]
        for part, value, known in features:
            if value not in known:
                raise FigureError(f"trace {i}, a {trace.type}, has the {part} {value!r}, which a PNG cannot hold")
        for name, array in arrays.items():
            if array is None or np.asarray(array).dtype.kind not in "iuf":
                raise FigureError(f"trace {i}, a {trace.type}, needs numbers as {name}")
    panels = {f"x{suffix}" for suffix in suffixes}
    for shape in figure.layout.shapes:
        straight = shape.type == "line" and (shape.x0 == shape.x1 or shape.y0 == shape.y1)
        if not straight or str(shape.xref).split()[0] not in panels:
            raise FigureError(f"the layout has a {shape.type!r} shape; a PNG can hold a panel's straight lines")
    for note in figure.layout.annotations:
        if note.xref not in {f"{panel} domain" for panel in panels}:
            raise FigureError(f"the annotation {note.text!r} is not a panel's title, and a PNG can hold no other")


def _plain(text: str | None) -> str:
    return html.unescape((text or "").replace("<br>", "\n"))


def _edges(centres: Any) -> Floats:
    """Of cells one unit wide."""
    points = np.asarray(centres, dtype=np.float64)
    return np.append(points - 0.5, points[-1] + 0.5)


def _draw_heatmap(ax: Axes, trace: Any, coloraxis: Any) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    z = np.ma.masked_invalid(np.asarray(trace.z, dtype=np.float64))
    stops = [(float(at), str(colour)) for at, colour in coloraxis.colorscale]
    return ax.pcolormesh(
        _edges(trace.x), _edges(trace.y), z,
        cmap=LinearSegmentedColormap.from_list("sequential", stops), vmin=coloraxis.cmin, vmax=coloraxis.cmax,
        edgecolors=GONE, linewidth=trace.xgap or 0,
    )  # fmt: skip


def _symbol(trace: Any) -> tuple[str, bool]:
    symbol = str(trace.marker.symbol or "circle")
    return symbol.removesuffix("-open"), symbol.endswith("-open")


def _draw_scatter(ax: Axes, trace: Any, *, zorder: int) -> Line2D:
    mode = (trace.mode or "lines").split("+")
    symbol, unfilled = _symbol(trace)
    marker, line = trace.marker, trace.line
    colour = marker.color or line.color or CATEGORICAL[0]
    x, y = np.asarray(trace.x, dtype=np.float64), np.asarray(trace.y, dtype=np.float64)
    for name in ("error_x", "error_y"):
        bar = trace[name]
        if bar.array is not None:
            limits = np.array([bar.array if bar.arrayminus is None else bar.arrayminus, bar.array], dtype=np.float64)
            xerr, yerr = (limits, None) if name == "error_x" else (None, limits)
            ax.errorbar(
                x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor=bar.color, elinewidth=bar.thickness,
                capsize=bar.width, capthick=bar.thickness, zorder=zorder,
            )  # fmt: skip
    (drawn,) = ax.plot(
        x, y, color=line.color or colour, linewidth=line.width or 2, zorder=zorder,
        linestyle=DASHES[line.dash or "solid"] if "lines" in mode else "",
        marker=SYMBOLS[symbol] if "markers" in mode else "", markersize=marker.size or 6, alpha=marker.opacity,
        markerfacecolor="none" if unfilled else colour, markeredgecolor=marker.line.color or colour,
        markeredgewidth=marker.line.width or 0,
    )  # fmt: skip
    return drawn


def _draw_axes(ax: Axes, layout: Any, suffix: str) -> None:
    """Ranges, ticks, titles, grid: whatever the layout says about axes x<suffix> and y<suffix>."""
    from matplotlib.ticker import MaxNLocator

    x, y = layout[f"xaxis{suffix}"], layout[f"yaxis{suffix}"]
    ax.set_facecolor(layout.plot_bgcolor or "white")
    ax.set_axisbelow(True)
    ax.margins(0.06)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=FAINT, linewidth=1)
    ax.tick_params(labelsize=TICK_SIZE, labelcolor=INK, color=FAINT, length=4)
    parts: tuple[tuple[Any, Any, Callable[..., Any], Callable[..., Any], Callable[..., Any]], ...] = (
        (x, ax.xaxis, ax.set_xscale, ax.set_xlim, ax.set_xlabel),
        (y, ax.yaxis, ax.set_yscale, ax.set_ylim, ax.set_ylabel),
    )
    for spec, axis, set_scale, set_limits, set_label in parts:
        if spec.type == "log":
            set_scale("log")
        elif spec.nticks:
            axis.set_major_locator(MaxNLocator(spec.nticks))
        if spec.tickvals is not None:
            axis.set_ticks(list(spec.tickvals), labels=[_plain(text) for text in spec.ticktext])
            for label in axis.get_ticklabels():
                label.set_parse_math(False)
        if spec.range is not None:
            set_limits(*([10.0**end for end in spec.range] if spec.type == "log" else spec.range))
        if spec.showticklabels is False:
            axis.set_ticklabels([])
        if spec.showgrid is not False:
            axis.grid(True, color=GRID, linewidth=1)
        set_label(_plain(spec.title.text), fontsize=TEXT_SIZE, color=INK, labelpad=8)
