"""`moeopt select`: arguments are checked and handed to `moeopt.select`."""

from __future__ import annotations

import shlex
import warnings
from typing import Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, GOAL, NAMED
from moeopt.cli.refit import check_can, check_file, run_refit
from moeopt.results.selection.checks import MOST, TOP
from moeopt.trials.objectives import size_of

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt select ./mixtral --study boolq-8to4 --task boolq --data boolq.jsonl\n\n"
    "moeopt select ./mixtral --study boolq-8to4 --task boolq --top 50 --dev-limit 500 --stock\n\n"
    "moeopt select ./mixtral --study boolq-trade-off --task boolq --fit 24GB\n\n"
    "moeopt select ./mixtral --study boolq-trade-off --task boolq --loss-within 0.01\n\n"
    "moeopt export ./mixtral small/ --study boolq-8to4 --trial selected\n\n"
    "Every evaluation is kept in the study at once: the same command again goes on after [bold]Ctrl-C[/bold], and runs "
    "nothing twice."
)


def select(
    ctx: typer.Context,
    model: opt.Model,
    task: opt.Task,
    study: Annotated[str, NAMED(help="A study of this model and task.")],
    data: opt.Data = None,
    task_option: opt.TaskOption = None,
    top: Annotated[
        int, GOAL(metavar="N", min=1, max=MOST, help="Judge so many of the best distinct plans on dev.")
    ] = TOP,
    dev_limit: opt.DevLimit = None,
    test_limit: Annotated[int | None, GOAL(metavar="N", min=1, help="Use N test examples. Default: all.")] = None,
    score: Annotated[
        opt.Score | None, GOAL(help="What the plan is chosen by on dev. Default: what the study minimised.")
    ] = None,
    health: Annotated[
        bool, GOAL(help="Whether to hold the winner's generated answers to 32 dev prompts against the full model's.")
    ] = True,
    refit: opt.RefitFile = None,
    refit_rank: opt.RefitRank = None,
    fit: Annotated[
        str | None, GOAL(metavar="SIZE", help="Only plans whose checkpoint has at most so many bytes, such as 24GB.")
    ] = None,
    loss_within: Annotated[
        float | None,
        GOAL(metavar="LOSS", min=0, help="The smallest plan that surely costs no more than this on dev."),
    ] = None,
    stock: Annotated[bool, GOAL("--stock", help="Only plans that an ordinary checkpoint can hold.")] = False,
    storage: opt.Storage = DEFAULT_STORAGE,
    device_map: opt.DeviceMap = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    batch_tokens: opt.BatchTokens = 1024,
) -> None:
    """Judge a study's best plans on dev, and the winner once on test: does what the search gained hold there?"""
    from moeopt import tasks

    task_options = arguments.pairs("--task-option", task_option)
    most = None if fit is None else size_of(fit)
    arguments.quick_shape(model, trust_remote_code=trust_remote_code)
    chosen = tasks.get(task, data=data, **task_options)
    if refit is not None:
        check_file(refit)
    from moeopt.study import read_study
    from moeopt.trials.description import described as stored

    opened = read_study(study, storage)
    from moeopt import report
    from moeopt.results import selection

    selection.check(opened, chosen)
    selection.check_goal(opened, most, loss_within)
    from moeopt.models import load
    from moeopt.report.terminal import Steps, consoles

    console, err = consoles()
    try:
        err.say(f"task {chosen.name}: {chosen.summary}")
        err.say(f"loading {model}")
        loaded, tokenizer = load(model, device_map=device_map, dtype=dtype, trust_remote_code=trust_remote_code)
        limit = stored(opened)["task"].get("limit")
        if refit is not None:
            check_can(loaded, tokenizer, chosen, limit)
        with Steps(err) as progress, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The test split has now")  # the record says so too
            selected = selection.select(
                opened, loaded, tokenizer, chosen, top=top, dev_limit=dev_limit, test_limit=test_limit, score=score,
                stock_only=stock, fit=most, loss_within=loss_within, batch_tokens=batch_tokens, health=health,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise opt.interrupted(err, "every plan that was judged is kept. To go on:", ctx, storage) from None
    if not selected.evaluated:
        console.print("All of it was on record; nothing was evaluated.")
    console.print(report.view(selected))
    place = shlex.join([*arguments.storage_again(storage), "--study", study])
    if selected.good:
        console.say(f"  moeopt export {shlex.quote(model)} OUT_DIR {place} --trial selected")
    elif selected.health is not None and selected.health["verdict"] == "broken":
        console.say(
            f"  moeopt health {shlex.quote(model)} {place} --trial selected --task {shlex.quote(task)}  # answers"
        )
    if refit is not None:
        run_refit(
            ctx, storage, selected.winner.plan, refit, model, loaded, tokenizer, chosen, rank=refit_rank, limit=limit,
            dev_limit=dev_limit, score=selected.settings["score"], batch_tokens=batch_tokens,
        )  # fmt: skip
