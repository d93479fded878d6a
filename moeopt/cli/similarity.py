"""`moeopt similarity`: arguments are checked and handed to `moeopt.results.similarity`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, INTERRUPTED, OUT
from moeopt.errors import MoeoptError

if TYPE_CHECKING:
    from moeopt.tasks import Task

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt similarity ./mixtral --task boolq --task arc_easy --task text=src/\n\n"
    "moeopt similarity ./mixtral --task text=wiki/ --task text=src/ --plan pruned.safetensors --out alike.html"
)
COMPARED = partial(typer.Option, rich_help_panel="What is compared")


def similarity(
    model: opt.Model,
    task: Annotated[
        list[str],
        COMPARED(
            "--task",
            metavar="TASK[=DATA]",
            help="A task, and where its data lies if that is not its own; twice or more, or once with a plan.",
        ),
    ],
    method: Annotated[str, COMPARED(help="The one-shot method whose scores are compared.")] = "reap",
    keep: Annotated[
        int | None, COMPARED(metavar="R", min=1, help="Experts a layer that it keeps. Default: half.")
    ] = None,
    limit: Annotated[int | None, COMPARED(metavar="N", min=1, help="Look at N search examples of each task.")] = 128,
    plan: opt.PlanFile = None,
    study: opt.StudyName = None,
    trial: opt.Trial = "best",
    storage: opt.Storage = DEFAULT_STORAGE,
    device_map: opt.DeviceMap = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    batch_tokens: opt.BatchTokens = 1024,
    out: Annotated[
        Path | None, OUT(metavar="FILE", help="Write it here: a page (.html), .csv, .json or a picture (.png).")
    ] = None,
) -> None:
    """Tell how alike tasks use the experts: whether one may calibrate for another, and which one a plan will hurt."""
    from moeopt.methods.names import check_ranks
    from moeopt.report import similarity as shown

    check_ranks(method)
    if out is not None:
        shown.check_path(out)
    shape = arguments.quick_shape(model, trust_remote_code=trust_remote_code)
    chosen = None
    if plan is not None or study is not None:
        layers = None if shape is None else shape.layers
        chosen, title, _ = arguments.chosen_plan("--plan", plan, layers, storage, study, trial)
        arguments.check_layers(chosen, shape)
    opened = open_tasks(task)
    if len(opened) < 2 and chosen is None:
        raise MoeoptError(f"give --task twice or more, or a plan beside it, got only {task[0]!r}")
    from moeopt import report
    from moeopt.models import load
    from moeopt.report.terminal import Steps, consoles
    from moeopt.results.similarity import similarity as compared

    console, err = consoles()
    try:
        err.say(f"loading {model}")
        loaded, tokenizer = load(model, device_map=device_map, dtype=dtype, trust_remote_code=trust_remote_code)
        with Steps(err) as progress:
            made = compared(
                loaded, tokenizer, opened, keep=keep, method=method, plan=chosen, limit=limit,
                batch_tokens=batch_tokens, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        err.print("Interrupted; nothing is kept of a comparison that is not finished.")
        raise typer.Exit(INTERRUPTED) from None
    if out is not None:
        report.save(made, out)
    if chosen is not None:
        console.say(f"the plan is {title}")
    console.print(report.view(made))
    if out is not None:
        console.say(f"saved to {out}")


def open_tasks(given: list[str]) -> dict[str, Task]:
    """Tasks by what they are told by: their name, or that of their data where a name stands there twice."""
    pairs = [text.partition("=") for text in given]
    names = [name for name, _, _ in pairs]
    labels = [Path(data).stem if data and names.count(name) > 1 else name for name, _, data in pairs]
    if len(set(labels)) < len(labels):
        raise MoeoptError(f"--task {next(text for text in labels if labels.count(text) > 1)!r} is given twice")
    return {label: arguments.open_task(name, data or None, None) for label, (name, _, data) in zip(labels, pairs)}
