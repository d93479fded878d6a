"""`moeopt compare`: arguments are checked and handed to `moeopt.results.optimiser_comparison.compare`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moeopt.cli.options import DEFAULT_STORAGE, OUT, STORAGE_VARIABLE
from moeopt.errors import StudyError, nearest

if TYPE_CHECKING:
    from moeopt.results.optimiser_comparison import Run

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt compare --study-prefix boolq-8to4- --storage sqlite:///moeopt.db\n\n"
    "moeopt compare eep-0 eep-1 cmaes-0 cmaes-1 --cost time --target 0.35\n\n"
    "moeopt compare --study-prefix boolq- --storage sqlite:///a.db --storage postgresql+psycopg://user@host/moeopt\n\n"
    "One study is one optimiser and one seed. [bold]studies/compare_optimisers.py[/bold] runs a whole comparison."
)


def compare(
    studies: Annotated[
        list[str] | None, typer.Argument(metavar="[STUDY]...", help="Studies, each of one optimiser and one seed.")
    ] = None,
    study_prefix: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Also all studies whose names begin so.")
    ] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help=f"Where studies are kept; repeatable. [default: ${STORAGE_VARIABLE}, else {DEFAULT_STORAGE}]",
        ),
    ] = None,
    cost: Annotated[
        Literal["layer-tokens", "time", "trials"],
        typer.Option(help="What a budget is counted in. time: seconds in which at least one worker ran a trial."),
    ] = "layer-tokens",
    target: Annotated[
        float | None,
        typer.Option(
            metavar="LOSS",
            help="Loss, or missing hypervolume, to give times for. Default: what half of the studies reached.",
        ),
    ] = None,
    out: Annotated[Path, OUT(metavar="DIR", help="Folder for the page, the CSV files and the JSON.")] = Path(
        "compare-optimisers"
    ),
) -> None:
    """Compare optimisers over repeated seeds: how low a loss, for how much, and what may be concluded from it.

    Studies of several objectives are compared by the hypervolume of their fronts, between bounds that they share.

    Studies must be of the same model, task, space and evaluation; those that differ in the sampler's seed alone are
    repeats of one optimiser.
    """
    if not studies and study_prefix is None:
        raise StudyError("name the studies to compare, or give --study-prefix")
    from moeopt.report.optimiser_comparison import save, view
    from moeopt.report.terminal import consoles
    from moeopt.results import optimiser_comparison

    storages = storage or [os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE]
    runs = _runs(studies or [], study_prefix, storages)
    comparison = optimiser_comparison.compare(runs, cost=cost, target=target)
    page = save(comparison, out)
    console, _ = consoles()
    console.print(view(comparison))
    told = f"{page} shows it all." if page else f"All numbers are in {out}; a page needs pip install 'moeopt[figures]'."
    console.say(told)


def _runs(names: list[str], prefix: str | None, storages: list[str]) -> list[Run]:
    """The studies of these names, and of this prefix, in all storages."""
    import optuna

    from moeopt.results.optimiser_comparison import read
    from moeopt.study.storage import hidden, open_storage, readable_errors, study_names
    from moeopt.trials.description import reading

    there: list[str] = []
    runs = []
    for url in dict.fromkeys(storages):
        opened = open_storage(url, create=False)
        with readable_errors(url):
            stored = study_names(opened)
            there += stored
            for name in (n for n in stored if n in names or (prefix is not None and n.startswith(prefix))):
                with reading(name):
                    runs.append(read(optuna.load_study(study_name=name, storage=opened)))
    places = " or ".join(map(hidden, dict.fromkeys(storages)))
    for name in names:
        if name not in there:
            raise StudyError(f"no study {name!r} in {places}{nearest(name, there)}")
    if not runs:
        raise StudyError(f"no study in {places} has a name that begins with {prefix!r}")
    return runs
