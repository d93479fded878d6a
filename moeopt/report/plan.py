"""How a plan is shown: a picture of which experts remain, and a table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from moeopt.plan import LayerPlan, Plan
from moeopt.report.terminal.plans import plan_table

ALONE, LEADS, MIXED, GONE = "■◩▪·"
LEGEND = f"{ALONE} kept  {LEADS} kept, with others merged in  {MIXED} merged into another  {GONE} gone"
APART, TICK = 32, 8
"""Experts up to which their marks stand apart; and how many lie between two that are numbered."""


def view(plan: Plan | LayerPlan) -> RenderableType:
    """Layers down, experts across, and below it what `moeopt show` tells of the plan."""
    plan = Plan((plan,)) if isinstance(plan, LayerPlan) else plan
    return Group(*picture(plan), plan_table(plan))


def picture(plan: Plan) -> Iterator[Text]:
    """A line for each run of equal layers, a mark for each expert."""
    n, names, rows = max(layer.experts for layer in plan.layers), [], []
    for layer, run in groupby(enumerate(plan.layers), key=lambda item: item[1]):
        indices = [i for i, _ in run]
        names.append(f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0]))
        rows.append(marks(layer))
    gap, wide = " " * (n <= APART), max(6, *map(len, names))
    ruler = "".join(f"{i:<{TICK * (1 + len(gap))}}" for i in range(0, n, TICK))
    yield Text(f"{'layers':<{wide}}  {ruler}".rstrip(), style="bold", no_wrap=True)
    for name, row in zip(names, rows):
        yield Text(f"{name:<{wide}}  {gap.join(row)}", no_wrap=True)
    yield Text(LEGEND)


def marks(layer: LayerPlan) -> list[str]:
    """What becomes of each of a layer's n experts.

    >>> merged = np.float32([[0.7, 0.3, 0, 0], [0, 0, 1, 0]])
    >>> "".join(marks(LayerPlan(experts=4, k=1, w_em=merged, w_rm=merged > 0, router="prob")))
    '◩▪■·'
    """
    parts = np.abs(layer.expert_matrix)
    row = [MIXED if part else GONE for part in parts.sum(axis=0).tolist()]
    for leads, shares in zip(parts.argmax(axis=1), parts):
        row[leads] = LEADS if (shares > 0).sum() > 1 else ALONE
    return row
