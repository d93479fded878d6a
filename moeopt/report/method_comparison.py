"""How a comparison of methods is shown and written: a table for each keep, what differs in words, files, a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeopt.evaluation import Interval
from moeopt.evaluation.teacher import LABEL_FREE
from moeopt.report import tables
from moeopt.report.formatting import number, percent, short
from moeopt.report.tables import csv_of, json_text, write
from moeopt.results.method_comparison.checks import ComparisonError
from moeopt.results.method_comparison.comparison import MethodComparison, Row
from moeopt.results.method_comparison.folder import PLANS

FORMAT, VERSION = "moeopt-comparison-table", 1


def view(comparison: MethodComparison) -> RenderableType:
    """All tables, each with its sentences, and once what the numbers are."""
    parts: list[RenderableType] = []
    for keep in comparison.keeps:
        parts += [table(comparison, keep), *map(Text, sentences(comparison, keep)), Text()]
    return Group(*parts, Text(notes(comparison), style="dim"))


def table(comparison: MethodComparison, keep: int) -> Table:
    """The rows of one keep, the full model on top, a section for each k; the best one-shot method is bold."""
    c = comparison
    pruned = [row for row in c.rows if row.keep == keep and row.kind != "full"]
    ks = list(dict.fromkeys(row.k for row in pruned))
    full = [row for row in c.rows if row.kind == "full"]
    rows = [*full, *sorted(pruned, key=lambda row: ks.index(row.k))]
    several = len({row.k for row in rows}) > 1
    spread = [row for row in rows if row.kind == "random" and max(row.drawn.values()) > 1]
    lines = [(row, sd) for row in rows for sd in ((False, True) if row in spread else (False,))]
    return tables.table(
        _title(c, pruned[0], ks),
        _columns(c, several=several),
        lines,
        section=lambda line: 0 if line[0].kind == "full" else line[0].k,
        style=lambda line: "bold" if c.best_one_shot(line[0].keep, line[0].k) is line[0] else "",
        padding=(0, 0),
    )


def _columns(c: MethodComparison, *, several: bool) -> Iterator[tuple[str, Callable[[tuple[Row, bool]], str]]]:
    """Heads of the columns, and the cells that they make of a row, or of the standard deviation of one."""

    def name(row: Row) -> str:
        return f" {row.variant}" if row.variant else row.name

    def against_best(row: Row) -> str:
        best = c.best_one_shot(row.keep, row.k)
        if best is not None and best.plan == row.plan:
            return "best" if best is row else "same plan"
        return "" if row.against_best is None else str(row.against_best)

    def loss_on(split: str) -> Callable[[tuple[Row, bool]], str]:
        return lambda line: number((line[0].loss_sd if line[1] else line[0].loss).get(split))

    def of_row(cell: Callable[[Row], str]) -> Callable[[tuple[Row, bool]], str]:
        return lambda line: "" if line[1] else cell(line[0])

    last = _last(c)
    yield "", lambda line: "  standard deviation" if line[1] else name(line[0])
    if several:
        yield "k", of_row(lambda row: str(row.k))
    yield from ((f"{split}\nloss", loss_on(split)) for split in c.splits)
    yield (
        f"{last}\n{'agree' if c.score in LABEL_FREE else 'acc.'}",
        lambda line: percent((line[0].accuracy_sd if line[1] else line[0].accuracy).get(last)),
    )
    if "test" in c.splits:
        full = "test − full\n[95% interval]"
        yield full, of_row(lambda row: "" if row.against_full is None else str(row.against_full))
        yield f"test − best one-shot\n(on {c.chosen_on}) [95%]", of_row(against_best)
    yield "active", of_row(lambda row: f"{row.active:.2f}")
    yield "layer-\ntokens", of_row(lambda row: short(row.layer_tokens) if row.layer_tokens else "")


def sentences(comparison: MethodComparison, keep: int) -> list[str]:
    """For each k, whether the search, or else the best random pruning, differs from the best one-shot method."""
    c, said = comparison, []
    ks = dict.fromkeys(row.k for row in c.rows if row.keep == keep and row.kind != "full")
    for k in ks:
        plain = [row for row in c.rows if (row.keep, row.k) == (keep, k) and row.variant is None]
        search = next((row for row in plain if row.kind == "search"), None)
        random = next((row for row in plain if row.kind == "best random"), None)
        best = c.best_one_shot(keep, k)
        where = f"Keep {keep}, k {k}: " if len(ks) > 1 else f"Keep {keep}: "
        if "test" not in c.splits:
            said.append(f"{where}the task has no test split, so nothing is said about unseen examples.")
        elif search is not None and best is None:
            said.append(f"{where}no one-shot method of this k to hold the search against.")
        elif best is not None:
            one_shot = f"the best one-shot method ({best.name})"
            if search is not None and search.against_best is not None:
                said.append(where + _verdict(search.name, one_shot, search.against_best))
            elif random is not None and random.against_best is not None:
                said.append(where + _verdict(one_shot, f"the {random.name} prunings", -random.against_best))
    return said


def _verdict(a: str, b: str, change: Interval) -> str:
    if change.judged == "no difference":
        return f"no difference on test between {a} and {b}: {change}."
    says, by = ("is worse than", change) if change.judged == "worse" else ("beats", -change)
    return f"{a} {says} {b} on test by {by.mean:.4f} [{by.low:.4f}, {by.high:.4f}]."


def notes(comparison: MethodComparison) -> str:
    """What the numbers of the tables are."""
    c = comparison
    sizes = ", ".join(f"{split} {s.examples:,} examples ({s.tokens:,} tokens)" for split, s in c.splits.items())
    lines = [f"{c.task['name']}: {sizes}." + ("" if c.score == "likelihood" else f" Loss: {c.score}.")]
    if c.calibrated is not None:
        seen = c.calibrated
        source = "the task's own search split" if seen.task_specific else f"another task, {seen.task}"
        lines.append(
            f"One-shot methods looked at {seen.sequences:,} sequences ({seen.tokens:,} tokens) of {source}; the best "
            f"of them was chosen on {c.chosen_on}" + (", never on test." if "test" in c.splits else ".")
        )
    held_out = [split for split in c.splits if split != "search"]
    if c.draws and held_out:
        some = f"the first {c.test_draws} of them on {' and '.join(held_out)}; " if c.test_draws else ""
        lines.append(f"Random prunings: {c.draws} on search, {some}the best of them by search loss.")
    if "test" in c.splits:
        lines.append(
            "Intervals: difference of test loss, 95%, paired bootstrap over examples; wholly below 0 is better. "
            "Many are shown: of twenty that are truly 0, one misses 0 by chance."
        )
    lines.append(
        "layer-tokens: what finding a plan cost, tokens times decoder layers; of a search, all its trials. "
        "active: experts per token and MoE layer, measured. "
        "parameters: those of an ordinary checkpoint with so many experts."
    )
    return "\n".join([*lines, *(f"Left out: {reason}" for reason in c.left_out)])


def _title(c: MethodComparison, row: Row, ks: list[int]) -> str:
    active = f", {ks[0]} active" if len(ks) == 1 else ""
    return (
        f"Keep {row.keep} of {c.shape.experts} experts{active}: {short(row.parameters)} parameters, "
        f"{row.gib:.3g} GiB (full model: {short(c.full.parameters)}, {c.full.gib:.3g} GiB)"
    )


def _last(c: MethodComparison) -> str:
    return list(c.splits)[-1]


def save(comparison: MethodComparison, folder: Path) -> None:
    """Write table.csv, table.json and plans/, and where plotly and matplotlib are installed the figures.

    Raises:
        ComparisonError: when something cannot be written.
    """
    try:
        (folder / PLANS).mkdir(parents=True, exist_ok=True)
        for row in comparison.rows:
            if row.plan is None or row.file is None:
                continue
            if not (row.refitted and (folder / PLANS / row.file).is_file()):  # what is there says what was fitted
                row.plan.save(folder / PLANS / row.file)
        _draw(comparison, folder)
    except OSError as error:
        raise ComparisonError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from None
    whole = record(comparison)
    table_csv = csv_of(whole["rows"], lifted=("scores",))
    write({folder / "table.csv": table_csv, folder / "table.json": json_text(whole) + "\n"}, ComparisonError)


def record(comparison: MethodComparison) -> dict[str, Any]:
    """Everything as JSON: no path, no time, so that the same comparison gives the same bytes."""
    c, seen = comparison, comparison.calibrated
    pairs = dict.fromkeys((row.keep, row.k) for row in c.rows if row.kind == "method")
    best = [(keep, k, c.best_one_shot(keep, k)) for keep, k in pairs]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": {key: value for key, value in c.model.items() if key != "name_or_path"}
        | {"shape": c.shape.describe()},
        "task": dict(c.task),
        "score": c.score,
        "splits": {split: vars(size) for split, size in c.splits.items()},
        "calibration": seen
        and {"task": seen.task, "own": seen.task_specific, "sequences": seen.sequences, "tokens": seen.tokens},
        "random": {"draws": c.draws, "test_draws": c.test_draws, "seed": c.seed},
        "interval": "test loss minus another's, 95% percentile interval of a paired bootstrap over examples",
        "best_one_shot": {
            "chosen_on": c.chosen_on,
            "methods": [{"keep": keep, "k": k, "name": row.name} for keep, k, row in best if row is not None],
        },
        "sentences": {str(keep): sentences(c, keep) for keep in c.keeps},
        "left_out": list(c.left_out),
        "rows": [_row(c, row) for row in c.rows],
    }


def _row(comparison: MethodComparison, row: Row) -> dict[str, Any]:
    spread = {"loss_sd": row.loss_sd, "accuracy_sd": row.accuracy_sd, "prunings": row.drawn} if row.drawn else {}
    numbers = {"loss": row.loss, "accuracy": row.accuracy, **spread}
    return {
        "keep": row.keep,
        "k": row.k,
        "name": row.name,
        "kind": row.kind,
        "scores": {split: {name: by_split[split] for name, by_split in numbers.items()} for split in row.loss},
        "parameters": row.parameters,
        "gib": row.gib,
        "active": row.active,
        "layer_tokens": row.layer_tokens,
        "test_minus_full": row.against_full and asdict(row.against_full),
        "test_minus_best_one_shot": row.against_best and asdict(row.against_best),
        "best_one_shot": comparison.best_one_shot(row.keep, row.k) is row,
        "plan": row.plan and row.plan.fingerprint,
        "file": row.file and f"{PLANS}/{row.file}",
    }


def _draw(comparison: MethodComparison, folder: Path) -> None:
    """methods.html where plotly is installed, methods.png where matplotlib is, too."""
    if find_spec("plotly") is None:
        return
    from moeopt.report.figures import methods_bar, write_html, write_png

    split, full = _last(comparison), comparison.full
    drawn = [row for row in comparison.rows if row.kind != "full" and split in row.loss]
    several = len({row.k for row in drawn}) > 1
    bars = []
    for row in drawn:
        ends, level = row.against_full, full.loss[split]
        bars.append(
            {
                "name": f"{row.name}, k {row.k}" if several else row.name,
                "split": split,
                "keep": row.keep,
                "loss": row.loss[split],
                "low": None if ends is None else min(level + ends.low, row.loss[split]),
                "high": None if ends is None else max(level + ends.high, row.loss[split]),
            }
        )
    if not bars:
        return
    title = f"{comparison.task['name']}: {split} loss"
    if "test" in full.evaluations:
        title += ", with the 95% interval of its difference from the full model's"
    figure = methods_bar(bars, reference=full.loss[split], title=title)
    write_html(figure, folder / "methods.html")
    if find_spec("matplotlib") is not None:
        write_png(figure, folder / "methods.png")
