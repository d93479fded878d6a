"""How a profile is shown: size and memory, speed, load balance, and what the numbers are."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeopt.results.profiling.result import LayerLoad, Part, Profile, Ratio, Row
from moeopt.results.profiling.run import RANDOM_TOKENS

ENOUGH = 3
"""Repeats below which nothing is said about speed."""


def view(profile: Profile) -> RenderableType:
    """All tables, and once what the numbers are."""
    parts: list[RenderableType] = [sizes(profile), speeds(profile)]
    if any(row.loads for row in profile.rows):
        parts.append(balance(profile))
    return Group(*parts, Text("\n".join(notes(profile)), style="dim"))


def sizes(profile: Profile) -> Table:
    """Parameters, weights and peak memory, and what share of the first row's these are."""
    columns = ("parameters", "active\nper token", "active\nexperts", "weights\nGiB", "peak\nGiB", "peak over\nfirst")
    shown = _table("Size and memory", columns)
    first = profile.rows[0]
    for row in profile.rows:
        mark = "*" if row.computed else ""
        shown.add_row(
            Text(row.name),
            _short(row.parameters),
            "?" if row.active_parameters is None else _short(row.active_parameters),
            _active(row),
            f"{row.weight_bytes / 2**30:.3f}{mark}",
            f"{row.peak_bytes / 2**30:.3f}{mark}",
            f"{row.peak_bytes / first.peak_bytes:.2f}",
        )
    return shown


def speeds(profile: Profile) -> Table:
    """Tokens per second, and ratios to the first row, a section for each setting."""
    shown = _table(
        f"Speed, tokens per second (decoding {profile.new_tokens} new tokens on the KV cache)",
        ("batch x\nprompt", "prefill", "over first\nmedian (range)", "decode", "over first\nmedian (range)"),
    )
    parts: tuple[Part, Part] = ("prefill", "decode")
    for setting in profile.settings:
        for row in profile.rows:
            cells = []
            for part in parts:
                ratio = profile.ratio(row, setting, part)
                cells += [_rate(profile.rate(row, setting, part)), "" if row is profile.rows[0] else _ratio(ratio)]
            shown.add_row(Text(row.name), f"{setting.batch} x {setting.prompt_length}", *cells)
        shown.add_section()
    return shown


def balance(profile: Profile) -> Table:
    """How evenly tokens spread over experts: means over layers, and the layer that is least even."""
    columns = (
        "experts\na layer", "CV", "max over\nmean", "entropy", "least even layer", "its max\nover mean", "its busiest",
        "its idlest",
    )  # fmt: skip
    shown = _table("Load balance, mean over MoE layers", columns)
    for row in profile.rows:
        if not row.loads:
            shown.add_row(Text(row.name), *["–"] * len(columns))
            continue
        worst = max(row.loads, key=lambda load: load.max_over_mean)
        shown.add_row(
            Text(row.name),
            "-".join(map(str, sorted({min(row.experts), max(row.experts)}))),
            *(_mean(getattr(load, name) for load in row.loads) for name in ("cv", "max_over_mean", "entropy")),
            worst.layer,
            f"{worst.max_over_mean:.2f}",
            _share(worst, worst.busiest),
            _share(worst, worst.idlest),
        )
    return shown


def notes(profile: Profile) -> list[str]:
    """What the numbers are."""
    p, machine = profile, profile.machine
    first = p.rows[0]
    where = ", ".join(machine["device_names"]) or f"{machine['processor']}, {machine['cpus']} CPUs"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    backend = machine["experts_implementation"]
    lines = [
        f"{where}, {threads}, torch {machine['torch']}; {first.dtype}"
        + (f", experts run by {backend}" if backend else "")
        + "."
    ]
    lines.append(
        f"Peak: {machine['peak_from']}, weights included, batch {p.largest.batch} x {p.largest.prompt_length} tokens "
        f"and {p.new_tokens} new."
    )
    if any(row.computed for row in p.rows):
        lines.append(
            "* computed: of the checkpoint that the plan would be exported to. Its speed is that of the plan patched "
            "onto the full model."
        )
    models = len({row.source for row in p.rows})
    turns = "took turns in each setting" if p.resident else "took turns, loaded anew in each repeat"
    held = f"; {models} models, each in a process of its own," if models > 1 else "; rows"
    lines.append(
        f"Medians of {p.repeats} repeat{'s' if p.repeats > 1 else ''}, warm-up left out{held} {turns}. Ratios are "
        "paired within a repeat; above 1 is faster than the first row."
        + (
            " A range that holds 1 shows no difference."
            if p.repeats >= ENOUGH
            else f" So few repeats show no difference at all: take {ENOUGH} or more."
        )
    )
    source = p.tokens
    kind = (
        f"{RANDOM_TOKENS} (seed {source['seed']}), not text: routing of text differs"
        if source["kind"] == RANDOM_TOKENS
        else f"task {source['task']['name']}, split {source['split']}"
    )
    lines.append(f"Prompts: {kind}.")
    if any(row.loads for row in p.rows):
        lines.append(
            f"Load balance on {source['balance']:,} of these tokens. CV: standard deviation of the experts' token "
            "counts over their mean; entropy: over the largest there can be. Even: CV 0, max over mean 1, entropy 1."
        )
    for row in p.rows:
        if row.without_loads:
            lines.append(f"{row.name}: no load balance, {row.without_loads}.")
        if row.devices != first.devices:
            lines.append(f"{row.name} is on {', '.join(row.devices)}, {first.name} on {', '.join(first.devices)}.")
        if row.dtype != first.dtype:
            lines.append(f"{row.name} is in {row.dtype}, {first.name} in {first.dtype}.")
    return lines


def _table(title: str, columns: Iterable[str]) -> Table:
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("", overflow="fold")
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    return shown


def _active(row: Row) -> str:
    return "–" if row.active_experts is None else f"{row.active_experts:.2f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.fmean(values):.2f}"


def _share(load: LayerLoad, expert: int) -> str:
    return f"{expert}: {100 * load.shares[load.experts.index(expert)]:.1f}%"


def _short(number: int) -> str:
    """A count in three digits and a letter."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
