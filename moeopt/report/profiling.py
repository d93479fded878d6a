"""How a profile is shown and written: size and memory, speed, load balance, and what the numbers are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeopt.report.formatting import DASH, count, number, percent, short
from moeopt.report.tables import Columns, csv_of, json_text, table, write
from moeopt.results.profiling.checks import ProfileError, Setting
from moeopt.results.profiling.result import LayerLoad, Part, Profile, Row
from moeopt.results.profiling.run import RANDOM_TOKENS

FORMAT, VERSION = "moeopt-profile", 1
PARTS: tuple[Part, ...] = get_args(Part)
ENOUGH = 3
"""Repeats below which nothing is said about speed."""
LOAD = ("tokens", "active", "cv", "max_over_mean", "entropy", "busiest", "idlest")


def view(profile: Profile) -> RenderableType:
    """All tables, and once what the numbers are."""
    tables = [_sizes(profile), _speeds(profile)]
    if any(row.loads for row in profile.rows):
        tables.append(_balance(profile))
    return Group(*tables, Text("\n".join(notes(profile)), style="dim"))


def save(profile: Profile, path: Path) -> None:
    """Write everything to a JSON file, and a line a row and setting to a CSV file beside it.

    Raises:
        ProfileError: when they cannot be written.
    """
    lines = [
        _facts(row) | vars(speed.setting) | _rates(profile, row, speed.setting)
        for row in profile.rows
        for speed in row.speeds
    ]
    write({path: json_text(record(profile)) + "\n", path.with_suffix(".csv"): csv_of(lines)}, ProfileError)


def record(profile: Profile) -> dict[str, Any]:
    """Everything as JSON."""
    p = profile
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": [vars(setting) for setting in p.settings],
        "new_tokens": p.new_tokens,
        "repeats": p.repeats,
        "resident": p.resident,
        "peak_setting": vars(p.largest),
        "tokens": dict(p.tokens),
        "machine": dict(p.machine),
        "rows": [_row(p, row) for row in p.rows],
    }


def _row(profile: Profile, row: Row) -> dict[str, Any]:
    def load(layer: LayerLoad) -> dict[str, Any]:
        lists = {"experts": list(layer.experts), "counts": list(layer.counts), "shares": list(layer.shares)}
        return {"layer": layer.layer, **lists, **{name: getattr(layer, name) for name in LOAD}}

    return {
        **_facts(row),
        "experts": list(row.experts),
        "devices": list(row.devices),
        "layers": [load(layer) for layer in row.loads],
        "without_layers": row.without_loads,
        "speeds": [
            {
                **vars(speed.setting),
                **{f"{part}_seconds": list(getattr(speed, part)) for part in PARTS},
                **_rates(profile, row, speed.setting),
            }
            for speed in row.speeds
        ],
    }


def _facts(row: Row) -> dict[str, Any]:
    """What a row is apart from its speed; of the balance, means over layers, and the worst maximum over mean."""
    means = {name: _mean(row, name) for name in ("cv", "max_over_mean", "entropy")} if row.loads else None
    worst = {"worst_max_over_mean": max(load.max_over_mean for load in row.loads)} if row.loads else {}
    return {
        "name": row.name,
        "source": row.source,
        "plan": row.plan and row.plan.fingerprint,
        "parameters": row.parameters,
        "active_parameters": row.active_parameters,
        "active_experts": row.active_experts,
        "weight_gib": row.weight_bytes / 2**30,
        "peak_gib": row.peak_bytes / 2**30,
        "memory": "computed" if row.computed else "measured",
        "dtype": row.dtype,
        "balance": means and means | worst,
    }


def _rates(profile: Profile, row: Row, setting: Setting) -> dict[str, Any]:
    return {
        name: value
        for part in PARTS
        for name, value in (
            (f"{part}_tokens_per_second", profile.rate(row, setting, part)),
            (f"{part}_over_first", vars(profile.ratio(row, setting, part))),
        )
    }


def _mean(row: Row, name: str) -> float:
    return statistics.fmean(getattr(load, name) for load in row.loads)


def _sizes(profile: Profile) -> Table:
    """Parameters, weights and peak memory, and what share of the first row's these are."""
    first = profile.rows[0]

    def gib(size: int, row: Row) -> str:
        return f"{size / 2**30:.3f}{'*' if row.computed else ''}"

    columns: Columns = [
        ("", lambda row: row.name),
        ("parameters", lambda row: short(row.parameters)),
        ("active\nper token", lambda row: "?" if row.active_parameters is None else short(row.active_parameters)),
        ("active\nexperts", lambda row: number(row.active_experts, 2)),
        ("weights\nGiB", lambda row: gib(row.weight_bytes, row)),
        ("peak\nGiB", lambda row: gib(row.peak_bytes, row)),
        ("peak over\nfirst", lambda row: f"{row.peak_bytes / first.peak_bytes:.2f}"),
    ]
    return table("Size and memory", columns, profile.rows)


def _speeds(profile: Profile) -> Table:
    """Tokens per second, and ratios to the first row, a section for each setting."""

    def rate(part: Part, row: Row, setting: Setting) -> str:
        value = profile.rate(row, setting, part)
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

    def ratio(part: Part, row: Row, setting: Setting) -> str:
        over = profile.ratio(row, setting, part)
        return "" if row is profile.rows[0] else f"{over.median:.2f} ({over.low:.2f} to {over.high:.2f})"

    columns: Columns = [
        ("", lambda line: line[0].name),
        ("batch x\nprompt", lambda line: f"{line[1].batch} x {line[1].prompt_length}"),
        ("prefill", lambda line: rate("prefill", *line)),
        ("over first\nmedian (range)", lambda line: ratio("prefill", *line)),
        ("decode", lambda line: rate("decode", *line)),
        ("over first\nmedian (range)", lambda line: ratio("decode", *line)),
    ]
    lines = [(row, setting) for setting in profile.settings for row in profile.rows]
    title = f"Speed, tokens per second (decoding {profile.new_tokens} new tokens on the KV cache)"
    return table(title, columns, lines, section=lambda line: line[1])


def _balance(profile: Profile) -> Table:
    """How evenly tokens spread over experts: means over layers, and the layer that is least even."""

    def worst(row: Row) -> LayerLoad:
        return max(row.loads, key=lambda load: load.max_over_mean)

    def where_seen(cell: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: cell(row) if row.loads else DASH

    def share(load: LayerLoad, expert: int) -> str:
        return f"{expert}: {percent(load.shares[load.experts.index(expert)])}"

    columns: Columns = [
        ("experts\na layer", lambda row: "-".join(map(str, sorted({min(row.experts), max(row.experts)})))),
        ("CV", lambda row: number(_mean(row, "cv"), 2)),
        ("max over\nmean", lambda row: number(_mean(row, "max_over_mean"), 2)),
        ("entropy", lambda row: number(_mean(row, "entropy"), 2)),
        ("least even layer", lambda row: worst(row).layer),
        ("its max\nover mean", lambda row: number(worst(row).max_over_mean, 2)),
        ("its busiest", lambda row: share(worst(row), worst(row).busiest)),
        ("its idlest", lambda row: share(worst(row), worst(row).idlest)),
    ]
    return table(
        "Load balance, mean over MoE layers",
        [("", lambda row: row.name), *((head, where_seen(cell)) for head, cell in columns)],
        profile.rows,
    )


def notes(profile: Profile) -> Iterator[str]:
    """What the numbers are."""
    p, machine, first = profile, profile.machine, profile.rows[0]
    where = ", ".join(machine["device_names"]) or f"{machine['processor']}, {machine['cpus']} CPUs"
    backend = machine["experts_implementation"]
    by = f", experts run by {backend}" if backend else ""
    yield f"{where}, {count(machine['threads'], 'thread')}, torch {machine['torch']}; {first.dtype}{by}."
    yield (
        f"Peak: {machine['peak_from']}, weights included, batch {p.largest.batch} x {p.largest.prompt_length} tokens "
        f"and {p.new_tokens} new."
    )
    if any(row.computed for row in p.rows):
        yield (
            "* computed: of the checkpoint that the plan would be exported to. Its speed is that of the plan patched "
            "onto the full model."
        )
    models = len({row.source for row in p.rows})
    turns = "took turns in each setting" if p.resident else "took turns, loaded anew in each repeat"
    who = f"{models} models, each in a process of its own," if models > 1 else "rows"
    shows = "A range that holds 1 shows no difference."
    few = f"So few repeats show no difference at all: take {ENOUGH} or more."
    yield (
        f"Medians of {count(p.repeats, 'repeat')}, warm-up left out; {who} {turns}. Ratios are paired within a repeat; "
        f"above 1 is faster than the first row. {shows if p.repeats >= ENOUGH else few}"
    )
    source = p.tokens
    if source["kind"] == RANDOM_TOKENS:
        yield f"Prompts: {RANDOM_TOKENS} (seed {source['seed']}), not text: routing of text differs."
    else:
        yield f"Prompts: task {source['task']['name']}, split {source['split']}."
    if any(row.loads for row in p.rows):
        yield (
            f"Load balance on {source['balance']:,} of these tokens. CV: standard deviation of the experts' token "
            "counts over their mean; entropy: over the largest there can be. Even: CV 0, max over mean 1, entropy 1."
        )
    for row in p.rows:
        if row.without_loads:
            yield f"{row.name}: no load balance, {row.without_loads}."
        if row.devices != first.devices:
            yield f"{row.name} is on {', '.join(row.devices)}, {first.name} on {', '.join(first.devices)}."
        if row.dtype != first.dtype:
            yield f"{row.name} is in {row.dtype}, {first.name} in {first.dtype}."
