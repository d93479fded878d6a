"""Figures hold the arrays they were given, and their PNG shows them; what a PNG cannot hold is refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from moeopt.errors import MoeoptError
from moeopt.plan import LayerPlan, Plan
from moeopt.report import figures
from moeopt.report.figures import (
    FigureError,
    activation_pattern,
    ensemble_curve,
    kept_set_errors,
    methods_bar,
    write_html,
    write_png,
)

SETS = list(combinations(range(5), 2))
ON_DISK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pruned(layers: int, n: int, keep: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Plan]:
    """Shares before, shares after with NaN, and the plan that took the least used experts away."""
    rng = np.random.default_rng(seed)
    before = rng.dirichlet(np.ones(n), layers)
    kept = [sorted(np.argsort(-row)[:keep].tolist()) for row in before]
    after = np.full((layers, n), np.nan)
    for i, experts in enumerate(kept):
        after[i, experts] = rng.dirichlet(np.ones(keep))
    return before, after, Plan.one_hot(kept, experts=n, k=1)


def set_losses(layers: int, seed: int = 0) -> list[dict[tuple[int, ...], float]]:
    rng = np.random.default_rng(seed)
    return [{kept: float(rng.uniform(0.5, 2) * 10**i) for kept in SETS} for i in range(layers)]


def numbered_sets(array: np.ndarray) -> list[dict[tuple[int, ...], float]]:
    return [{(i,): error for i, error in enumerate(row)} for row in array.tolist()]


def method_rows(names: int = 3, keeps: tuple[int, ...] = (4, 2)) -> list[dict[str, Any]]:
    return [
        {"name": f"method {i}", "loss": x, "low": x - 0.1, "high": x + 0.2, "split": split, "keep": keep}
        for keep in keeps
        for i in range(names)
        for split, x in (("search", 3.0 + i / 10 - keep / 5), ("test", 2.5 + i / 10 - keep / 5))
    ]


def traces(figure: go.Figure, **attributes: Any) -> list[Any]:
    return [trace for trace in figure.data if all(trace[key] == value for key, value in attributes.items())]


def points(trace: Any) -> set[tuple[int, int]]:
    return set(zip(trace.x.tolist(), trace.y.tolist()))


FIGURES: dict[str, Callable[[], go.Figure]] = {
    "pattern": lambda: activation_pattern(*pruned(6, 8, 3)),
    "before only": lambda: activation_pattern(pruned(6, 8, 3)[0]),
    "curve": lambda: ensemble_curve({"all layers": ([3.0, 2.0], [[2.9, 3.1], [1.9, 2.2]]), "layer 0": [2.5, 2]}, 2.0),
    "sets": lambda: kept_set_errors(set_losses(3), [SETS[4]] * 3),
    "raw sets": lambda: kept_set_errors(set_losses(3), raw=True),
    "methods": lambda: methods_bar(method_rows(), reference={"test": 2.2}),
}


def test_heat_maps_hold_the_shares_and_leave_removed_experts_empty() -> None:
    before, after, plan = pruned(6, 8, 3)
    figure = activation_pattern(before, after, plan, title="use")
    left, right = traces(figure, type="heatmap")
    np.testing.assert_array_equal(left.z, before)
    np.testing.assert_array_equal(right.z, after)
    assert left.coloraxis == right.coloraxis == "coloraxis"
    assert figure.layout.coloraxis.cmin == 0
    assert figure.layout.coloraxis.cmax == np.nanmax([before, after])
    assert tuple(figure.layout.yaxis.range) == (5.5, -0.5)
    crosses, dots = traces(figure, type="scatter")
    assert points(crosses) == {(j, i) for i in range(6) for j in range(8) if np.isnan(after[i, j])}
    assert crosses.xaxis == right.xaxis == "x2"
    assert points(dots) == {(j, i) for i, layer in enumerate(plan.layers) for j in layer.kept or ()}
    assert dots.xaxis == "x"
    gone = next(iter(points(crosses)))
    assert right.hovertext[gone[1]][gone[0]] == f"layer {gone[1]}, expert {gone[0]}: removed"
    assert left.hovertext[5][7] == f"layer 5, expert 7: {before[5, 7]:.2%} of tokens"


def test_a_merged_layer_marks_every_expert_that_goes_into_it() -> None:
    w_em = np.zeros((1, 4), dtype=np.float32)
    w_em[0, [1, 3]] = 0.5
    plan = Plan((LayerPlan(4, 1, w_em=w_em, w_rm=w_em, router="prob"),))
    (dots,) = traces(activation_pattern([[0.25] * 4], [[np.nan, 1, np.nan, np.nan]], plan), name=None, xaxis="x")
    assert points(dots) == {(1, 0), (3, 0)}


def test_curves_hold_losses_intervals_and_the_full_model() -> None:
    values, interval = [3.0, np.nan, 2.0], [[2.5, 3.1], [np.nan, np.nan], [1.9, 2.2]]
    figure = ensemble_curve({"all layers": (values, interval), "layer 3": [2.5, 2.1, 2.0]}, 1.95)
    every, single, full = figure.data
    np.testing.assert_array_equal(every.y, values)
    np.testing.assert_allclose(np.array(every.y) - every.error_y.arrayminus, [2.5, np.nan, 1.9])
    np.testing.assert_allclose(np.array(every.y) + every.error_y.array, [3.1, np.nan, 2.2])
    np.testing.assert_array_equal(single.x, [1, 2, 3])
    assert single.error_y.array is None
    assert full.y.tolist() == [1.95, 1.95]
    assert full.line.dash == "dash"
    assert every.hovertext[2] == "all layers, 3 kept: 2.0000 [1.9000, 2.2000]"


@pytest.mark.parametrize(
    ("names", "top", "coloured"),
    [
        (["all layers", *(f"layer {i}" for i in range(30))], None, {"all layers"}),
        ([f"layer {i}" for i in range(31)], None, {"layer 0", "layer 15", "layer 30"}),
        ([f"layer {i}" for i in range(31)], ["layer 4"], {"layer 4"}),
        ([f"set {i}" for i in range(12)], None, {f"set {i}" for i in range(10)}),
    ],
)
def test_many_curves_stand_grey_behind_the_named_ones(names: list[str], top: Any, coloured: set[str]) -> None:
    figure = ensemble_curve({name: [2.0 + i, 1.0] for i, name in enumerate(names)}, top=top)
    assert [trace.mode for trace in figure.data] == ["lines"] * (len(names) - len(coloured)) + ["lines+markers"] * len(
        coloured
    )
    bright = traces(figure, mode="lines+markers")
    assert {trace.name for trace in bright} == coloured
    assert len({(trace.line.color, trace.line.dash) for trace in bright}) == len(coloured) <= 10
    assert sum(trace.showlegend is not False for trace in traces(figure, mode="lines")) == 1
    assert sorted(float(trace.y[0]) for trace in figure.data) == [2.0 + i for i in range(len(names))]


def test_kept_sets_are_drawn_over_their_median_with_best_and_chosen_marked() -> None:
    losses = set_losses(3)
    chosen = [SETS[4], None, tuple(reversed(SETS[0]))]
    cloud, best, picked = kept_set_errors(losses, chosen).data
    for i, layer in enumerate(losses):
        errors = sorted(layer.values())
        median = (errors[4] + errors[5]) / 2
        np.testing.assert_allclose(np.sort(cloud.y[np.abs(cloud.x - i) < 0.5]), [error / median for error in errors])
        least = min(layer, key=lambda kept: layer[kept])
        ratio = f"error {layer[least]:.4g}, {layer[least] / median:.3f} of the median"
        assert best.hovertext[i] == f"best: layer {i}, kept {least[0]} {least[1]}: {ratio}, rank 1 of 10"
        np.testing.assert_allclose(best.y[i], layer[least] / median)
        if chosen[i] is not None:
            kept = tuple(sorted(chosen[i] or ()))
            (mine,) = np.flatnonzero(picked.x == i)
            np.testing.assert_allclose(picked.y[mine], layer[kept] / median)
            assert picked.hovertext[mine].startswith(f"chosen: layer {i}, kept {kept[0]} {kept[1]}: ")
            assert picked.hovertext[mine].endswith(f"rank {errors.index(layer[kept]) + 1} of 10")
    assert picked.x.tolist() == [0, 2]
    assert {text.split(":")[0] for text in cloud.hovertext} == {
        f"layer {i}, kept {a} {b}" for i in range(3) for a, b in SETS
    }


def test_of_very_many_sets_ranks_are_drawn_with_best_and_worst() -> None:
    array = np.random.default_rng(0).uniform(1, 2, (2, 3000))
    cloud = kept_set_errors(numbered_sets(array), raw=True).data[0]
    for i, row in enumerate(array):
        drawn = cloud.y[np.abs(cloud.x - i) < 0.5]
        assert len(drawn) == figures.kept_sets.DRAWN_SETS
        assert set(drawn) <= set(row)
        assert (drawn.min(), drawn.max()) == (row.min(), row.max())
        np.testing.assert_allclose(np.median(drawn), np.median(row), atol=0.01)
    assert cloud.name == "400 of 3,000 sets"


def test_methods_stand_in_one_order_with_their_intervals_in_a_panel_for_each_keep() -> None:
    rows = method_rows(names=3, keeps=(2, 4))
    rows[1] |= {"low": None, "high": None}
    figure = methods_bar(reversed(rows), reference={"test": 2.2})
    assert [note.text for note in figure.layout.annotations] == ["4 experts kept", "2 experts kept"]
    assert list(figure.layout.yaxis.ticktext) == ["method 0", "method 1", "method 2"]
    drawn = {}
    for trace in traces(figure, mode="markers"):
        for x, y, above, below in zip(trace.x, trace.y, trace.error_x.array, trace.error_x.arrayminus):
            keep = {"x": 4, "x2": 2}[trace.xaxis]
            drawn[f"method {round(y)}", trace.name, keep] = (x, x - below, x + above)
    assert len(drawn) == len(rows)
    for row in rows:
        expected = [row["loss"], *(np.nan if row[end] is None else row[end] for end in ("low", "high"))]
        np.testing.assert_allclose(drawn[row["name"], row["split"], row["keep"]], expected)
    lines = traces(figure, mode="lines")
    assert [line.x.tolist() for line in lines] == [[2.2, 2.2]] * 2
    assert [line.showlegend for line in lines] == [True, False]
    assert sum(trace.showlegend for trace in traces(figure, mode="markers")) == 2


def test_loss_axes_say_loss_or_what_they_are_told() -> None:
    assert ensemble_curve({"a": [1.0]}).layout.yaxis.title.text == "loss"
    assert ensemble_curve({"a": [1.0]}, label="bits < 1").layout.yaxis.title.text == "bits &lt; 1"
    panels = methods_bar(method_rows(), label="test loss").layout
    assert panels.xaxis.title.text == panels.xaxis2.title.text == "test loss"
    assert methods_bar(method_rows()).layout.xaxis.title.text == "loss"


@pytest.mark.parametrize("name", FIGURES)
def test_png_has_the_asked_size_and_shows_something(name: str, tmp_path: Path) -> None:
    write_png(FIGURES[name](), tmp_path / "figure.png", width=801, height=433, scale=1.5)
    image = imread(tmp_path / "figure.png")
    assert image.shape[:2] == (round(433 * 1.5), round(801 * 1.5))
    ink = (image[:, :, :3] < 0.95).any(axis=2)
    assert ink.mean() > 0.01
    for border in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
        assert not border.any()
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def shade(image: np.ndarray, colour: str, within: int = 0) -> int:
    """Pixels of exactly that colour, or close to it."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(np.round(image[:, :, :3] * 255) - rgb) <= within).all(axis=2).sum())


def test_png_of_a_heat_map_tells_zero_from_removed(tmp_path: Path) -> None:
    areas = {}
    for name, value in (("zero", 0.0), ("removed", np.nan)):
        write_png(activation_pattern([[value, 1.0]]), tmp_path / "figure.png", width=600, height=400, scale=1)
        image = imread(tmp_path / "figure.png")
        areas[name] = [shade(image, colour) for colour in ("#440154", "#fde725", figures.style.GONE)]
    half = areas["zero"][1]
    assert half > 0.2 * 600 * 400
    assert areas["zero"][0] > 0.9 * half
    assert areas["removed"][0] < 0.05 * half
    assert areas["removed"][2] > 0.9 * half


def test_png_has_layers_down_and_experts_across(tmp_path: Path) -> None:
    shares = np.zeros((2, 3))
    shares[0, 2] = 1.0
    write_png(activation_pattern(shares), tmp_path / "figure.png", width=600, height=400, scale=1)
    panel = imread(tmp_path / "figure.png")[:, :480]
    rows, columns = np.nonzero((np.abs(panel[:, :, :3] - [253 / 255, 231 / 255, 37 / 255]) < 0.02).all(axis=2))
    assert len(rows) > 10_000
    assert rows.max() < 220
    assert columns.min() > 300


def test_png_shows_marks_lines_and_interval_bars_in_their_colours(tmp_path: Path) -> None:
    def image(figure: go.Figure) -> np.ndarray:
        write_png(figure, tmp_path / "figure.png", width=600, height=400, scale=1)
        return imread(tmp_path / "figure.png")

    def grey_lines(shown: np.ndarray) -> int:
        """Rows of pixels that are mostly of a middle grey."""
        middle = np.abs(shown[:, :, :3] - 0.55) < 0.15
        return int((middle.all(axis=2).sum(axis=1) > 100).sum())

    orange = []
    for low, high in ((1.9, 2.1), (1.0, 3.0)):
        curves = {"wide": ([2.0, 2.0], [[0.5, 3.5]] * 2), "all layers": ([2.0, 2.0], [[low, high]] * 2)}
        shown = image(ensemble_curve(curves, 1.23))
        orange.append(shade(shown, figures.style.CATEGORICAL[1], within=90))
        assert shade(shown, figures.style.CATEGORICAL[0]) > 100
        assert grey_lines(shown) > grey_lines(image(ensemble_curve(curves)))  # the axis is grey, too
    assert orange[0] > 100
    assert orange[1] > orange[0] + 50


SIZES = {"32x8": (32, 8), "4x8": (4, 8), "32x64": (32, 64), "61x256": (61, 256), "1x2": (1, 2)}
CROWDED: dict[str, Callable[[], go.Figure]] = {
    **{name: partial(activation_pattern, *pruned(*size, size[1] // 2)) for name, size in SIZES.items()},
    "sets": lambda: kept_set_errors(set_losses(32)),
    "curve": lambda: ensemble_curve({"all layers": np.linspace(9, 2, 64), "layer 1 " * 9: np.ones(64)}),
    "methods": lambda: methods_bar(method_rows(16, (7, 6, 5, 4, 3, 2))),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CROWDED)
def test_no_two_labels_of_an_axis_overlap(name: str) -> None:
    canvas = figures.png.redrawn(CROWDED[name](), figures.style.WIDTH, figures.style.HEIGHT, 1.0)
    canvas.draw()
    page = canvas.figure.bbox
    for ax in canvas.figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [
                tick for tick in axis.get_major_ticks() if tick.label1.get_text() and low <= tick.get_loc() <= high
            ]
            boxes = [tick.label1.get_window_extent() for tick in ticks if tick.label1.get_visible()]
            for a, b in combinations(boxes, 2):
                assert not a.overlaps(b), (a, b)
            for box in boxes:
                assert page.x0 <= box.x0 < box.x1 <= page.x1
                assert page.y0 <= box.y0 < box.y1 <= page.y1
        if ax.get_label() != "<colorbar>":
            assert ax.bbox.width > 0.1 * page.width
            assert ax.bbox.height > 0.7 * page.height


@pytest.mark.parametrize("name", FIGURES)
def test_html_needs_no_network(name: str, tmp_path: Path) -> None:
    figure = FIGURES[name]()
    before = figure.to_json()
    write_html(figure, tmp_path / "figure.html")
    assert figure.to_json() == before
    page = (tmp_path / "figure.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert len(page) > 1_000_000
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)
    assert tags
    assert not [tag for tag in tags if re.search(r"\b(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//", tag)]
    assert [path.name for path in tmp_path.iterdir()] == ["figure.html"]


def test_names_are_text_and_neither_tags_nor_formulas(tmp_path: Path) -> None:
    name, title = "<b>50%</b> & $x_{$", "a title of $\\alpha$ </script> that is " + "long " * 40
    figure = ensemble_curve({name: [2.0, 1.0]}, title=title)
    assert figure.data[0].name == "&lt;b&gt;50%&lt;/b&gt; &amp; $x_{$"
    canvas = figures.png.redrawn(figure, 800, 500, 1.0)
    (legend,) = canvas.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [name]
    assert canvas.figure.get_suptitle().replace("\n", " ") == title.strip()
    write_png(figure, tmp_path / "figure.png")
    write_html(figure, tmp_path / "figure.html")
    assert "</script> that" not in (tmp_path / "figure.html").read_text(encoding="utf-8")


def bare(*data: Any, **layout: Any) -> go.Figure:
    return go.Figure(list(data), layout=layout)


ONE_POINT = go.Scatter(x=[1], y=[1])


@pytest.mark.parametrize(
    ("figure", "size", "message"),
    [
        (bare(), {}, "no traces"),
        (bare(go.Pie(values=[1, 2])), {}, "trace 0 is of type 'pie'"),
        (bare(ONE_POINT, go.Bar(y=[1, 2])), {}, "trace 1 is of type 'bar'"),
        (bare(go.Scatter(x=[1], y=[1], mode="markers+text")), {}, "mode 'text'"),
        (bare(go.Scatter(x=[1], y=[1], fill="tozeroy")), {}, "fill 'tozeroy'"),
        (bare(go.Scatter(x=[1], y=[1], marker={"symbol": "hourglass"})), {}, "marker.symbol 'hourglass'"),
        (bare(go.Scatter(x=["a"], y=[1])), {}, "needs numbers as x"),
        (bare(go.Scatter(x=[1], y=[1], yaxis="y2")), {}, "a pair of axes of its own"),
        (bare(go.Heatmap(x=[0], y=[0], z=[[1]])), {}, "coloraxis"),
        (bare(ONE_POINT, shapes=[{"type": "rect", "x0": 0, "x1": 1, "y0": 0, "y1": 1}]), {}, "'rect' shape"),
        (bare(ONE_POINT, annotations=[{"text": "here", "x": 1, "y": 1}]), {}, "annotation 'here'"),
        ("figure", {}, "a plotly figure is needed, got str"),
        (bare(ONE_POINT), {"width": 0}, "width must be"),
        (bare(ONE_POINT), {"width": True}, "width must be"),
        (bare(ONE_POINT), {"height": 1.5}, "height must be"),
        (bare(ONE_POINT), {"scale": 0}, "scale must be"),
    ],
)
def test_png_refuses_by_name_what_it_cannot_hold(
    figure: Any, size: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "figure.png").write_bytes(b"before")
    with pytest.raises(FigureError, match=message):
        write_png(figure, tmp_path / "figure.png", **size)
    assert (tmp_path / "figure.png").read_bytes() == b"before"


@pytest.mark.parametrize("write", [write_png, write_html])
def test_a_folder_that_is_not_there_is_named(write: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(FigureError, match=r"no folder .*missing"):
        write(FIGURES["curve"](), tmp_path / "missing" / "figure")
    with pytest.raises(FigureError, match="is a folder"):
        write(FIGURES["curve"](), tmp_path)


@pytest.mark.parametrize(
    ("module", "draw"),
    [
        ("plotly.graph_objects", lambda figure, path: ensemble_curve({"a": [1.0]})),
        ("matplotlib.figure", lambda figure, path: write_png(figure, path)),
    ],
)
def test_a_missing_package_comes_with_the_command_that_installs_it(
    module: str, draw: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figure = FIGURES["curve"]()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MoeoptError, match=r"needs \w+: pip install 'moeopt\[figures\]'"):
        draw(figure, tmp_path / "figure.png")


def test_neither_import_nor_png_touches_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys, moeopt.report.figures as f; early = [m for m in ('plotly', 'matplotlib') if m in sys.modules];"
        f"f.write_png(f.activation_pattern([[0.5, 0.5]]), {str(tmp_path / 'figure.png')!r});"
        "print(early, 'matplotlib.pyplot' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[] False\n"


@pytest.mark.slow
@ON_DISK
@given(layers=st.integers(1, 70), n=st.integers(1, 130), data=st.data())
def test_patterns_of_any_size_are_drawn(tmp_path: Path, layers: int, n: int, data: st.DataObject) -> None:
    keep, seed = data.draw(st.integers(1, n)), data.draw(st.integers(0, 99))
    before, after, plan = pruned(layers, n, keep, seed)
    before *= data.draw(st.sampled_from([1.0, 0.0, 5e-324, 1e-7]))
    figure = activation_pattern(before, after, plan)
    np.testing.assert_array_equal(figure.data[1].z, after)
    width, height, scale = data.draw(st.tuples(st.integers(300, 900), st.integers(250, 600), st.floats(0.5, 2)))
    write_png(figure, tmp_path / "figure.png", width=width, height=height, scale=scale)
    assert imread(tmp_path / "figure.png").shape[:2] == (round(height * scale), round(width * scale))


@pytest.mark.filterwarnings("ignore:Glyph")
@ON_DISK
@given(
    length=st.integers(1, 9),
    curves=st.dictionaries(
        st.text(max_size=50),
        st.lists(st.floats(-9, 9) | st.just(np.nan), min_size=9, max_size=9),
        min_size=1,
        max_size=14,
    ),
)
def test_curves_of_any_name_and_number_are_drawn(tmp_path: Path, length: int, curves: dict[str, Any]) -> None:
    figure = ensemble_curve({name: values[:length] for name, values in curves.items()})
    drawn = sorted(str(trace.y.tolist()) for trace in figure.data)
    assert drawn == sorted(str([float(v) for v in values[:length]]) for values in curves.values())
    write_png(figure, tmp_path / "figure.png", scale=0.5)


def search_figures() -> dict[str, go.Figure]:
    """Figures of a search, as large as studies get, with names that would break a page."""
    rng = np.random.default_rng(0)
    cost, losses = np.cumsum(rng.integers(1, 9, 2000)), 1 + rng.random(2000)
    names, nasty = [f"L{i:02}" for i in range(32)], "<b>bold</b>"
    w = [rng.standard_normal((4, 8)) for _ in names]
    return {
        "progress": figures.search_progress(
            cost, losses, rng.random(2000) < 0.3, others={nasty: ([1, 5], [2.0, 1.5])},
            gains={"search": 0.2, "dev": 0.1, "test": 0.05}, test_interval=(-0.1, 0.2),
        ),
        "importance": figures.layer_importance(
            names, rng.random(32), rng.random(32) / 9, explained=0.5, trials=90
        ),
        "experts": figures.kept_experts(names, rng.random((32, 8)), rng.random((32, 8)) < 0.5, trials=5),
        "matrices": figures.plan_matrices(names, w, w),
        "lineage": figures.lineage([1, 5], [2.0, 1.0], ["", nasty], {nasty: [0.1, -0.2]}, inherited=True),
    }  # fmt: skip


def test_figures_of_a_search_are_small_and_their_names_are_no_markup() -> None:
    for name, figure in search_figures().items():
        text = figures.style.compact(figure).to_json()
        assert len(text) < 40_000, name
        assert "bdata" not in text, name
        assert "<b>bold" not in text.replace("\\u003c", "<").replace("\\u003e", ">"), name


def test_a_search_is_drawn_with_its_best_and_what_lies_above_is_counted() -> None:
    figure = figures.search_progress([1, 2, 3, 4], [3.0, np.nan, 1.0, 90.0], [False, False, False, False])
    named = {trace.name: trace for trace in figure.data}
    assert list(zip(named["best so far"].x, named["best so far"].y)) == [(1, 3), (3, 1), (4, 1)]
    assert "3 trials, 1 of them above the axis" in figure.layout.title.text
    estimated = figures.search_progress([1, 2], [3.0, 1.0], [False, True])
    assert list({trace.name: trace for trace in estimated.data}["best so far"].y) == [3, 3]
    assert "No trial has a loss" in figures.search_progress([1.0], [np.nan]).layout.annotations[0].text


def test_large_matrices_are_summed() -> None:
    w = np.ones((16, 64))
    figure = figures.plan_matrices([f"L{i}" for i in range(8)], [w] * 8, [w] * 8)
    assert np.shape(figure.data[0].z) == (8, 64)
    assert figure.data[0].z[0][0] == 16
    assert "columns summed" in figure.layout.title.text


def a_method(**change: Any) -> list[dict[str, Any]]:
    first, *others = method_rows()
    return [first | change, *others]


@pytest.mark.parametrize(
    ("draw", "arguments", "keywords", "message"),
    [
        (activation_pattern, ([0.5, 0.5],), {}, r"before must have shape \(layers, n\), got \(2,\)"),
        (activation_pattern, ([[0.5, 12]],), {}, "between 0 and 1, got 12; divide counts"),
        (activation_pattern, ([[0.5, np.inf]],), {}, "before must not hold infinite"),
        (activation_pattern, ([["a", 1]],), {}, "before must be an array"),
        (activation_pattern, ([[0.5, 0.5]], [[0.5]]), {}, r"after must have shape .*\(1, 2\), got \(1, 1\)"),
        (activation_pattern, ([[0.5, 0.5]], None, Plan.identity(2, 2, 1)), {}, "1 layers of 2 .*got 2 layers of 2"),
        (
            activation_pattern, ([[0.5, 0.5]], [[1, 0]], Plan.one_hot([[0]], experts=2, k=1)), {},
            r"experts \[0, 1\] of layer 0, .*keeps \[0\]",
        ),
        (ensemble_curve, ({},), {}, "at least one curve"),
        (ensemble_curve, ({"a": [1, 2], "b": [1]},), {}, r"lengths \{'a': 2, 'b': 1\}"),
        (ensemble_curve, ({"a": [[1, 2]]},), {}, r"curve 'a' must have shape \(n,\), got \(1, 2\)"),
        (ensemble_curve, ({"a": ([1, 2], [[0, 2]])},), {}, r"intervals of 'a' .*\(2, 2\), got \(1, 2\)"),
        (ensemble_curve, ({"a": ([1.0], [[2.0, 3.0]])},), {}, r"\[2.0, 3.0\] does not hold its loss 1.0"),
        (ensemble_curve, ({"a": [1]},), {"top": ["b"]}, r"not there: \['b'\]"),
        (ensemble_curve, ({"a": [1]},), {"top": "a"}, "got the string 'a'"),
        (ensemble_curve, ({"a": [1]},), {"reference": np.nan}, "reference must be a finite number"),
        (kept_set_errors, ([{(0, 1): 1.0, (1, 0): 2.0}],), {}, "layer 0 has the same set of experts twice"),
        (kept_set_errors, ([{(0, 1): np.nan}],), {}, "losses of layer 0 must be finite"),
        (kept_set_errors, ([{(0, 1): 0.0}],), {}, "layer 0: its median error, 0, must be above 0"),
        (kept_set_errors, ([{(0, 1): 1.0}], [(0, 2)]), {}, "layer 0: the chosen kept 0 2 is not among its 1 sets"),
        (kept_set_errors, ([{(0, 1): 1.0}], []), {}, "each of the 1 layers of losses, got 0"),
        (kept_set_errors, ([{(0, 1): 1.0}], [("a",)]), {}, "chosen, layer 0: a set must be experts kept"),
        (kept_set_errors, ([{}],), {}, r"losses of layer 0 must have shape \(sets,\)"),
        (kept_set_errors, ([[1.0, 2.0]],), {}, "losses of layer 0 must be a dictionary"),
        (methods_bar, (a_method(loss=np.nan),), {}, r"row 0 \(method 0\): loss must be a finite number, got nan"),
        (methods_bar, (a_method(keep=2.5),), {}, "keep must be an integer of at least 1, got 2.5"),
        (methods_bar, (a_method(low=None),), {}, "low and high must both be"),
        (methods_bar, (a_method(low=9.0),), {}, "does not hold its loss"),
        (methods_bar, (a_method(name="method 1"),), {}, r"two rows .*'method 1', 'search', 4"),
        (methods_bar, ([{"name": "a", "loss": 1.0, "keep": 4}],), {}, "row 0 has no low, high, split"),
        (methods_bar, ([],), {}, "at least one row"),
        (methods_bar, (method_rows(),), {"reference": {"tets": 1.0}}, r"\['tets'\]; the rows have"),
        (figures.search_progress, ([2, 1], [1.0, 1.0]), {}, "cost must not decrease"),
        (figures.search_progress, ([1, 2], [1.0]), {}, r"losses must have shape .*\(2,\)"),
        (figures.search_progress, ([1, 2], [1.0, 2.0], [True]), {}, r"pruned must have shape \(2,\), got \(1,\)"),
        (figures.plan_matrices, (["a"], [], []), {}, "of one length above 0, got 1, 0, 0"),
        (figures.plan_matrices, (["a"], [np.ones((1, 2))], [np.ones((2, 2))]), {}, r"w_rm of a must have shape"),
        (figures.kept_experts, (["a"], [[1.5]], [[True]]), {"trials": 1}, "between 0 and 1"),
        (figures.kept_experts, (["a", "b"], [[0.5]], [[True]]), {"trials": 1}, "must fit, got 2 names"),
        (figures.layer_importance, (["a"], [0.1, 0.2], [0.1]), {"explained": 0.5, "trials": 9}, "shares must have"),
        (figures.lineage, ([1], [1.0], [], {}), {"inherited": True}, "one for each of 1 ancestors, got 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    draw: Callable[..., go.Figure], arguments: tuple[Any, ...], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(FigureError, match=message):
        draw(*arguments, **keywords)
