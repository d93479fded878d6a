"""`moeopt demo`: the whole way on the model that comes with moeopt."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from moeopt.cli import options as opt
from moeopt.cli.options import OUT


def demo(
    skill: Annotated[str | None, typer.Option(help="Which skill of the demo model to search for.")] = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", "--n-trials", min=3, help="Trials of the search; fewer are faster and worse."),
    ] = None,
    out: Annotated[Path, OUT(help="Folder for the study, the exported model and the table.")] = Path("demo-out"),
    seed: opt.Seed = 0,
    copy: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Only write the model and its skills' examples to a new folder, as files to try other commands on.",
        ),
    ] = None,
    svg: Annotated[Path | None, typer.Option(hidden=True, help="Also write the table as a picture.")] = None,
) -> None:
    """Search, compare, export and reload on the small Mixtral that comes with moeopt, in a minute or two.

    A guided search keeps 2 of its 8 experts for one skill, and refits them; a table on held-out examples sets the
    result against the full model, 20 random prunings, and the one-shot methods that it starts from, refitted and not. A
    second run goes on where the first one stopped.
    """
    from moeopt.demo import DEFAULT_SKILL, SKILLS
    from moeopt.errors import TaskError, nearest
    from moeopt.report.terminal import consoles

    if copy is not None:
        from moeopt.demo.copying import copy as copy_to

        model, rows = shlex.quote(str(copy / "model")), shlex.quote(str(copy / f"{DEFAULT_SKILL}.jsonl"))
        consoles()[0].say(
            *copy_to(copy),
            f"  moeopt search {model} --task multiple_choice --data {rows} --keep 2 --limit 48 --trials 20"
            f" --study {DEFAULT_SKILL}-8to2",
        )
        return
    skill = skill or DEFAULT_SKILL
    if skill not in SKILLS:
        raise TaskError(f"unknown demo skill {skill!r}{nearest(skill, list(SKILLS))} (there are {', '.join(SKILLS)})")
    from moeopt.demo.run import TRIALS, run

    run(out, skill=skill, trials=trials or TRIALS, seed=seed, console=consoles()[0], svg=svg)
