"""`moeopt export`: arguments are checked and handed to `moeopt.exporting`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, GOAL, HUB, STUDY
from moeopt.errors import ExportError
from moeopt.showing import line
from moeopt.trials.objectives import size_of

EXAMPLES = (
    "[bold]Examples[/bold]\n\nmoeopt export ./mixtral small/ --study boolq-8to4\n\n"
    "moeopt export ./mixtral small/ --plan pruned.safetensors\n\n"
    "moeopt export ./mixtral small/ --study boolq-8to4 --push-to-hub me/mixtral-boolq --private\n\n"
    "moeopt export ./mixtral small/ --study boolq-trade-off --fit 24GB --uniform --task boolq --for vllm\n\n"
    "moeopt export ./mixtral small/ --study boolq-8to4 --trial best --project stock --task boolq --data boolq.jsonl"
)


def export(
    ctx: typer.Context,
    model: opt.Model,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write, new or empty.")],
    plan: opt.PlanFile = None,
    study: opt.StudyName = None,
    trial: opt.Trial = "best-stock",
    storage: opt.Storage = DEFAULT_STORAGE,
    form: Annotated[
        Literal["auto", "stock", "custom"],
        typer.Option(
            help="stock: an ordinary checkpoint, or none. custom: one that brings its own model class, which "
            "trust_remote_code lets run. auto: stock where that can hold the plan."
        ),
    ] = "auto",
    project: Annotated[
        str | None,
        typer.Option(metavar="stock", help="Export the nearest plan that an ordinary checkpoint holds; needs --task."),
    ] = None,
    fit: Annotated[
        str | None,
        STUDY(metavar="SIZE", help="In place of --trial: what was selected, else the best on search, of at most 24GB."),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="Export the best plan of no more bytes that keeps the same number of experts in every layer, as some "
            "servers ask for; needs --study and --task.",
        ),
    ] = False,
    task: Annotated[str | None, GOAL(help="What to project on, or judge uniform plans on.")] = None,
    data: opt.Data = None,
    task_option: opt.TaskOption = None,
    limit: opt.Limit = None,
    dev_limit: opt.DevLimit = None,
    device_map: opt.DeviceMap = "auto",
    push_to_hub: Annotated[
        str | None,
        HUB(metavar="REPO", help="Then push it to this repository, as me/name; asked before, whether that may be."),
    ] = None,
    private: opt.Private = False,
    revision: opt.PushRevision = None,
    commit_message: opt.CommitMessage = None,
    base_model: Annotated[
        str | None, HUB(metavar="ID", help="Id of the full model, for the model card, where MODEL is a folder.")
    ] = None,
    serve_on: opt.ServeOn = None,
    serve_parallel: opt.ServeParallel = 1,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Write the smaller model as a checkpoint that needs nothing of moeopt to load.

    An ordinary one where it can hold the plan; otherwise one that brings its own model class and loads with
    trust_remote_code.
    """
    from moeopt.exporting import check_folder, chosen_form, locate
    from moeopt.spaces.serving import check_servers

    if project not in (None, "stock"):
        raise ExportError(f"--project must be stock, got {project!r}")
    if project is not None and (task is None or form == "custom"):
        raise ExportError("--project stock needs --task, and goes with --form stock or auto")
    if uniform and (task is None or study is None or form == "custom" or project is not None):
        raise ExportError("--uniform needs --study and --task, and goes with --form stock or auto, without --project")
    if project is None and task is not None and not uniform:
        raise ExportError("--task goes with --project stock or --uniform, which measure on it")
    if push_to_hub is None and (private or revision is not None or commit_message is not None):
        raise ExportError("--private, --revision and --commit-message go with --push-to-hub")
    if fit is not None and (study is None or trial != "best-stock"):
        raise ExportError("--fit chooses a trial of --study, in place of --trial")
    most = None if fit is None else size_of(fit)
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "serve_on": check_servers(serve_on or (), serve_parallel),
        "serve_parallel": serve_parallel,
        "base_model": base_model,
    }
    check_folder(out_dir)
    shape = arguments.quick_shape(model, trust_remote_code=trust_remote_code)
    chosen, title, opened = arguments.chosen_plan(
        "--plan", plan, shape.layers if shape else None, storage, study, trial, most
    )
    arguments.check_layers(chosen, shape)
    options["command"] = arguments.command_again(ctx.obj, storage)
    hub: dict[str, Any] = {"private": private, "revision": revision}
    if push_to_hub is not None:
        from moeopt.exporting import check_push

        push_to_hub = check_push(push_to_hub, **hub)
    from rich.text import Text

    from moeopt.report.terminal import consoles
    from moeopt.study import best_trial

    console, err = consoles()
    projection, uniform_about = None, None
    if uniform and opened is not None:
        from moeopt.models import load
        from moeopt.report.terminal import Steps
        from moeopt.results.front import uniform_of

        goal = arguments.open_task(str(task), data, task_option, split="dev")
        loaded, tokenizer = load(model, device_map=device_map, trust_remote_code=trust_remote_code)
        with Steps(err) as progress:
            made = uniform_of(
                *opened, loaded, tokenizer, goal, fit=most, dev_limit=dev_limit, serve_on=options["serve_on"],
                serve_parallel=serve_parallel, progress=progress,
            )  # fmt: skip
        console.say("\n".join(made.lines))
        chosen, title = made.plan, f"{made.name}, in place of {title}"
        uniform_about = {"uniform": made.lines}
    if project is not None:
        from moeopt.exporting import project as nearest_stock
        from moeopt.models import load

        goal = arguments.open_task(str(task), data, task_option)
        with err.status("projecting"):
            loaded, tokenizer = load(model, device_map=device_map, trust_remote_code=trust_remote_code)
            chosen, projection = nearest_stock(chosen, loaded, tokenizer, goal, limit=limit)
        console.say("\n".join(projection.lines()))
    try:
        taken, reason = chosen_form(chosen, locate(model), form)
    except ExportError as error:
        hint = "; --trial best-stock takes the best trial that one can hold" if form == "stock" and study else ""
        raise ExportError(f"{error}{hint}") from None
    from moeopt.exporting import export as write  # it loads torch, which nothing that was checked so far needs

    with err.status(Text(f"writing {out_dir}")), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if opened is None or projection is not None or uniform_about is not None:
            from moeopt.plan import Plan

            about = Plan.about(plan) if plan is not None and plan.suffix == ".safetensors" else uniform_about
            write(chosen, out_dir, model=model, form=form, about=about, projection=projection, **options)
        else:
            write(opened[1], out_dir, model=model, study=opened[0], form=form, **options)
    for warning in said:  # what was left out
        err.say(line(str(warning.message), 2000))
    best = best_trial(opened[0]) if opened is not None and len(opened[0].directions) == 1 else None
    if opened is not None and best is not None and best.number != opened[1].number:
        title += f"; the best of all is trial {best.number} ({arguments.values_told(opened[0], best)})"
    size = sum(file.stat().st_size for file in out_dir.glob("*.safetensors") if file.name != "plan.safetensors") / 2**20
    console.say(f"{out_dir}: {size:.1f} MiB of weights, {title}")
    console.say(
        "stock form: any loader of the original reads it"
        if taken == "stock"
        else f"custom form, which loads with trust_remote_code=True: {reason}"
    )
    if push_to_hub is not None:
        from moeopt.exporting import push

        with err.status(Text(f"pushing it to {push_to_hub}")):
            place = push(out_dir, push_to_hub, commit_message=commit_message, **hub)
        console.say(f"pushed: {place}")
