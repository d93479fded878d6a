"""`moeopt search`: arguments are checked and handed to `moeopt.create_study` and `moeopt.optimize`."""

from __future__ import annotations

import re
import shlex
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, GOAL, MACHINE, NAMED, STUDY, with_options
from moeopt.cli.refit import check_can, check_file, run_refit
from moeopt.cli.spaces import SPACE, SpaceOptions, order_of
from moeopt.trials.objectives import LOSS, check_constraints, check_names

if TYPE_CHECKING:
    import optuna

    from moeopt.study.objective import Objective

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt search ./mixtral --task boolq --data boolq.jsonl --keep 4 --groups 4 --study boolq-8to4\n\n"
    "moeopt search ./mixtral --task text --data src/ --task-option suffixes=.py --keep 6 --space prune "
    "--sampler cmaes --study code-8to6\n\n"
    "moeopt search ./mixtral --task text --data prompts.jsonl --task-option column=prompt --score kl --keep 6 "
    "--study unlabelled\n\n"
    "moeopt search ./mixtral --task boolq --space merge --around pruned.safetensors --study boolq-merge\n\n"
    "The same command again resumes the study. [bold]Ctrl-C[/bold] lets the running trial finish; a second one does "
    "not, and the trial is run again on resuming."
)

RACED = ("guided", "local")
"""Samplers whose trials race by default."""
OPTIMISER, STOP = (partial(typer.Option, rich_help_panel=panel) for panel in ("Optimiser", "When to stop"))


@with_options
def search(
    ctx: typer.Context,
    model: opt.Model,
    task: opt.Task,
    study: Annotated[str, NAMED(help="Name of the study to start or to resume.")],
    space: SpaceOptions,
    data: opt.Data = None,
    task_option: opt.TaskOption = None,
    limit: opt.Limit = None,
    score: opt.ScoreOption = "likelihood",
    active_weight: Annotated[
        float, GOAL(metavar="X", min=0, help="Loss that an active expert, per token and layer, must be worth.")
    ] = 0.0,
    objectives: Annotated[
        str,
        GOAL(
            "--objectives", metavar="NAMES",
            help="What is optimised, as loss,bytes: loss, metric, bytes, active, latency; of a mixture worst, "
            "loss:NAME and metric:NAME. Of several the front is searched (moeopt front).",
        ),
    ] = LOSS,
    constraint: Annotated[
        list[str] | None,
        GOAL(metavar="BOUND", help="A bound of any of these, as 'bytes <= 24GB' or 'metric >= 0.8'; repeatable."),
    ] = None,
    guard: opt.GuardTasks = None,
    guard_loss: opt.GuardLoss = 0.02,
    warm_start: Annotated[
        list[str] | None,
        SPACE(
            metavar="NAMES|PLAN",
            help="Try first: one-shot methods, as naee,reap, or a plan file; repeatable. Default: auto, which is "
            "naee,loss_aware where experts are pruned (beyond 64 of them loss_aware); none: EEP as published.",
        ),
    ] = None,
    sampler: Annotated[
        str,
        OPTIMISER(
            metavar="NAME",
            help="eep, guided, local, cmaes, blockcmaes, tpe, gp, nsgaii, random, nevergrad:DE and so on. Default: "
            "eep; of several objectives nsgaii.",
        ),
    ] = "",
    sampler_option: Annotated[
        list[str] | None, OPTIMISER(metavar="NAME=VALUE", help="A hyperparameter, such as prune_until=40; repeatable.")
    ] = None,
    seed: opt.Seed = 0,
    guide: Annotated[
        float | None,
        OPTIMISER(
            metavar="SHARE", min=0, max=1,
            help="Largest share of layer-tokens that guides may take: derivatives of the loss, which guided reads. "
            "Default: 0.3 with guided, else 0.",
        ),
    ] = None,
    trials: Annotated[
        int,
        STOP(
            "--trials", "--n-trials", metavar="N", min=1,
            help="Finished trials the study shall hold, earlier runs included.",
        ),
    ] = 400,
    timeout: opt.Timeout = None,
    patience: Annotated[int | None, STOP(metavar="N", min=1, help="Stop after N trials without a better one.")] = None,
    rungs: Annotated[
        int | None,
        STOP(
            metavar="N", min=1,
            help="Race: a trial is held against the best one after a half, a quarter, ... of the examples, N - 1 "
            "times, and stopped when it is surely worse. Worth it from some 64 examples on. Default: 4 with guided and "
            "local, else 1.",
        ),
    ] = None,
    reference: Annotated[bool, STUDY(help="Whether to score the full model first, for one evaluation.")] = True,
    held: Annotated[
        bool, STUDY(help="Whether to score the best trial and the best start on dev at the end, for two evaluations.")
    ] = True,
    track: Annotated[
        list[str] | None,
        STUDY(
            metavar="NAME[=PLACE]",
            help="Send every trial to mlflow (a tracking URI), wandb or tensorboard (folders); repeatable, or as "
            "mlflow,wandb. Default places: what their environment variables say.",
        ),
    ] = None,
    refit: opt.RefitFile = None,
    refit_rank: opt.RefitRank = None,
    serve_on: opt.ServeOn = None,
    serve_parallel: opt.ServeParallel = 1,
    storage: opt.Storage = DEFAULT_STORAGE,
    resume: Annotated[bool, STUDY(help="Whether to go on with a study that has this name already.")] = True,
    device_map: opt.DeviceMap = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    batch_tokens: opt.FoundBatchTokens = None,
    prefix_memory: Annotated[
        int | None,
        MACHINE(metavar="MIB", min=0, help="Memory for hidden states of earlier plans, which spare passes. [1024]"),
    ] = None,
    workers: Annotated[
        int, MACHINE(metavar="N", min=1, help="Processes on this machine that search together, this one included.")
    ] = 1,
) -> None:  # fmt: skip
    """Start or resume a search: every trial prunes or merges the model's experts and scores it on the task."""
    from moeopt.study import check_name

    check_name(study)
    if refit is not None:
        check_file(refit)
    arguments.check_outlives(storage, workers)
    arguments.pairs("--task-option", task_option)
    sampler_options = arguments.pairs("--sampler-option", sampler_option)
    goals = check_names([name.strip() for name in objectives.split(",")])
    constraints = [str(each) for each in check_constraints(constraint or [])]
    sampler = sampler or ("eep" if len(goals) == 1 else "nsgaii")
    from moeopt import samplers
    from moeopt.plan import ModelShape
    from moeopt.samplers.eep import PUBLISHED, PUBLISHED_TRIALS
    from moeopt.samplers.guided import GUIDED, SHARE
    from moeopt.samplers.local import RUNGS
    from moeopt.spaces import PruneSpace, space_of
    from moeopt.spaces.serving import check_servers, demands

    tracked = None
    if track:  # refused before data is read; without any, mistakes are told before torch is imported
        from moeopt.study import tracking

        tracked = tracking.Tracking(*(name.strip() for names in track for name in names.split(",")))
    servers = check_servers(serve_on or (), serve_parallel)
    trust = " --trust-remote-code" if trust_remote_code else ""

    # Names before data, which may be read from a hub, and data before a config that takes transformers or a download.
    shape = arguments.quick_shape(model, trust_remote_code=trust_remote_code)
    if shape is not None:
        chosen_space = space.space(shape)
        starts = arguments.warm_starts(warm_start or ["auto"], shape.layers, chosen_space)
    any_space = PruneSpace(ModelShape(1, 2, 1), keep=1) if shape is None else chosen_space
    samplers.get(sampler, any_space, seed=seed, **sampler_options).check_objectives(len(goals))
    chosen_task = arguments.open_task(task, data, task_option)
    guards = arguments.guards(guard, guard_loss)
    if shape is None:
        from moeopt.models import check_checkpoint

        shape = check_checkpoint(model, trust_remote_code=trust_remote_code)
        chosen_space = space.space(shape)
        starts = arguments.warm_starts(warm_start or ["auto"], shape.layers, chosen_space)
    resumed = arguments.existing(storage, study, resume=resume)
    stored = arguments.stored_description(resumed)
    evaluated = stored.get("evaluation", {})
    if resumed is not None and space.order is not None:
        chosen_space = space.space(shape, order_of(space_of(resumed)))
    if rungs is None:
        raced = sampler in RACED and set(goals) <= {LOSS, "bytes"}
        rungs = len(evaluated["rungs"]) if evaluated else RUNGS if raced else 1
    if guide is None:
        guide = evaluated.get("guide", 0.0) if evaluated else SHARE if sampler == GUIDED and score != "metric" else 0.0
    fitted = arguments.for_trials(sampler, sampler_options, trials, stored)
    chosen_sampler = samplers.get(sampler, chosen_space, seed=seed, **fitted)
    described = {
        "task": {**chosen_task.describe(), "split": "search", "limit": limit, "max_length": None},
        "space": chosen_space.describe(),
        "sampler": chosen_sampler.settings(),
    }

    import optuna

    from moeopt.report.terminal import SearchProgress, consoles, needs_table
    from moeopt.study import (
        COMMAND,
        Tracking,
        automatic,
        best_trial,
        check_same,
        create_study,
        finished,
        needs_of,
        optimize,
        recipe,
        serving_demands,
        stalled,
    )
    from moeopt.study.workers import fleet

    if resumed is not None:
        check_same(resumed, {**stored, **described})

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # no traceback of a trial that Ctrl-C ended
    out, err = consoles()
    if resumed is None and sampler == "eep" and trials < PUBLISHED_TRIALS and fitted != sampler_options:
        sizes = ", ".join(f"{name}={fitted[name]}" for name in PUBLISHED)
        published = ", ".join(f"{name}={value}" for name, value in PUBLISHED.items())
        err.say(
            f"EEP in {trials} trials: {sizes}, in proportion to {published} as published for {PUBLISHED_TRIALS}; "
            "--sampler-option sets others",
        )  # fmt: skip
    asked = [*map(str, demands(chosen_space, servers, serve_parallel, arguments.checkpoint_config(model)))]
    for demand in asked:
        err.say(f"Warning: {demand}", style="yellow")
    missing = chosen_sampler.shortfall(trials)
    if missing is not None:
        err.say(missing)
    try:
        err.say(f"task {chosen_task.name}: {chosen_task.summary}")
        err.say(f"loading {model}")
        from moeopt.evaluation.throughput import BATCH_TOKENS
        from moeopt.methods import Calibration, ranking
        from moeopt.models import load, load_tokenizer
        from moeopt.showing import line
        from moeopt.study.guards import changes
        from moeopt.study.objective import Objective
        from moeopt.study.reference import MOST_SHOWN, first_prompt, read

        chosen_task.check(load_tokenizer(model, trust_remote_code=trust_remote_code))
        shares = fleet.shared(workers, device_map) if workers > 1 else [{}]
        fleet.take(shares[0])
        loaded, tokenizer = load(model, device_map=device_map, dtype=dtype, trust_remote_code=trust_remote_code)
        if refit is not None:
            check_can(loaded, tokenizer, chosen_task, limit)
        if space.order is not None and resumed is None:
            with err.status(f"ranking experts by {space.order}"):
                calibration = Calibration(loaded, tokenizer, chosen_task, split="search", limit=limit, score=score)
                chosen_space = space.space(shape, ranking(space.order, calibration))
            chosen_sampler = samplers.get(sampler, chosen_space, seed=seed, **fitted)
        if batch_tokens is None and resumed is not None:
            kept_recipe = recipe.stored(resumed)
            batch_tokens = (kept_recipe.objective.get("batch_tokens") if kept_recipe else None) or BATCH_TOKENS
        objective = Objective(
            loaded, tokenizer, chosen_task, chosen_space, limit=limit, batch_tokens=batch_tokens, rungs=rungs,
            active_weight=active_weight, prefix_memory=None if prefix_memory is None else prefix_memory << 20,
            score=score, reference=reference, guide=guide, guards=guards, objectives=goals, constraints=constraints,
        )  # fmt: skip
        if starts == "auto" and resumed is None and (names := automatic(chosen_space)):
            err.say(f"starting from {' and '.join(names)}; --warm-start chooses others, or none")
        if resumed is None:
            by_name = automatic(chosen_space) if starts == "auto" else [s for s in starts if isinstance(s, str)]
            err.print(needs_table(needs_of(objective, n_trials=trials, warm_starts=by_name, storage=storage)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"(vllm|sglang|llama\.cpp)[:,] ")  # they are said above or below
            record = create_study(
                study,
                objective=objective,
                storage=storage,
                sampler=chosen_sampler,
                pruner="racing" if rungs > 1 else None,
                load_if_exists=resume,
                warm_starts=starts,
                serve_on=servers,
                serve_parallel=serve_parallel,
            )
        for demand in serving_demands(record):
            if demand not in asked:
                err.say(f"Warning: {demand}", style="yellow")
        command = arguments.noted_command(ctx.obj, storage)
        if record.user_attrs.get(COMMAND) != command:
            record.set_user_attr(COMMAND, command)
        if resumed is not None:
            err.say(f"resuming study {study!r}: {finished(record)} of {trials} trials done")
        if "merge" in chosen_space.phases and chosen_space.router == "prob" and not servers:
            err.print("merged routers map probabilities: only prunings export to an ordinary checkpoint (see --router)")
        err.say(f"first prompt, then what is scored: {first_prompt(objective.evaluator)}")
        full = objective.reference(record) if reference else read(record)
        if full is not None:
            err.say(f"full model: {full}, {full.layer_tokens:,} layer-tokens")
            for warning in full.warnings[:MOST_SHOWN]:
                err.say(f"Warning: {line(warning, 1000)}", style="yellow")
        objective.guards.begin(record)
        for told in objective.guards.told():
            err.say(told)
        started = time.monotonic()
        recipe.want(record, trials, patience)
        again = ["--study", study, "--model", model, "--device-map", device_map, *trust.split()]
        if workers > 1 and recipe.read(record).task is None:
            again += ["--task", task, *(["--data", data] if data is not None else [])]
            again += [word for option in task_option or () for word in ("--task-option", option)]
        tracked = tracked or Tracking()
        with (
            warnings.catch_warnings(),
            SearchProgress(err, trials, timeout) as progress,
            tracked,
            fleet.Fleet(shares[1:], again, storage, progress.say),
        ):
            warnings.filterwarnings("ignore", message=re.escape(str(missing)))  # it is said above
            tracked.tell = progress.say
            for told in tracked.begin(record):
                err.say(told)
            optimize(
                record, objective, n_trials=trials, timeout=timeout, patience=patience, callbacks=(progress, tracked)
            )
        teacher = objective.evaluator.teacher
        if teacher is not None and teacher.nbytes:
            err.say(f"full model: {teacher}")
        ended = (
            finished(record) >= trials
            or (timeout is not None and time.monotonic() - started >= timeout)
            or (patience is not None and stalled(record) >= patience)
        )
    except KeyboardInterrupt:
        ended = False
    if not ended:
        raise opt.interrupted(err, "every finished trial is stored. To resume:", ctx, storage)
    if len(goals) > 1:
        out.say(f"{_front_told(record)}\n  {shlex.join(['moeopt', 'front', study, *arguments.storage_again(storage)])}")
        return
    best = best_trial(record)
    if best is None:
        bounds = " and ".join([*constraints, *(f"its guard {guard.name}" for guard in guards)])
        out.say(f"{finished(record)} trials done, and none gave a finite loss{bounds and ' within ' + bounds}")
        done = [trial for trial in record.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
        for trial in sorted(done, key=lambda t: sum(max(0.0, value) for value in t.constraints.values()))[:1]:
            out.say(*(f"the nearest, trial {trial.number}: {each}" for each in changes(record, trial)))
        return
    accuracy = best.user_attrs.get("accuracy")
    weighed = active_weight * best.user_attrs.get("active", 0.0)
    scored = f"loss {best.value - weighed:.4f}" if LOSS in goals else arguments.values_told(record, best)
    if accuracy is not None:
        scored += f", {'agreement' if score in ('kl', 'acceptance') else 'accuracy'} {100 * accuracy:.1f}%"
    if space.searched:
        scored += f", {best.user_attrs['active']:.2f} experts active"
    compared = ""
    if full is not None:
        gap = full.difference(best)
        compared = f"Full model: {full}" + (f", {full.active:.2f} experts active" if space.searched else "")
        if gap is not None:
            compared += f". Best - full: loss {gap}"
        compared += "\n"
    compared += "".join(f"{str(each)[:1].upper()}{str(each)[1:]}\n" for each in changes(record, best))
    if held and "dev" in chosen_task.splits:
        compared += _held(record, objective)
    place = shlex.join(arguments.storage_again(storage))
    out.say(
        f"{finished(record)} trials done. Best: trial {best.number}, {scored} on the search split\n{compared}"
        f"  {arguments.show_again(study, storage)}\n"
        f"  moeopt export {shlex.quote(model)} OUT_DIR {place} --study {shlex.quote(study)}{trust}"
    )
    if refit is not None:
        run_refit(
            ctx, storage, chosen_space.plan(best), refit, model, loaded, tokenizer, chosen_task, rank=refit_rank,
            limit=limit, dev_limit=limit, score=score, batch_tokens=objective.evaluator.batch_tokens,
        )  # fmt: skip


def _front_told(study: optuna.Study) -> str:
    """A line on the front of a study of several objectives."""
    from moeopt.study import best_trials, finished
    from moeopt.trials.front import broken, objectives_of

    trials = best_trials(study)
    if not trials:
        return f"{finished(study)} trials done, and none gave finite values within its constraints{broken(study)}"
    spans = []
    for name, values in zip(objectives_of(study), zip(*(trial.values for trial in trials))):
        form = ",.0f" if name == "bytes" else ".4f"
        spans.append(f"{name} {min(values):{form}} to {max(values):{form}}")
    return f"{finished(study)} trials done. The front has {len(trials)}: {', '.join(spans)} on the search split"


def _held(study: optuna.Study, objective: Objective) -> str:
    """A line on what became of a search's gain on dev; empty where there was none."""
    from moeopt.errors import MoeoptError
    from moeopt.results.selection import held

    try:
        made = held(study, objective)
    except MoeoptError as error:
        return f"What of the gain holds on dev is not known: {error}\n"
    except KeyboardInterrupt:  # all trials are done: what they gave is shown all the same
        return "What of the gain holds on dev was interrupted; the same command again scores it\n"
    return "" if made is None else f"{made}\n"
