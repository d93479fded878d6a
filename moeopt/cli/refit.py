"""`moeopt refit`: arguments are checked and handed to `moeopt.refit`, and the result is judged on dev."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeopt.cli import arguments, options
from moeopt.cli.options import DEFAULT_STORAGE, GOAL, STUDY, TRIAL
from moeopt.errors import PlanError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from moeopt.plan import Plan
    from moeopt.tasks import Task as AnyTask

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt refit ./mixtral fitted.safetensors --task boolq --data boolq.jsonl --study boolq-8to4\n\n"
    "moeopt refit ./mixtral fitted.safetensors --task text --data wiki/ --plan pruned.safetensors --rank 32\n\n"
    "moeopt export ./mixtral small/ --plan fitted.safetensors\n\n"
    "Every layer is kept beside the file as soon as it is fitted: the same command again goes on after "
    "[bold]Ctrl-C[/bold]."
)
FITTED = partial(typer.Option, rich_help_panel="Fit")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("refit", epilog=EXAMPLES)(refit)


def refit(
    ctx: typer.Context,
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The plan file to write.")],
    task: options.Task,
    plan: Annotated[Path | None, FITTED(help="Plan file of moeopt, or an EEP .pth.")] = None,
    study: options.StudyName = None,
    trial: Annotated[str, STUDY(help=f"{TRIAL}.")] = "best",
    data: options.Data = None,
    task_option: options.TaskOption = None,
    limit: options.Limit = None,
    dev_limit: Annotated[int | None, GOAL(metavar="N", min=1, help="Judge on N dev examples. Default: all.")] = None,
    score: options.ScoreOption = "likelihood",
    rank: Annotated[
        int | None, FITTED(metavar="Q", min=1, help="Rank of each expert's change, for a small file. Default: any.")
    ] = None,
    calibration_task: Annotated[
        str | None, FITTED(metavar="TASK", help="Another task to fit to. Default: the task itself.")
    ] = None,
    calibration_data: Annotated[
        str | None, FITTED(metavar="DATA", help="Its data, as --data; alone, other data of the same task.")
    ] = None,
    storage: options.Storage = DEFAULT_STORAGE,
    device_map: options.DeviceMap = "auto",
    dtype: options.Dtype = "auto",
    batch_tokens: options.BatchTokens = 1024,
) -> None:
    """Fit what a smaller model's experts give to the full model, in closed form, and judge it on dev."""
    task_options = arguments.pairs("--task-option", task_option)
    shape = arguments.quick_shape(model)
    check_file(out)
    layers = shape.layers if shape else None
    chosen, title, _ = arguments.chosen_plan("--plan", plan, layers, storage, study, trial)
    arguments.check_layers(chosen, shape)
    from moeopt import tasks

    goal = tasks.get(task, data=data, **task_options)
    goal.examples("search")
    other = arguments.calibration_task(task, task_options, calibration_task, calibration_data, {})
    from moeopt.models import load
    from moeopt.report.terminal import consoles

    console, err = consoles()
    try:
        err.print(f"task {goal.name}: {goal.summary}", markup=False, soft_wrap=True)
        err.print(f"loading {model}; refitting {title}", markup=False, soft_wrap=True)
        loaded, tokenizer = load(model, device_map=device_map, dtype=dtype)
        lines = written(
            chosen, out, loaded, tokenizer, goal, err=err, rank=rank, calibration=other, limit=limit,
            dev_limit=dev_limit, score=score, batch_tokens=batch_tokens,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise options.interrupted(err, "every layer that was fitted is kept. To go on:", ctx, storage) from None
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    console.print(f"  {export_again(model, out)}", markup=False, soft_wrap=True)


def check_file(out: Path) -> None:
    """Raise PlanError for a plan file that could not be written, before any long work."""
    if out.exists() or out.suffix != ".safetensors":
        why = "is there already" if out.exists() else "does not end in .safetensors"
        raise PlanError(f"{str(out)!r} {why}; name a new file to write the refitted plan to")
    try:
        with tempfile.TemporaryFile(dir=out.resolve().parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise PlanError(f"cannot write the refitted plan into the folder {str(out.parent)!r}: {reason}") from None


def check_can(model: PreTrainedModel, tokenizer: Any, task: AnyTask, limit: int | None) -> None:
    """Raise what a refit at the end of a search would, before the search."""
    from moeopt.methods import Calibration
    from moeopt.methods.refitting import check_refit

    check_refit(Calibration(model, tokenizer, task, limit=limit))


def written(plan: Plan, out: Path, *given: Any, err: Console, rank: int | None, **settings: Any) -> list[str]:
    """Refit a plan, write it to `out`, and say what that gave.

    Args:
        plan: what is refitted.
        out: the plan file.
        given: model, tokenizer and task.
        err: for progress.
        rank: as for `refit`.
        settings: of `judged_refit`.
    """
    from moeopt.methods import Calibration
    from moeopt.methods import refit as fit
    from moeopt.report.selection import refit_lines
    from moeopt.report.terminal import Steps
    from moeopt.results.selection import judged_refit

    model, tokenizer, task = given
    folder = out.with_name(f".{out.name}.layers")
    source, limit = settings.pop("calibration", None) or task, settings.pop("limit")
    sequences = Calibration(model, tokenizer, source, limit=limit, batch_tokens=settings["batch_tokens"])
    with Steps(err) as progress:
        made = fit(plan, sequences, rank=rank, parts=folder, progress=progress)
    made.save(out)
    shutil.rmtree(folder, ignore_errors=True)
    lines = [*made.lines(), f"{out} holds the refitted plan"]
    with err.status("judging it on dev"):
        return [*lines, *refit_lines(judged_refit(plan, made.plan, model, tokenizer, task, **settings))]


def export_again(model: str, out: Path) -> str:
    """The command that exports a refitted plan."""
    return f"moeopt export {shlex.quote(model)} OUT_DIR --plan {shlex.quote(str(out))}"
