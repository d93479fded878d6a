"""Which studies may be compared, which are repeats of one optimiser, and what that is called."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from moeopt.errors import StudyError
from moeopt.results.optimiser_comparison.runs import Run
from moeopt.showing import line
from moeopt.study import MAY_DIFFER, differences_of


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise StudyError, naming what differs, unless all searched the same."""
    first = runs[0]
    for run in runs[1:]:
        differing = [d for d in differences_of(first.description, run.description) if d[0] not in MAY_DIFFER]
        if differing:
            listed = "; ".join(f"{path}: {line(a, 40)} and {line(b, 40)}" for path, a, b in differing[:8])
            more = f"; and {len(differing) - 8} more" if len(differing) > 8 else ""
            raise StudyError(
                f"studies {first.study!r} and {run.study!r} cannot be compared, they differ in {listed}{more}"
            )


def labelled(runs: Sequence[Run]) -> list[Run]:
    """Runs whose study's name is their own: the second of a name, from another storage, says so."""
    return [replace(run, study=name) for run, name in zip(runs, _distinct([run.study for run in runs], "{} ({})"))]


def grouped_by_optimiser(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each optimiser in the order of their seeds, by a name of its own.

    Raises:
        StudyError: when two are the same optimiser and seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings, sort_keys=True, default=str), []).append(run)
    names = readable_names([group[0].settings for group in groups.values()])
    for name, group in zip(names, groups.values()):
        group.sort(key=lambda run: (len(run.seed), run.seed))
        for first, second in pairwise(group):
            if first.seed == second.seed:
                raise StudyError(
                    f"studies {first.study!r} and {second.study!r} are the same optimiser, {name}, with the same seed, "
                    f"{first.seed}: they repeat nothing; leave one out"
                )
    return dict(zip(names, groups.values()))


def readable_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each of some different settings: the sampler's, and in brackets the options that tell namesakes apart.

    >>> readable_names([{"name": "eep", "initial": 30}, {"name": "eep", "initial": 10}, {"name": "tpe"}])
    ['eep (initial=30)', 'eep (initial=10)', 'tpe']
    """
    bases = [_base_name(options) for options in settings]
    flat = [dict(_flat(options)) for options in settings]
    names = []
    for base, mine in zip(bases, flat):
        namesakes = [other for name, other in zip(bases, flat) if name == base]
        differing = sorted(
            {key for other in namesakes for key in {*mine, *other} if mine.get(key) != other.get(key)} - {"name"}
        )
        listed = ", ".join(f"{key}={line(mine[key], 40)}" for key in differing if key in mine)
        names.append(f"{base} ({listed})" if listed else base)
    return _distinct(names, "{} #{}")  # they may differ in what brackets are too short for


def _distinct(names: Sequence[str], again: str) -> list[str]:
    """The names, of which the second, third, ... of a kind are written as `again` says, with their number."""
    count: Counter[str] = Counter()
    distinct = []
    for name in names:
        count[name] += 1
        distinct.append(name if count[name] == 1 else again.format(name, count[name]))
    return distinct


def _base_name(settings: Mapping[str, Any]) -> str:
    """The sampler's name, that of the class for one of Optuna's own; with pruner and warm starts."""
    name = str(settings["name"])
    inner = settings.get("sampler")
    if isinstance(inner, dict) and isinstance(inner.get("class"), str):
        name = inner["class"].rpartition(".")[2]
    pruner = settings.get("pruner")
    if isinstance(pruner, dict):
        name += f" + {str(pruner.get('class')).rpartition('.')[2]}"
    starts = settings.get("warm_starts")
    if isinstance(starts, list):
        name += f" from {', '.join(map(str, starts))}"
    return name


def _flat(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _flat(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, settings


def seeds_of(runs: Sequence[Run]) -> list[str]:
    """Their seeds, each once, in order."""
    return list(dict.fromkeys(run.seed for run in runs))
