"""Which experts run: the activation pattern, before and after pruning."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import FigureError
from moeopt.plan import Plan
from moeopt.report.figures import style
from moeopt.report.figures.style import Floats, shares


def activation_pattern(
    before: ArrayLike,
    after: ArrayLike | None = None,
    plan: Plan | None = None,
    *,
    title: str = "How often each expert is used",
) -> style.Figure:
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
    full = shares("before", before, what="(layers, n)")
    layers, n = full.shape
    panels = {"full model" if plan is None else "full model (○ kept by the plan)": full}
    if after is not None:
        panels["after pruning (× removed)"] = shares("after", after, what="(layers, n)", shape=full.shape)
    largest = max((float(np.nanmax(z)) for z in panels.values() if not np.isnan(z).all()), default=0.0)
    high = largest if largest > 1e-9 else 1.0
    ticks = _ticks(high)
    bar = {"thickness": 16, "tickvals": ticks, "ticktext": [f"{100 * tick:.6g}" for tick in ticks]}
    hover = [
        [
            [f"layer {i}, expert {j}: " + ("removed" if math.isnan(v) else f"{v:.2%} of tokens") for j, v in row]
            for i, row in enumerate(map(enumerate, z.tolist()))
        ]
        for z in panels.values()
    ]
    figure = style.empty(title)
    style.heat_maps(
        figure, panels, hover=hover, low=0.0, high=high, bar=bar, gap=1 if n * len(panels) <= 64 else 0,
        title="share of tokens routed to the expert (%)",
        y={"title": {"text": "layer"}, **style.numbered(layers, 20)},
    )  # fmt: skip
    size = float(np.clip(0.4 * min(0.8 * style.HEIGHT / layers, 0.85 * style.WIDTH / (n * len(panels))), 3, 9))
    for p, z in enumerate(panels.values()):
        style.cell_marks(figure, p, np.isnan(z), "x-thin", size)
    if plan is not None:
        style.cell_marks(figure, 0, _kept_mask(plan, full.shape, list(panels.values())[1:]), "circle", size)
    return figure


def _ticks(high: float) -> list[float]:
    """About five round numbers from 0 to `high`."""
    power = 10.0 ** math.floor(math.log10(high / 5))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if high / (m * power) <= 5.5)
    return [i * step for i in range(math.floor(high / step * (1 + 1e-9)) + 1)]


def _kept_mask(plan: Plan, shape: tuple[int, ...], after: list[Floats]) -> NDArray[np.bool_]:
    """(layers, n), True for experts that live on under the plan, alone or merged; `after` must agree, if there is."""
    layers, n = shape
    sizes = {layer.experts for layer in plan.layers}
    if len(plan.layers) != layers or sizes != {n}:
        got = f"{len(plan.layers)} layers of {' or '.join(map(str, sorted(sizes)))}"
        raise FigureError(f"plan must have {layers} layers of {n} experts, as before has; got {got}")
    mask = np.stack([(layer.expert_matrix != 0).any(axis=0) for layer in plan.layers])
    for after_shares in after:
        for i, (layer, there) in enumerate(zip(plan.layers, ~np.isnan(after_shares))):
            if layer.kept is not None and (there != mask[i]).any():
                raise FigureError(
                    f"after has numbers for experts {np.flatnonzero(there).tolist()} of layer {i}, but the plan keeps "
                    f"{sorted(layer.kept)}; the others must be NaN, in the full model's numbering"
                )
    return np.asarray(mask, dtype=np.bool_)
