"""`moeopt refit`: arguments are checked and handed to `moeopt.refit`, and the result is judged on dev."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE
from moeopt.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moeopt.plan import Plan
    from moeopt.tasks import Task

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt refit ./mixtral fitted.safetensors --task boolq --data boolq.jsonl --study boolq-8to4\n\n"
    "moeopt refit ./mixtral fitted.safetensors --task text --data wiki/ --plan pruned.safetensors --rank 32\n\n"
    "moeopt export ./mixtral small/ --plan fitted.safetensors\n\n"
    "Every layer is kept beside the file as soon as it is fitted: the same command again goes on after "
    "[bold]Ctrl-C[/bold]."
)
FITTED = partial(typer.Option, rich_help_panel="Fit")
FITTED_SO_FAR = "every layer that was fitted is kept. To go on:"


def refit(
    ctx: typer.Context,
    model: opt.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The plan file to write.")],
    task: opt.Task,
    plan: opt.PlanFile = None,
    study: opt.StudyName = None,
    trial: opt.Trial = "best",
    data: opt.Data = None,
    task_option: opt.TaskOption = None,
    limit: opt.Limit = None,
    dev_limit: opt.DevLimit = None,
    score: opt.ScoreOption = "likelihood",
    rank: Annotated[
        int | None, FITTED(metavar="Q", min=1, help="Rank of each expert's change, for a small file. Default: any.")
    ] = None,
    calibration_task: Annotated[
        str | None, FITTED(metavar="TASK", help="Another task to fit to. Default: the task itself.")
    ] = None,
    calibration_data: Annotated[
        str | None, FITTED(metavar="DATA", help="Its data, as --data; alone, other data of the same task.")
    ] = None,
    storage: opt.Storage = DEFAULT_STORAGE,
    device_map: opt.DeviceMap = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    batch_tokens: opt.BatchTokens = 1024,
) -> None:
    """Fit what a smaller model's experts give to the full model, in closed form, and judge it on dev."""
    arguments.pairs("--task-option", task_option)
    shape = arguments.quick_shape(model, trust_remote_code=trust_remote_code)
    check_file(out)
    layers = shape.layers if shape else None
    chosen, title, _ = arguments.chosen_plan("--plan", plan, layers, storage, study, trial)
    arguments.check_layers(chosen, shape)
    goal = arguments.open_task(task, data, task_option)
    other = arguments.calibration_task(task, task_option, calibration_task, calibration_data)
    from moeopt.models import load
    from moeopt.report.terminal import consoles

    _, err = consoles()
    try:
        err.say(f"task {goal.name}: {goal.summary}")
        err.say(f"loading {model}; refitting {title}")
        loaded, tokenizer = load(model, device_map=device_map, dtype=dtype, trust_remote_code=trust_remote_code)
    except KeyboardInterrupt:
        raise opt.interrupted(err, FITTED_SO_FAR, ctx, storage) from None
    run_refit(
        ctx, storage, chosen, out, model, loaded, tokenizer, goal, rank=rank, calibration=other, limit=limit,
        dev_limit=dev_limit, score=score, batch_tokens=batch_tokens,
    )  # fmt: skip


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


def check_can(model: PreTrainedModel, tokenizer: Any, task: Task, limit: int | None) -> None:
    """Raise what a refit at the end of a search would, before the search."""
    from moeopt.methods import Calibration
    from moeopt.methods.refitting import check_refit

    check_refit(Calibration(model, tokenizer, task, limit=limit))


def run_refit(
    ctx: typer.Context,
    storage: str,
    plan: Plan,
    out: Path,
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    *,
    rank: int | None,
    limit: int | None,
    batch_tokens: int,
    calibration: Task | None = None,
    **judged: Any,
) -> None:
    """Refit a plan, write it to `out`, judge it on dev, and say what that gave and how to export it.

    Args:
        plan: what is refitted.
        out: the plan file.
        name: of the model, as it was given.
        rank, limit, batch_tokens: as for the command.
        calibration: what to fit to; None: the task.
        judged: options of `judged_refit`.
    """
    from moeopt.methods import Calibration
    from moeopt.methods import refit as fit
    from moeopt.report.selection import refit_lines
    from moeopt.report.terminal import Steps, consoles
    from moeopt.results.selection import judged_refit

    console, err = consoles()
    folder = out.with_name(f".{out.name}.layers")
    try:
        sequences = Calibration(model, tokenizer, calibration or task, limit=limit, batch_tokens=batch_tokens)
        with Steps(err) as progress:
            made = fit(plan, sequences, rank=rank, parts=folder, progress=progress)
        made.save(out)
        shutil.rmtree(folder, ignore_errors=True)
        with err.status("judging it on dev"):
            verdict = judged_refit(plan, made.plan, model, tokenizer, task, batch_tokens=batch_tokens, **judged)
    except KeyboardInterrupt:
        raise opt.interrupted(err, FITTED_SO_FAR, ctx, storage) from None
    if verdict is not None:  # for the model card of what is exported
        made.plan.save(out, about={**made.about, "judged": [*refit_lines(verdict)]})
    export = f"moeopt export {shlex.quote(name)} OUT_DIR --plan {shlex.quote(str(out))}"
    lines = [*made.lines(), f"{out} holds the refitted plan", *refit_lines(verdict), f"  {export}"]
    console.say("\n".join(lines))
