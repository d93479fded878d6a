"""How a comparison is shown: a table for each keep, and sentences that say what differs."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeopt.evaluation import Interval
from moeopt.evaluation.teacher import LABEL_FREE
from moeopt.report.terminal import number, percent
from moeopt.results.method_comparison.comparison import Comparison, Row


def view(comparison: Comparison) -> RenderableType:
    """All tables, each with its sentences, and once what the numbers are."""
    parts: list[RenderableType] = []
    for keep in comparison.keeps:
        parts += [table(comparison, keep, caption=False), *map(Text, sentences(comparison, keep)), Text()]
    return Group(*parts, Text(notes(comparison), style="dim"))


def table(comparison: Comparison, keep: int, *, caption: bool = True) -> Table:
    """The rows of one keep, the full model on top, a section for each k; the best one-shot method is bold."""
    c = comparison
    order = list(dict.fromkeys(row.k for row in c.rows if row.keep == keep and row.kind != "full"))
    rows = [row for k in order for row in c.rows if (row.keep, row.k) == (keep, k) and row.kind != "full"]
    full = [row for row in c.rows if row.kind == "full"]
    shown = Table(
        title=_title(c, rows[0]),
        title_justify="left",
        title_style="bold",
        caption=Text("\n".join([*sentences(c, keep), notes(c)])) if caption else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    several = len({row.k for row in [*rows, *full]}) > 1
    intervals = (
        ["test − full\n[95% interval]", f"test − best one-shot\n(on {c.chosen_on}) [95%]"] if "test" in c.splits else []
    )
    shown.add_column("", overflow="fold")
    for name in (
        *(["k"] if several else []),
        *(f"{split}\nloss" for split in c.splits),
        f"{_last(c)}\n{'agree' if c.score in LABEL_FREE else 'acc.'}",
        *intervals,
        "active",
        "layer-\ntokens",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in [*full, *rows]:
        section = ("full",) if row.kind == "full" else (row.k,)
        if previous is not None and section != previous:
            shown.add_section()
        previous = section
        best = c.best_one_shot(row.keep, row.k) is row
        shown.add_row(*_cells(c, row, several, best), style="bold" if best else "")
        if row.kind == "random" and max(row.drawn.values()) > 1:
            spread = [number(row.loss_sd.get(split)) for split in c.splits]
            accuracy = percent(row.accuracy_sd.get(_last(c)))
            shown.add_row("  standard deviation", *([""] if several else []), *spread, accuracy)
    return shown


def _cells(c: Comparison, row: Row, several: bool, best: bool) -> list[str | Text]:
    intervals = [_interval(row.against_full), _interval(row.against_best)] if "test" in c.splits else []
    chosen = c.best_one_shot(row.keep, row.k)
    if intervals and best:
        intervals[1] = "best"
    elif intervals and chosen is not None and chosen.plan == row.plan:
        intervals[1] = "same plan"
    return [
        Text(row.name if row.variant is None else f" {row.variant}"),
        *([str(row.k)] if several else []),
        *(number(row.loss.get(split)) for split in c.splits),
        percent(row.accuracy.get(_last(c))),
        *intervals,
        f"{row.active:.2f}",
        _short(row.layer_tokens) if row.layer_tokens else "",
    ]


def sentences(comparison: Comparison, keep: int) -> list[str]:
    """See `Comparison.sentences`."""
    c, found = comparison, []
    ks = dict.fromkeys(row.k for row in c.rows if row.keep == keep and row.kind != "full")
    for k in ks:
        here = [row for row in c.rows if (row.keep, row.k) == (keep, k) and row.variant is None]
        search = next((row for row in here if row.kind == "search"), None)
        random = next((row for row in here if row.kind == "best random"), None)
        best = c.best_one_shot(keep, k)
        where = f"Keep {keep}, k {k}: " if len(ks) > 1 else f"Keep {keep}: "
        if "test" not in c.splits:
            found.append(f"{where}the task has no test split, so nothing is said about unseen examples.")
        elif search is not None and best is None:
            found.append(f"{where}no one-shot method of this k to hold the search against.")
        elif best is not None:
            one_shot = f"the best one-shot method ({best.name})"
            if search is not None and search.against_best is not None:
                found.append(where + _verdict(search.name, one_shot, search.against_best))
            elif random is not None and random.against_best is not None:
                i = random.against_best
                found.append(
                    where + _verdict(one_shot, f"the {random.name} prunings", Interval(-i.mean, -i.high, -i.low))
                )
    return found


def _verdict(a: str, b: str, i: Interval) -> str:
    if i.high < 0:
        return f"{a} beats {b} on test by {-i.mean:.4f} [{-i.high:.4f}, {-i.low:.4f}]."
    if i.low > 0:
        return f"{a} is worse than {b} on test by {i.mean:.4f} [{i.low:.4f}, {i.high:.4f}]."
    return f"no difference on test between {a} and {b}: {_interval(i)}."


def notes(comparison: Comparison) -> str:
    """What the numbers of the tables are."""
    c = comparison
    sizes = ", ".join(f"{split} {s.examples:,} examples ({s.tokens:,} tokens)" for split, s in c.splits.items())
    lines = [f"{c.task['name']}: {sizes}."]
    if c.score != "likelihood":
        lines[0] += f" Loss: {c.score}."
    if c.calibrated is not None:
        seen = c.calibrated
        source = "the task's own search split" if seen.own else f"another task, {seen.task}"
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
    lines += [f"Left out: {reason}" for reason in c.left_out]
    return "\n".join(lines)


def _title(c: Comparison, row: Row) -> str:
    full = c.full
    ks = list(dict.fromkeys(x.k for x in c.rows if x.kind != "full" and x.keep == row.keep))
    active = f", {ks[0]} active" if len(ks) == 1 else ""
    return (
        f"Keep {row.keep} of {c.shape.experts} experts{active}: {_short(row.parameters)} parameters, "
        f"{row.gib:.3g} GiB (full model: {_short(full.parameters)}, {full.gib:.3g} GiB)"
    )


def _last(c: Comparison) -> str:
    return list(c.splits)[-1]


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.mean:+.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _short(count: int) -> str:
    """A count in three digits and a letter.

    >>> _short(46_702_792_704)
    '46.7B'
    """
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
