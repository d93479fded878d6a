"""`moeopt compare-methods`: arguments are checked and handed to `moeopt.results.method_comparison.compare`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, GOAL, NAMED, OUT

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt compare-methods ./mixtral --task boolq --data boolq.jsonl --keep 6,4,2 --limit 128 --test-limit 512\n\n"
    "moeopt compare-methods ./mixtral --task boolq --keep 4 --methods naee,reap --active 2,1 --skip "
    "--study boolq-8to4\n\n"
    "moeopt compare-methods ./mixtral --task boolq --keep 4 --calibration-task text --calibration-data wiki/\n\n"
    "Everything found is kept in --out at once: the same command again goes on after [bold]Ctrl-C[/bold], and computes "
    "nothing twice."
)

COMPARED, LOOKED_AT = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("What is compared", "What one-shot methods look at")
)


def compare_methods(
    ctx: typer.Context,
    model: opt.Model,
    task: opt.Task,
    keep: Annotated[str, COMPARED(metavar="R,R,...", help="Experts each layer keeps, such as 6,4,2.")],
    data: opt.Data = None,
    task_option: opt.TaskOption = None,
    limit: opt.Limit = None,
    score: opt.ScoreOption = "likelihood",
    test_limit: Annotated[
        int | None, GOAL(metavar="N", min=1, help="Use N dev and N test examples. Default: all.")
    ] = None,
    methods: Annotated[
        str | None,
        COMPARED(
            metavar="NAME,...", help="One-shot methods, such as naee,reap,m_smoe:aligned. Default: all there are."
        ),
    ] = None,
    active: Annotated[
        str | None, COMPARED(metavar="K,K,...", help="Experts active per token, such as 2,1. Default: the model's.")
    ] = None,
    skip: Annotated[
        bool, COMPARED("--skip", help="Also each plan with NAEE's dynamic skipping, its thresholds calibrated.")
    ] = False,
    refit: Annotated[
        bool, COMPARED("--refit", help="Also each plan with its down projections fitted to the full model.")
    ] = False,
    draws: Annotated[
        int, COMPARED(metavar="N", min=0, help="Random prunings; dev and test see the first 5 and the best.")
    ] = 20,
    seed: opt.Seed = 0,
    calibration_task: Annotated[
        str | None, LOOKED_AT(metavar="TASK", help="Another task, for task-agnostic methods. Default: the task itself.")
    ] = None,
    calibration_data: Annotated[
        str | None, LOOKED_AT(metavar="DATA", help="Its data, as --data; alone, other data of the same task.")
    ] = None,
    calibration_option: Annotated[
        list[str] | None, LOOKED_AT(metavar="NAME=VALUE", help="An option of it, as --task-option; repeatable.")
    ] = None,
    calibration_limit: Annotated[
        int | None, LOOKED_AT(metavar="N", min=1, help="Use N of its search examples. Default: as --limit.")
    ] = None,
    study: Annotated[str | None, NAMED(help="One of this model and task, whose best trials join the table.")] = None,
    storage: opt.Storage = DEFAULT_STORAGE,
    out: Annotated[Path, OUT(help="Folder for the table, the plans and all that is known.")] = Path("compare-out"),
    device_map: opt.DeviceMap = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    batch_tokens: opt.BatchTokens = 1024,
) -> None:
    """Compare one-shot methods with the full model, random prunings and a search, on examples that none has seen."""
    keeps = arguments.numbers("--keep", keep)
    actives = None if active is None else arguments.numbers("--active", active)
    names = None if methods is None else arguments.words("--methods", methods, "naee,reap")
    for option, given in {"--task-option": task_option, "--calibration-option": calibration_option}.items():
        arguments.pairs(option, given)
    from moeopt import report
    from moeopt.results import method_comparison as comparing

    comparing.check_methods(names)
    shape = arguments.quick_shape(model, trust_remote_code=trust_remote_code)
    if shape is not None:
        comparing.check(shape, keeps, actives)
    chosen = arguments.open_task(task, data, task_option)
    other = arguments.calibration_task(task, task_option, calibration_task, calibration_data, calibration_option)
    comparing.check_folder(out, {"task": chosen.describe(), "calibration": (other or chosen).describe()})
    opened = None
    if study is not None:
        from moeopt.study import check_study, read_study

        opened = read_study(study, storage)
        check_study(opened, chosen)
    from moeopt.models import check_checkpoint, load, load_tokenizer
    from moeopt.report.terminal import Steps, consoles

    if shape is None:
        comparing.check(check_checkpoint(model, trust_remote_code=trust_remote_code), keeps, actives)
    console, err = consoles()
    try:
        err.say(f"task {chosen.name}: {chosen.summary}")
        err.say(f"loading {model}")
        early = load_tokenizer(model, trust_remote_code=trust_remote_code)
        for looked_at in (chosen, other or chosen):
            looked_at.check(early)
        loaded, tokenizer = load(model, device_map=device_map, dtype=dtype, trust_remote_code=trust_remote_code)
        with Steps(err) as progress:
            compared = comparing.compare(
                loaded, tokenizer, chosen, keep=keeps, methods=names, active=actives, skipping=skip, refits=refit,
                draws=draws, calibration=other, limit=limit, test_limit=test_limit,
                calibration_limit=calibration_limit, study=opened, seed=seed, score=score, batch_tokens=batch_tokens,
                out=out, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise opt.interrupted(err, "all that was found is kept. To go on:", ctx, storage) from None
    report.save(compared, out)
    console.print(report.view(compared))
    console.say(f"\n{out} holds table.csv, table.json and the plans.")
