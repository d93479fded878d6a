"""Studies that moeopt did not write, or not like that: made through Optuna and, for what it refuses, in SQL."""

from __future__ import annotations

import copy
import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna

import moeopt
from moeopt.plan import ModelShape
from moeopt.results.selection import SELECTION
from moeopt.study.storage import attributes, open_storage
from moeopt.trials import genome
from moeopt.trials.description import DESCRIPTION

optuna.logging.set_verbosity(optuna.logging.WARNING)

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b31m\r\x08\u202e"
NAMES = {
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "markup": "[red]x[/red][/][link=https://example.org]y[/link] :skull: [bold",
    "terminal": f"a{ESCAPES}b",
    "lines": "one\ntwo\r\nError: forged\n\n",
    "path": "../../../../etc/passwd",
    "absolute": "/etc/passwd",
    "long": "x" * 1_000_000,
    "quotes": "a'b\"c`d;$(touch owned)`touch owned`",
    "percent": "%s %(name)s {0} {name} \\u001b",
}
VALUES: list[Any] = [
    None, True, -1, 0, 3, 10**9, 10**30, 0.5, math.nan, math.inf, "", "text", NAMES["terminal"], [], [[]], [None], [-1],
    {}, {"a": 1}, [[0, 10**12]], "9" * 5000,
]  # fmt: skip
SHAPE = ModelShape(layers=2, experts=4, k=2)
SPACES = {
    "eep": lambda: moeopt.EEPSpace(SHAPE, keep=2),
    "prune": lambda: moeopt.PruneSpace(SHAPE, keep=2),
    "merge": lambda: moeopt.MergeSpace(SHAPE, around=moeopt.Plan.one_hot([[0, 1]] * 2, experts=4, k=2)),
    "active": lambda: moeopt.ActiveSpace(moeopt.PruneSpace(SHAPE, keep=2), k=(1, 2), skip=True),
    "active of a plan": lambda: moeopt.ActiveSpace(
        SHAPE, around=moeopt.Plan.one_hot([[0, 1, 3]] * 2, experts=4, k=2), k=(1, 2)
    ),
}


class Distance:
    """An objective without a model: how far a genotype is from another, with scores of three examples."""

    def __init__(self, space: Any) -> None:
        self.space = space

    def describe(self) -> dict[str, Any]:
        return {
            "model": {"name_or_path": "mixtral", "architecture": "M", "config_hash": "c" * 32, "weights": "w" * 32},
            "task": {
                "name": "toy", "kind": "text", "fingerprint": "f" * 64, "split": "search", "limit": 8,
                "max_length": None, "examples": {"search": 8, "dev": 4, "test": 4},
            },
            "space": self.space.describe(),
            "evaluation": {"rungs": [8], "report": "mean", "score": "likelihood"},
        }  # fmt: skip

    def __call__(self, trial: optuna.Trial) -> float:
        x = self.space.vector(trial)
        loss = float(np.abs(x - self.space.high).mean())
        scores = np.array([[loss] * 3, [1.0] * 3, [1.0, 0.0, 1.0]], dtype=np.float32)
        attrs = genome.pack(genome.SCORES, scores.reshape(-1))
        attrs[genome.SCORES] |= {"of": "me", "active": 2.0}
        facts = {"accuracy": 0.5, "seconds": 0.1, "tokens": 8, "layer_tokens": 16, "drift": 0.1, "operator": "prune"}
        attributes.write(trial.study, trial, attrs, facts | {"parents": [0]})
        return loss


RECORD = {
    "moeopt": "0.1.0", "metric": "accuracy",
    "settings": {"top": 2, "dev_limit": None, "test_limit": None, "score": "likelihood", "stock_only": False},
    "examples": {split: {"count": 4, "of": "me"} for split in ("search", "dev", "test")},
    "candidates": {"trial": [0, 1], "search_loss": [1.0, 2.0], "dev_loss": [1.0, None], "dev_accuracy": [0.5, None]},
    "winner": 0, "search_best": 0, "plans": {"winner": "a" * 32},
    "scores": {
        split: {name: {"loss": 1.0, "accuracy": 0.5, "active": 2.0} for name in ("full", "winner")}
        for split in ("search", "dev", "test")
    },
    "test_minus": {"full": {name: {"mean": 0.0, "low": -1.0, "high": 1.0} for name in ("loss", "accuracy")}},
    "gain": {"search": 0.0}, "verdict": "none", "sentences": ["No gain."], "warnings": [], "looks": 1,
}  # fmt: skip


FULL_MODEL = {
    "of": "me", "score": "likelihood", "loss": 1.0, "penalty": 0.0, "accuracy": 0.5, "metrics": {"accuracy": 0.5},
    "active": 2.0, "examples": 3, "chance": 0.5, "tokens": 8, "layer_tokens": 16, "seconds": 0.1,
    "warnings": ["the full model guesses"],
}  # fmt: skip


def honest(storage: Any = None, space: str = "eep", name: str = "s", trials: int = 4) -> optuna.Study:
    """A study as moeopt 0.1.0 writes it, in memory or a database, with a selection."""
    objective: Any = Distance(SPACES[space]())
    kind = "eep" if space != "active of a plan" else "random"
    options = {"initial": 2, "prune_until": 3} if kind == "eep" else {}
    sampler = moeopt.samplers.get(kind, objective.space, seed=0, **options)
    opened = open_storage(storage) if isinstance(storage, str) else storage
    study = optuna.create_study(study_name=name, storage=opened, sampler=sampler)
    description = {"version": "0.1.0", **objective.describe(), "sampler": sampler.settings()}
    study.set_user_attr(DESCRIPTION, description)
    study.optimize(objective, n_trials=trials)
    study.set_user_attr(SELECTION, RECORD)
    return study


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in nested lists and objects, the outermost first."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; `...` for none."""
    if not at:
        return new
    whole = copy.deepcopy(value)
    inner = whole
    for key in at[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return whole


def mutations(value: Any) -> Iterator[tuple[str, Any]]:
    """The value with nothing, or something else, at every place: of `VALUES` each third one, beginning with another."""
    for i, at in enumerate(paths(value)):
        for new in (*VALUES[i % 3 :: 3], *([...] if at else [])):
            yield f"{'.'.join(map(str, at))} = {str(new)[:40]!r}", replaced(value, at, new)


def execute(database: Path, statement: str, *values: Any) -> None:
    """One statement of SQL on an SQLite database."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(statement, values)


def set_study_attribute(database: Path, key: str, value: Any) -> None:
    text = value if isinstance(value, (str, bytes)) else json.dumps(value)
    execute(database, "UPDATE study_user_attributes SET value_json = ? WHERE key = ?", text, key)
