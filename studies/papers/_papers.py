"""What the scripts of this folder share: the model, tasks by name, one comparison a table, and how tables are shown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import moeopt
from moeopt.defaults import Score
from moeopt.report import tables
from moeopt.results.method_comparison import MethodComparison, Row, compare
from moeopt.samplers.eep import scaled
from moeopt.tasks import Task

DEMO = "demo:"
"""Before the name of a skill of the demo model: a task of it."""
BASELINES = ("frequency", "soft_activation", "naee")
"""One-shot methods of EEP's Table 1."""
SPLIT = (0.4, 0.0, 0.6)
"""Search and test where the data has no splits: the papers choose nothing on a third one."""


@dataclass(frozen=True)
class Line:
    """A line of a table: on what, what, and what the full model gave there."""

    where: str
    name: str
    row: Row
    full: Row


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a run of seconds that shows the plumbing, not a result")
    parser.add_argument("--model", default=str(moeopt.demo.MODEL), help="folder or hub name; default: the demo model")
    parser.add_argument("--dtype", default="auto", help="of the weights, such as bfloat16")
    parser.add_argument("--device-map", help='"auto" spreads the model over devices')
    parser.add_argument("--limit", type=int, default=48, help="search examples (windows, for text)")
    parser.add_argument("--test-limit", type=int, default=128, help="test examples")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder; started again, a script goes on there")
    return parser


def add_search(parser: argparse.ArgumentParser) -> None:
    """What `searched` reads besides."""
    parser.add_argument("--groups", type=int, default=4, help="of layers that share their matrices")
    parser.add_argument("--trials", type=int, default=400, help="of each search")
    parser.add_argument("--draws", type=int, default=3, help="random prunings")


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return moeopt.load(args.model, dtype=args.dtype, device_map=args.device_map)


def open_task(named: str, **options: Any) -> Task:
    """The task of a NAME, from the hub, or of a NAME=PATH."""
    name, _, path = named.partition("=")
    if name.startswith(DEMO):
        return moeopt.demo.skill_task(name.removeprefix(DEMO))
    return moeopt.tasks.get(name, data=path or None, **{"fractions": SPLIT, **options})


def label(named: str) -> str:
    """What a NAME or NAME=PATH is called in tables and files.

    >>> label("arc_easy=data/arc/"), label("multiple_choice=data/piqa.jsonl"), label("demo:caesar")
    ('arc_easy', 'piqa', 'caesar')
    """
    name, _, path = named.removeprefix(DEMO).partition("=")
    return Path(path).stem if name in ("multiple_choice", "text", "generation") and path else name


def score_of(task: Task) -> Score:
    """What the losses of a table are: of choices, where there are any."""
    return "choice" if task.chooses else "likelihood"


def search(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, keep: int, args: argparse.Namespace,
    folder: Path,
) -> optuna.Study:  # fmt: skip
    """EEP's search in the published proportions of random, pruned and merged solutions, kept beside the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    space = moeopt.EEPSpace.of(model, keep=keep, groups=args.groups, router="prob")
    objective = moeopt.Objective(model, tokenizer, task, space, limit=args.limit, score=score_of(task))
    study = moeopt.create_study(
        f"{folder.name} to {keep}",
        objective=objective,
        storage=f"sqlite:///{folder.parent / 'studies.db'}",
        sampler="eep",
        load_if_exists=True,
        **scaled(args.trials),
    )
    moeopt.optimize(study, objective, n_trials=args.trials)
    return study


def searched(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, keep: int, args: argparse.Namespace,
    folder: Path,
) -> MethodComparison:  # fmt: skip
    """EEP's search among the baselines of its Table 1."""
    return compare(
        model, tokenizer, task, keep=[keep], methods=BASELINES, draws=args.draws, limit=args.limit,
        test_limit=args.test_limit, study=search(model, tokenizer, task, keep, args, folder), score=score_of(task),
        out=folder,
    )  # fmt: skip


def table_1(where: str, comparison: MethodComparison) -> list[Line]:
    """The lines of EEP's Table 1: where no merge was better, the search's pruning stands for both of its lines."""
    rows = {("random, mean" if row.kind == "random" else row.name): row for row in comparison.rows}
    rows["EEP, prune + merge"] = rows["search"]
    rows["EEP, prune only"] = rows.get("search, pruning only", rows["search"])
    shown = ("random, mean", *BASELINES, "EEP, prune only", "EEP, prune + merge")
    lines = {"full model": comparison.full} | {name: rows[name] for name in shown if name in rows}
    return [Line(where, name, row, comparison.full) for name, row in lines.items()]


def show(lines: Sequence[Line], out: Path, *, title: str, extra: tables.Columns = ()) -> None:
    """Print lines, accuracy and loss on test with intervals of the difference from the full model; write both forms."""

    def change(line: Line, of: Literal["loss", "accuracy"]) -> str:
        if not line.row.evaluations or line.row is line.full:
            return ""
        return str(moeopt.paired_bootstrap(line.row.evaluations["test"], line.full.evaluations["test"], of=of))

    columns: list[Any] = [
        ("plan", lambda line: line.name),
        ("accuracy", lambda line: f"{line.row.accuracy['test']:.3f}"),
        ("accuracy - full [95%]", lambda line: change(line, "accuracy")),
        ("loss", lambda line: f"{line.row.loss['test']:.4f}"),
        ("loss - full [95%]", lambda line: change(line, "loss")),
        *extra,
    ]
    shown = [("on", lambda line: line.where), *columns]
    Console(width=150).print(tables.table(title, shown, lines, text=("plan",), section=lambda line: line.where))
    records = [{head: cell(line) for head, cell in shown} for line in lines]
    files = {out / "table.csv": tables.csv_of(records), out / "table.json": tables.json_text(records) + "\n"}
    tables.write(files, moeopt.MoeoptError, folder=out)
