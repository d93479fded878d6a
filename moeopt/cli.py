"""The command line: arguments are checked and handed to the library; every expected error is one line and exit code 2.

Nothing heavy is imported before the arguments that can be judged without it are judged.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from moeopt import (
    __version__,
    arguments,
    cli_benchmark,
    cli_compare,
    cli_dashboard,
    cli_export,
    cli_lm_eval,
    cli_profile,
    cli_select,
    cli_verify,
    cli_worker,
)
from moeopt.errors import MoeoptError, PlanError
from moeopt.options import (
    DEFAULT_STORAGE,
    GOAL,
    INTERRUPTED,
    MACHINE,
    STUDY,
    TRIAL,
    BatchTokens,
    Data,
    DeviceMap,
    Dtype,
    Limit,
    Model,
    Score,
    Storage,
    Task,
    TaskOption,
)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Make a Mixture-of-Experts language model smaller and faster for one task, without gradients: search which "
    "experts to prune and merge, keep every trial in an SQL study, export the best as an ordinary checkpoint.",
    epilog="[bold]moeopt demo[/bold] shows the whole way on a small model that comes with it, in two minutes.",
)

SPACE, OPTIMISER, STOP = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("What may vary", "Optimiser", "When to stop")
)
StudyName = Annotated[str | None, STUDY("--study", metavar="NAME", help="The study's name in the storage.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 2 for whatever the user can put right, said in one line on stderr; 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(app(given or ["--help"], prog_name="moeopt", standalone_mode=False, obj=given) or 0)
    except typer.TyperException as error:
        message = error.format_message()
        reasons = getattr(error.__cause__, "errors", None)  # pydantic's, which do not name the value
        if reasons is not None:
            message += f", got {reasons()[0]['input']!r}"
    except MoeoptError as error:
        message = str(error)
    from moeopt.console import consoles
    from moeopt.showing import line

    consoles()[1].print(f"Error: {line(message, 4000)}", style="red", markup=False, soft_wrap=True)
    return 2


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moeopt {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What every command shares."""


@app.command()
def demo(
    skill: Annotated[str | None, typer.Option(help="Which skill of the demo model to search for.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials of the search; fewer are faster and worse.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the study, the exported model and the table.")] = Path(
        "demo-out"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search.")] = 0,
    svg: Annotated[Path | None, typer.Option(hidden=True, help="Also write the table as a picture.")] = None,
) -> None:
    """Search, compare, export and reload on the small Mixtral that comes with moeopt, in about two minutes.

    An EEP search keeps 4 of its 8 experts for one skill; a table on held-out examples sets the result against the full
    model and 20 random prunings. A second run goes on where the first one stopped.
    """
    from moeopt.console import consoles
    from moeopt.demo import DEFAULT_SKILL, SKILLS
    from moeopt.errors import TaskError, nearest

    skill = skill or DEFAULT_SKILL
    if skill not in SKILLS:
        raise TaskError(f"unknown demo skill {skill!r}{nearest(skill, list(SKILLS))} (there are {', '.join(SKILLS)})")
    from moeopt.demo.run import TRIALS, run

    run(out, skill=skill, trials=trials or TRIALS, seed=seed, console=consoles()[0], svg=svg)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "moeopt search ./mixtral --task boolq --data boolq.jsonl --keep 4 --groups 4 --study boolq-8to4\n\n"
    "moeopt search ./mixtral --task text --data src/ --task-option suffixes=.py --keep 6 --space prune "
    "--sampler cmaes --study code-8to6\n\n"
    "moeopt search ./mixtral --task text --data prompts.jsonl --task-option column=prompt --score kl --keep 6 "
    "--study unlabelled\n\n"
    "moeopt search ./mixtral --task boolq --space merge --around pruned.safetensors --study boolq-merge\n\n"
    "The same command again resumes the study. [bold]Ctrl-C[/bold] lets the running trial finish; a second one does "
    "not, and the trial is run again on resuming."
)
def search(
    ctx: typer.Context,
    model: Model,
    task: Task,
    study: Annotated[str, STUDY(metavar="NAME", help="Name of the study to start or to resume.")],
    data: Data = None,
    task_option: TaskOption = None,
    limit: Limit = None,
    score: Score = "likelihood",
    keep: Annotated[int | None, SPACE(metavar="R", min=1, help="Experts each layer keeps.")] = None,
    active: Annotated[
        str | None,
        SPACE(metavar="K|LOW-HIGH", help="Experts active per token; a range as 1-2 is searched. Default: the model's."),
    ] = None,
    skip: Annotated[
        float | None,
        SPACE(metavar="BETA", help="Search dynamic skipping of experts of little weight, with betas from 0 to this."),
    ] = None,
    active_groups: Annotated[
        str | None, SPACE(help="As --groups, for what --active and --skip search; 1: the same for all layers.")
    ] = None,
    groups: Annotated[
        str | None,
        SPACE(help="Layers that share one choice: a number of groups, or ranges as 0-7,8-31. Default: none share."),
    ] = None,
    space: Annotated[
        Literal["eep", "prune", "merge", "active"],
        SPACE(
            help="prune: which experts stay. merge: matrices around a plan. eep: first the one, then the other. "
            "active: how many experts are active, of the full model or of a plan, and nothing else."
        ),
    ] = "eep",
    router: Annotated[
        Literal["prob", "logit"] | None,
        SPACE(
            help="Merged routers act on probabilities, as in EEP, or on logits, which an ordinary checkpoint can "
            "hold. Default: prob."
        ),
    ] = None,
    encoding: Annotated[
        Literal["scores", "rows", "subset"] | None,
        SPACE(help="Numbers of a prune space: one per expert, expert indices, a subset's index. Default: scores."),
    ] = None,
    around: Annotated[
        Path | None, SPACE(metavar="PLAN", help="Plan file (or EEP .pth) that a merge or active space starts from.")
    ] = None,
    scale: Annotated[float | None, SPACE(metavar="X", help="Step of a merge space. Default: 0.065.")] = None,
    active_weight: Annotated[
        float, GOAL(metavar="X", min=0, help="Loss that an active expert, per token and layer, must be worth.")
    ] = 0.0,
    warm_start: Annotated[
        list[str] | None,
        SPACE(metavar="NAMES|PLAN", help="Try first: one-shot methods, as naee,reap, or a plan file; repeatable."),
    ] = None,
    sampler: Annotated[
        str, OPTIMISER(metavar="NAME", help="eep, local, cmaes, blockcmaes, tpe, random, or nevergrad:DE and so on.")
    ] = "eep",
    sampler_option: Annotated[
        list[str] | None, OPTIMISER(metavar="NAME=VALUE", help="A hyperparameter, such as prune_until=40; repeatable.")
    ] = None,
    seed: Annotated[int, OPTIMISER(metavar="N", min=0, help="Seed of the optimiser.")] = 0,
    trials: Annotated[
        int, STOP(metavar="N", min=1, help="Finished trials the study shall hold, earlier runs included.")
    ] = 400,
    timeout: Annotated[float | None, STOP(metavar="S", min=0, help="Seconds after which no trial starts.")] = None,
    patience: Annotated[int | None, STOP(metavar="N", min=1, help="Stop after N trials without a better one.")] = None,
    rungs: Annotated[
        int,
        STOP(
            metavar="N", min=1,
            help="Race: a trial is held against the best one after a half, a quarter, ... of the examples, N - 1 "
            "times, and stopped when it is surely worse. Worth it from some 64 examples on.",
        ),
    ] = 1,
    storage: Storage = DEFAULT_STORAGE,
    resume: Annotated[bool, STUDY(help="Whether to go on with a study that has this name already.")] = True,
    device_map: DeviceMap = "auto",
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = 1024,
    prefix_memory: Annotated[
        int | None,
        MACHINE(metavar="MIB", min=0, help="Memory for hidden states of earlier plans, which spare passes. [1024]"),
    ] = None,
    workers: Annotated[
        int, MACHINE(metavar="N", min=1, help="Processes on this machine that search together, this one included.")
    ] = 1,
) -> None:  # fmt: skip
    """Start or resume a search: every trial prunes or merges the model's experts and scores it on the task."""
    task_options = arguments.pairs("--task-option", task_option)
    sampler_options = arguments.pairs("--sampler-option", sampler_option)
    ranges = arguments.groups(groups)
    chosen_active = arguments.active(active, skip, arguments.groups(active_groups, "--active-groups"))
    arguments.check_belongs(
        space, keep=keep, active=chosen_active.k, encoding=encoding, router=router, around=around, scale=scale,
        groups=groups, searched=chosen_active.searched,
    )  # fmt: skip
    if workers > 1:
        arguments.check_shared(storage)
    from moeopt import samplers, tasks
    from moeopt.plan import ModelShape
    from moeopt.spaces import PruneSpace

    shape = arguments.quick_shape(model)
    if shape is not None:
        arguments.space(space, shape, keep, ranges, around, scale, encoding, router, chosen_active)
    chosen_task = tasks.get(task, data=data, **task_options)
    chosen_task.examples("search")
    if shape is None:  # its config takes transformers, and perhaps a download: first what can be judged without
        samplers.get(sampler, PruneSpace(ModelShape(1, 2, 1), keep=1), seed=seed, **sampler_options)
        from moeopt.models import check_checkpoint

        shape = check_checkpoint(model)
    chosen_space = arguments.space(space, shape, keep, ranges, around, scale, encoding, router, chosen_active)
    starts = arguments.warm_starts(warm_start or (), shape.layers, chosen_space)
    chosen_sampler = samplers.get(sampler, chosen_space, seed=seed, **sampler_options)
    described = {
        "task": {**chosen_task.describe(), "split": "search", "limit": limit, "max_length": None},
        "space": chosen_space.describe(),
        "sampler": chosen_sampler.settings(),
    }
    resumed = arguments.existing(storage, study, described, resume=resume) is not None

    import optuna

    from moeopt import fleet, recipe
    from moeopt.console import SearchProgress, best_trial, consoles
    from moeopt.study import COMMAND, create_study, finished, optimize, stalled

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # no traceback of a trial that Ctrl-C ended
    out, err = consoles()
    try:
        err.print(f"loading {model}", markup=False)
        from moeopt.models import load, load_tokenizer
        from moeopt.objective import Objective

        chosen_task.check(load_tokenizer(model))
        shares = fleet.shared(workers, device_map) if workers > 1 else [{}]
        fleet.take(shares[0])
        loaded, tokenizer = load(model, device_map=device_map, dtype=dtype)
        objective = Objective(
            loaded, tokenizer, chosen_task, chosen_space, limit=limit, batch_tokens=batch_tokens, rungs=rungs,
            active_weight=active_weight, prefix_memory=None if prefix_memory is None else prefix_memory << 20,
            score=score,
        )  # fmt: skip
        record = create_study(
            study,
            objective=objective,
            storage=storage,
            sampler=chosen_sampler,
            pruner="racing" if rungs > 1 else None,
            load_if_exists=resume,
            warm_starts=starts,
        )
        if COMMAND not in record.user_attrs:
            record.set_user_attr(COMMAND, arguments.command_again(ctx.obj, storage))
        if resumed:
            err.print(f"resuming study {study!r}: {finished(record)} of {trials} trials done", markup=False)
        if "merge" in chosen_space.phases and chosen_space.router == "prob":
            err.print("merged routers map probabilities: only prunings export to an ordinary checkpoint (see --router)")
        started = time.monotonic()
        recipe.want(record, trials, patience)
        again = ["--study", study, "--model", model, "--device-map", device_map]
        if workers > 1 and recipe.read(record).task is None:
            again += ["--task", task, *(["--data", data] if data is not None else [])]
            again += [word for option in task_option or () for word in ("--task-option", option)]
        with (
            SearchProgress(err, trials, timeout) as progress,
            fleet.Fleet(shares[1:], again, storage, progress.say),
        ):
            optimize(record, objective, trials=trials, timeout=timeout, patience=patience, callbacks=[progress])
        teacher = objective.evaluator.teacher
        if teacher is not None and teacher.nbytes:
            err.print(f"full model: {teacher}", markup=False)
        ended = (
            finished(record) >= trials
            or (timeout is not None and time.monotonic() - started >= timeout)
            or (patience is not None and stalled(record) >= patience)
        )
    except KeyboardInterrupt:
        ended = False
    if not ended:
        err.print("Interrupted; every finished trial is stored. To resume:")
        err.print(f"  {arguments.command_again(ctx.obj, storage)}", markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    best = best_trial(record)
    if best is None:
        out.print(f"{finished(record)} trials done, and none gave a finite loss", markup=False)
        return
    accuracy = best.user_attrs.get("accuracy")
    weighed = active_weight * best.user_attrs.get("active", 0.0)
    scored = f"loss {best.value - weighed:.4f}"
    if accuracy is not None:
        scored += f", {'agreement' if score in ('kl', 'acceptance') else 'accuracy'} {100 * accuracy:.1f}%"
    if chosen_active.searched:
        scored += f", {best.user_attrs['active']:.2f} experts active"
    place = shlex.join(arguments.storage_again(storage))
    out.print(
        f"{finished(record)} trials done. Best: trial {best.number}, {scored} on the search split\n"
        f"  moeopt show {shlex.quote(study)} {place}\n"
        f"  moeopt export {shlex.quote(model)} OUT_DIR {place} --study {shlex.quote(study)}",
        markup=False,
        soft_wrap=True,
    )


@app.command(
    epilog="[bold]Examples[/bold]\n\nmoeopt show --storage sqlite:///moeopt.db\n\nmoeopt show boolq-8to4 --json"
)
def show(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="A study; without it, all are listed.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the studies of a storage, or show one: what it searches, its best trials and the best plan."""
    from moeopt import study as room
    from moeopt.console import consoles, json_text, layer_rows, studies_table, study_record, study_summary, study_view
    from moeopt.description import reading
    from moeopt.storage import hidden, open_storage, readable_errors, study_names

    out, _ = consoles()
    if study is None:
        import optuna

        opened = open_storage(storage, create=False)
        records = []
        with readable_errors(storage), reading("in the storage"):
            for name in study_names(opened):
                try:
                    with reading(name):
                        found = optuna.load_study(study_name=name, storage=opened)
                except MoeoptError as error:
                    records.append({"name": name, "unreadable": str(error)})
                else:
                    records.append(study_summary(found))
        if as_json:
            print(json_text(records))
        else:
            out.print(studies_table(records, f"studies in {hidden(storage)}"))
        return
    opened_study = room.load_study(study, storage)
    with readable_errors(storage):
        record = study_record(opened_study)
    plan = None if record["best"] is None else arguments.plan_of(opened_study, "best")[1]
    if as_json:
        print(json_text(record | {"best_plan": None if plan is None else list(layer_rows(plan))}))
    else:
        out.print(study_view(record, plan))


@app.command(
    epilog="[bold]Examples[/bold]\n\nmoeopt plan pruned.safetensors\n\n"
    "moeopt plan squad_budget_4.pth --layers 32 --out squad.safetensors\n\nmoeopt plan --study boolq-8to4 --trial 57"
)
def plan(
    source: Annotated[
        Path | None, typer.Argument(metavar="[SOURCE]", help="Plan file of moeopt, or an EEP .pth.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="MoE layers of the model an EEP .pth is for.")] = None,
    study: StudyName = None,
    trial: Annotated[str, typer.Option(help=f"{TRIAL}.")] = "best",
    storage: Storage = DEFAULT_STORAGE,
    out: Annotated[Path | None, typer.Option(help="Save the plan to this file.")] = None,
) -> None:
    """Show a plan layer by layer, and whether an ordinary checkpoint can hold it; read it from a file or a study."""
    shown, title, _ = arguments.chosen_plan("SOURCE", source, layers, storage, study, trial)
    if out is not None:
        try:
            shown.save(out)
        except OSError as error:
            raise PlanError(f"cannot write {str(out)!r}: {error.strerror or error}") from None
    from moeopt.console import consoles, plan_table
    from moeopt.exporting import why_not_stock

    console, _ = consoles()
    console.print(plan_table(shown, title))
    reason = why_not_stock(shown)
    console.print(
        "An ordinary checkpoint can hold this plan."
        if reason is None
        else f"No ordinary checkpoint holds it, a custom one does: {reason}",
        markup=False,
        soft_wrap=True,
    )
    if out is not None:
        console.print(f"saved to {out}", markup=False, soft_wrap=True)


cli_benchmark.register(app)
cli_compare.register(app)
cli_dashboard.register(app)
cli_export.register(app)
cli_lm_eval.register(app)
cli_profile.register(app)
cli_select.register(app)
cli_verify.register(app)
cli_worker.register(app)

if __name__ == "__main__":
    sys.exit(main())
