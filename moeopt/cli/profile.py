"""`moeopt profile`: arguments are checked and handed to `moeopt.profile`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, GOAL, INTERRUPTED, MACHINE, OUT
from moeopt.errors import MoeoptError

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt profile ./mixtral ./mixtral-4-experts --batch 1,8,32\n\n"
    "moeopt profile ./mixtral --plan pruned.safetensors --plan skipping.safetensors --data src/ --out profile.json\n\n"
    "moeopt profile ./mixtral --study boolq-8to4 --trial best --threads 8"
)

PROFILED, TIMED = (partial(typer.Option, rich_help_panel=panel) for panel in ("What is profiled", "What is timed"))


def profile(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Checkpoint folders or hub ids; the others are held against the first."
        ),
    ],
    plan: Annotated[
        list[Path] | None,
        PROFILED(metavar="FILE", help="A plan file, or EEP .pth, applied to the first model; repeatable."),
    ] = None,
    study: opt.StudyName = None,
    trial: opt.Trial = "best",
    storage: opt.Storage = DEFAULT_STORAGE,
    batch: Annotated[str, TIMED(metavar="N,N,...", help="Prompts run at once.")] = "1,8",
    prompt_length: Annotated[str, TIMED(metavar="N,N,...", help="Tokens a prompt.")] = "256",
    new_tokens: Annotated[int, TIMED(metavar="N", min=1, help="Tokens to decode after each prefill.")] = 32,
    repeats: Annotated[int, TIMED(metavar="N", min=1, help="How often each is timed, a warm-up apart.")] = 5,
    task: Annotated[
        str | None, GOAL(help="Task whose test examples the prompts are. Default: text if there is --data.")
    ] = None,
    data: Annotated[
        str | None, GOAL(metavar="DATA", help="The task's data. Default: without --task, random token ids.")
    ] = None,
    task_option: opt.TaskOption = None,
    balance_tokens: Annotated[
        int, GOAL(metavar="N", min=1, help="Tokens that load balance and active experts are counted on.")
    ] = 2048,
    seed: opt.Seed = 0,
    device_map: opt.DeviceMap = "auto",
    dtype: opt.Dtype = "auto",
    experts: Annotated[
        str | None, MACHINE(metavar="NAME", help="Experts implementation of transformers. Default: the model's own.")
    ] = None,
    threads: Annotated[int | None, MACHINE(metavar="N", min=1, help="Threads of torch. Default: torch's own.")] = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    out: Annotated[Path | None, OUT(metavar="FILE.json", help="Write all numbers here, and as .csv beside it.")] = None,
) -> None:
    """Measure parameters, memory, speed and expert load balance of models and plans, side by side."""
    from moeopt import report
    from moeopt.results import profiling

    batches, lengths = arguments.numbers("--batch", batch), arguments.numbers("--prompt-length", prompt_length)
    arguments.pairs("--task-option", task_option)
    if out is not None:
        profiling.check_out(out)
    for model in models:
        arguments.checkpoint_config(model)
    plans = []
    if plan or study is not None:
        shape = arguments.quick_shape(models[0])
        plans = [(file.stem, arguments.read_plan(file, shape.layers if shape else None)) for file in plan or ()]
    if study is not None:
        chosen, title, _ = arguments.chosen_plan("--plan", None, None, storage, study, trial)
        plans.append((title.partition(" (")[0], chosen))
    goal = None
    if task is not None or data is not None:
        goal = arguments.open_task(task or "text", data, task_option, split=None)
    elif task_option:
        raise MoeoptError("--task-option needs --task or --data")
    from moeopt.report.terminal import Steps, consoles

    console, err = consoles()
    try:
        with Steps(err) as progress:
            made = profiling.profile(
                models, plans=profiling.unique(plans), batch=batches, prompt_length=lengths, new_tokens=new_tokens,
                repeats=repeats, task=goal, balance_tokens=balance_tokens, seed=seed, device_map=device_map,
                dtype=dtype, experts_implementation=experts, trust_remote_code=trust_remote_code, threads=threads,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        err.print("Interrupted; nothing is kept of a profile that is not finished.")
        raise typer.Exit(INTERRUPTED) from None
    if out is not None:
        report.save(made, out)
    console.print(report.view(made))
    if out is not None:
        console.say(f"\nsaved to {out} and {out.with_suffix('.csv')}")
