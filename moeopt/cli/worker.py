"""`moeopt worker`, a process that joins a study, and `moeopt ray`, many of them on a Ray cluster."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, GOAL, INTERRUPTED, MACHINE, NAMED, STUDY
from moeopt.errors import MoeoptError

if TYPE_CHECKING:
    from moeopt.report.terminal.terminal import Terminal

STORED = "every finished trial is stored. To go on:"
FAILED = 1
"""Exit code after a trial failed for a reason that is neither the plan's nor the user's."""

StudyName = Annotated[str, NAMED(help="A study that moeopt search made.")]
Checkpoint = Annotated[
    str | None,
    MACHINE("--model", metavar="MODEL", help="Its checkpoint, here. Default: the hub id that the study was made with."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, MACHINE(help="Type of the weights. Default: the study's.")
]
Trials = Annotated[
    int | None,
    STUDY(
        "--trials",
        "--n-trials",
        metavar="N",
        min=1,
        help="Finished trials the study shall hold. Default: as many as the search asked for.",
    ),
]
TaskName = Annotated[
    str | None, GOAL("--task", help="As to the search; only where the study cannot hold its task, and says so.")
]
EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt worker --storage postgresql+psycopg://user@host/moeopt --study boolq-8to4 --model ./mixtral\n\n"
    "srun --ntasks-per-node=8 --gpus-per-node=8 moeopt worker --study boolq-8to4 --model /models/mixtral\n\n"
    "accelerate launch --num_processes 4 -m moeopt worker --study boolq-8to4 --model /models/mixtral\n\n"
    "MOEOPT_STORAGE in the environment keeps a password out of the list of processes. [bold]Ctrl-C[/bold] lets the "
    "running trial finish; a second one does not, and the trial is run again elsewhere."
)

RAY_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt ray --storage postgresql+psycopg://user@host/moeopt --study boolq-8to4 --model /models/mixtral "
    "--workers 8 --address auto\n\n"
    "moeopt ray --study boolq-8to4 --model /models/olmoe --workers 8 --gpus-per-worker 0.5\n\n"
    "[bold]Ctrl-C[/bold] lets running trials finish; a second one does not, and they are run again on resuming."
)


def worker(
    ctx: typer.Context,
    study: StudyName,
    storage: opt.Storage = DEFAULT_STORAGE,
    model: Checkpoint = None,
    trials: Trials = None,
    timeout: opt.Timeout = None,
    task: TaskName = None,
    data: opt.Data = None,
    task_option: opt.TaskOption = None,
    device_map: opt.DeviceMap = "auto",
    dtype: Dtype = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    quiet: Annotated[bool, MACHINE("--quiet", help="Print errors only.")] = False,
    while_stdin: Annotated[bool, MACHINE("--while-stdin", hidden=True, help="End when standard input does.")] = False,
) -> None:
    """Join a study and run trials until it holds all that were asked for; many may, on many machines.

    The study holds what is searched and how, and the task's examples; a worker needs the checkpoint, which is checked.
    """
    chosen = arguments.other_task(task, data, task_option)
    if model is not None:
        arguments.quick_shape(model, trust_remote_code=trust_remote_code)
    import optuna

    from moeopt.report.terminal import SearchProgress, consoles
    from moeopt.study import finished, read_study, recipe, serving_demands
    from moeopt.study.workers.fleet import take
    from moeopt.study.workers.worker import run_worker, threads

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    err = consoles()[1]
    try:
        with _ending_on_signals(while_stdin):
            joined = read_study(study, storage)
            for demand in () if quiet else serving_demands(joined):
                err.say(f"Warning: {demand}", style="yellow")
            target = trials or recipe.wanted(joined)
            take(threads(device_map))
            with SearchProgress(err, target, timeout, quiet=quiet) as progress:
                record = run_worker(
                    storage, study, model=model, device_map=device_map, dtype=dtype, n_trials=target, timeout=timeout,
                    task=chosen, callbacks=[progress], trust_remote_code=trust_remote_code,
                )  # fmt: skip
    except KeyboardInterrupt:
        if quiet:
            raise typer.Exit(INTERRUPTED) from None
        raise opt.interrupted(err, STORED, ctx, storage) from None
    except MoeoptError:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        err.say(f"Error: a trial failed: {type(error).__name__}: {reason}", style="red")
        raise typer.Exit(FAILED) from None
    if not quiet:
        _print_end(err, ctx, storage, finished(record), target)


def on_ray(
    ctx: typer.Context,
    study: StudyName,
    workers: Annotated[int, MACHINE(metavar="N", min=1, help="Workers; those without a place yet wait for one.")],
    storage: opt.Storage = DEFAULT_STORAGE,
    model: Annotated[
        str | None,
        MACHINE("--model", metavar="MODEL", help="A hub id, or a folder on every node. Default: the study's hub id."),
    ] = None,
    trials: Trials = None,
    timeout: opt.Timeout = None,
    task: TaskName = None,
    data: opt.Data = None,
    task_option: opt.TaskOption = None,
    gpus_per_worker: Annotated[
        float, MACHINE(metavar="X", min=0, help="GPUs of each: 0.5 for two that share one, 2 for models of that size.")
    ] = 1.0,
    cpus_per_worker: Annotated[float, MACHINE(metavar="X", min=0, help="Cores of each.")] = 1.0,
    address: Annotated[
        str | None, MACHINE(metavar="ADDRESS", help="The cluster's, or auto. Default: RAY_ADDRESS, or a local one.")
    ] = None,
    dtype: Dtype = None,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Join a study with workers on a Ray cluster, which places them on its devices and restarts those that die."""
    chosen = arguments.other_task(task, data, task_option)
    import optuna

    from moeopt.report.terminal import consoles
    from moeopt.study import finished, recipe
    from moeopt.study.workers.on_ray import run_on_ray

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    err = consoles()[1]
    try:
        record = run_on_ray(
            storage, study, workers=workers, gpus_per_worker=gpus_per_worker, cpus_per_worker=cpus_per_worker,
            address=address, tell=err.say,
            model=model, n_trials=trials, timeout=timeout, dtype=dtype, task=chosen,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise opt.interrupted(err, STORED, ctx, storage) from None
    _print_end(err, ctx, storage, finished(record), trials or recipe.wanted(record))


def _print_end(err: Terminal, ctx: typer.Context, storage: str, done: int, wanted: int | None) -> None:
    """How many trials there are, and where that is fewer than wanted, how to go on."""
    err.say(f"{done} trials done")
    if wanted is not None and done < wanted:
        err.print(f"{wanted} are wanted. To go on:")
        err.say(f"  {arguments.command_again(ctx.obj, storage)}")


@contextmanager
def _ending_on_signals(while_stdin: bool) -> Iterator[None]:
    """SIGTERM, which schedulers send shortly before they kill, interrupts the trial at once.

    With `while_stdin` the end of standard input acts as Ctrl-C: whoever started this process is gone.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if while_stdin:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which what a shell starts with & would ignore

        def watch() -> None:
            while os.read(sys.stdin.fileno(), 1024):
                pass
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
