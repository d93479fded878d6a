"""`moeopt front`: arguments are checked and handed to `moeopt.results.front`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, GOAL, OUT
from moeopt.errors import StudyError
from moeopt.results.front.checks import METHODS, TOP, check_arguments

EXAMPLES = (
    "[bold]Examples[/bold]\n\nmoeopt front boolq-trade-off\n\n"
    "moeopt front boolq-trade-off --model ./mixtral --task boolq --out front.html --out front.csv\n\n"
    "moeopt select ./mixtral --study boolq-trade-off --task boolq --fit 24GB\n\n"
    "Every evaluation is kept in the study at once: the same command again goes on after [bold]Ctrl-C[/bold], and runs "
    "nothing twice."
)


def front(
    ctx: typer.Context,
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study of several objectives, or of one.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Full model, to judge the front on dev. Default: do not.")
    ] = None,
    task: Annotated[str | None, GOAL(help="The study's task; needed with --model.")] = None,
    data: opt.Data = None,
    task_option: opt.TaskOption = None,
    top: Annotated[int, GOAL(metavar="N", min=1, help="Judge so many points, spread along the front.")] = TOP,
    dev_limit: opt.DevLimit = None,
    methods: Annotated[
        str, GOAL(metavar="NAMES", help="One-shot methods whose uniform plans stand beside it; none: none.")
    ] = ",".join(METHODS),
    keep: Annotated[
        str | None, GOAL(metavar="R,...", help="Experts that these keep. Default: up to 7 numbers within the space.")
    ] = None,
    health: Annotated[
        bool, GOAL("--health", help="Also hold generated answers to 32 dev prompts against the full model's.")
    ] = False,
    out: Annotated[
        list[Path] | None, OUT(metavar="FILE", help="Write it to a .html, .csv, .json or .png file; repeatable.")
    ] = None,
    storage: opt.Storage = DEFAULT_STORAGE,
    device_map: opt.DeviceMap = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    batch_tokens: opt.BatchTokens = 1024,
) -> None:
    """Show what a study of several objectives found: its front, on dev beside the full model and one-shot plans."""
    if (model is None) != (task is None):
        raise StudyError("--model and --task go together: without both, nothing is judged on dev")
    if health and model is None:
        raise StudyError("--health needs --model and --task")
    names = [] if methods == "none" else arguments.words("--methods", methods, "reap,ean")
    check_arguments(names, top=top)
    keeps = None if keep is None else arguments.numbers("--keep", keep)
    from moeopt import report
    from moeopt.report.front import check_path

    for path in out or ():
        check_path(path)
    from moeopt.report.terminal import Steps, consoles
    from moeopt.results.front import front_of
    from moeopt.study import read_study

    console, err = consoles()
    goal = None
    if model is not None:
        arguments.quick_shape(model, trust_remote_code=trust_remote_code)
        goal = arguments.open_task(str(task), data, task_option, split="dev")
    opened = read_study(study, storage)
    if model is None:
        made = front_of(opened, top=top)
    else:
        from moeopt.models import load

        err.say(f"loading {model}")
        loaded, tokenizer = load(model, device_map=device_map, dtype=dtype, trust_remote_code=trust_remote_code)
        try:
            with Steps(err) as progress:
                made = front_of(
                    opened, loaded, tokenizer, goal, dev_limit=dev_limit, top=top, methods=names, keeps=keeps,
                    health=health, batch_tokens=batch_tokens, progress=progress,
                )  # fmt: skip
        except KeyboardInterrupt:
            raise opt.interrupted(err, "every plan that was judged is kept. To go on:", ctx, storage) from None
    console.print(report.view(made))
    for path in out or ():
        report.save(made, path)
        console.say(f"wrote {path}")
    if model is not None and len(made.objectives) > 1:
        words = [model, *arguments.storage_again(storage), "--study", study, "--task", str(task)]
        words += ["--data", data] if data is not None else []
        words += [word for option in task_option or () for word in ("--task-option", option)]
        console.say(f"  moeopt select {shlex.join(words)} --loss-within 0.01  # or --fit SIZE")
