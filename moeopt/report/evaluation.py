"""How an evaluation is shown."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from rich.console import RenderableType

from moeopt.evaluation import Evaluation
from moeopt.report.formatting import DASH, number, percent
from moeopt.report.tables import table
from moeopt.showing import line
from moeopt.statistics import bootstrap


def view(evaluation: Evaluation) -> RenderableType:
    """Loss and accuracy with bootstrap intervals over the examples, the task's metrics, and what it took."""
    columns = [("", lambda row: row[0]), ("", lambda row: row[1]), ("95% interval", lambda row: row[2])]
    title = f"evaluation of {len(evaluation.losses):,} examples"
    return table(title, columns, _rows(evaluation))


def _rows(evaluation: Evaluation) -> Iterator[tuple[str, str, str]]:
    weights = evaluation.weights.astype(np.float64)
    for name, values, told in (("loss", evaluation.losses, number), ("accuracy", evaluation.correct, percent)):
        spread = bootstrap(values.astype(np.float64), weights)
        yield name, told(spread.mean), f"[{told(spread.low)}, {told(spread.high)}]"
    for name, value in evaluation.metrics.items():
        if value == evaluation.accuracy:  # said with its interval
            continue
        yield line(name, 40), number(value), DASH
    if not math.isnan(evaluation.active):
        yield "active experts", number(evaluation.active, 2), ""
    yield "tokens", f"{evaluation.tokens:,}", ""
    yield "layer-tokens", f"{evaluation.layer_tokens:,}", ""
    yield "seconds", number(evaluation.seconds, 2), ""
