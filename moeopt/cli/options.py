"""Options that several commands have, each declared once, and how commands end after Ctrl-C.

What lm-evaluation-harness and Optuna call the same is an option by their name too; `commands.py` reads ``_`` as ``-``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeopt.cli import arguments
from moeopt.defaults import DEFAULT_STORAGE as DEFAULT_STORAGE
from moeopt.defaults import STORAGE_VARIABLE as STORAGE_VARIABLE
from moeopt.defaults import Score as Score

if TYPE_CHECKING:
    from moeopt.report.terminal.terminal import Terminal

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


GOAL, STUDY, MACHINE, HUB = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Task", "Study", "Machine", "Hugging Face hub")
)
NAMED = partial(STUDY, "--study", "--study-name", metavar="NAME")
OUT = partial(typer.Option, "--out", "--output-path")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id of the full model.")]
Task = Annotated[
    str,
    GOAL(help="What to be good at: boolq, eep_boolq, text, ... (moeopt tasks lists all), or FILE.py:NAME of your own."),
]
Data = Annotated[
    str | None,
    GOAL(metavar="DATA", help="JSONL, JSON, parquet or CSV file, folder or hub id. Default: the task's own."),
]
TaskOption = Annotated[
    list[str] | None, GOAL(metavar="NAME=VALUE", help="An option of the task, such as num_fewshot=5; repeatable.")
]
ScoreOption = Annotated[
    Score,
    GOAL(
        help="What is minimised. likelihood: minus the answers' log-likelihood. choice: minus the log of the right "
        "option's share among the options. metric: 1 minus the task's metric. "
        "Without answers, against the full model: kl, the divergence; acceptance: 1 minus speculative decoding's rate."
    ),
]
GuardTasks = Annotated[
    list[str] | None,
    GOAL(
        "--guard",
        metavar="TASK[=DATA][,NAME=VALUE...]",
        help="A task on which a plan may lose only so much to the full model: text=notes/,limit=128,window=128; "
        "repeatable. Options are loss, limit (64 examples a split), score and name, else the task's.",
    ),
]
GuardLoss = Annotated[float, GOAL(metavar="X", min=0, help="What it may lose on a guard that does not say itself.")]
Limit = Annotated[int | None, GOAL(metavar="N", min=1, help="Use N search examples (text: windows). Default: all.")]
DevLimit = Annotated[int | None, GOAL(metavar="N", min=1, help="Judge on N dev examples. Default: all.")]
RefitFile = Annotated[
    Path | None,
    STUDY(
        "--refit",
        metavar="FILE",
        help="Then fit the experts of the best plan to the full model, judge that on dev, and write the plan to FILE.",
    ),
]
RefitRank = Annotated[
    int | None, STUDY(metavar="Q", min=1, help="With --refit: rank of each expert's change. Default: any.")
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of all random draws.")]
DeviceMap = Annotated[
    str,
    MACHINE(
        "--device-map",
        "--device",
        metavar="MAP",
        callback=arguments.device_map,
        help="Where weights go: auto, cpu, cuda:0, ...",
    ),
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], MACHINE(help="Type of the weights in memory.")]
TrustRemoteCode = Annotated[bool, MACHINE("--trust-remote-code", help="Run code that comes with a checkpoint.")]
FoundBatchTokens = Annotated[
    int | None,
    MACHINE(
        metavar="N",
        min=1,
        help="Padded tokens a forward pass. [what the study holds; else 1024 on a CPU, measured on an accelerator]",
    ),
]
BatchTokens = Annotated[int, MACHINE(metavar="N", min=1, help="Padded tokens a forward pass.")]
Storage = Annotated[
    str,
    STUDY(
        metavar="URL",
        envvar=STORAGE_VARIABLE,
        help="Where studies are kept: an SQLAlchemy URL (SQLite, PostgreSQL, MySQL).",
    ),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Plan file of moeopt, or an EEP .pth.")]
StudyName = Annotated[str | None, NAMED(help="A study to take the plan from.")]
Trial = Annotated[
    str,
    STUDY(
        help="A trial's number; best: the one of least loss; best-stock: the best one that an ordinary checkpoint can "
        "hold; or selected: what [bold]moeopt select[/bold] chose."
    ),
]
ServeOn = Annotated[
    list[str] | None,
    typer.Option(
        "--for",
        metavar="SERVER",
        help="Server that shall load the result: vllm, sglang or llama.cpp; repeatable. What it asks for is said.",
    ),
]
ServeParallel = Annotated[
    int, typer.Option("--for-parallel", metavar="N", min=1, help="Ranks among which it divides the experts of a layer.")
]
Private = Annotated[
    bool, HUB("--private", help="Make the repository one that others do not see; refused where it is public.")
]
PushRevision = Annotated[
    str | None, HUB("--revision", metavar="BRANCH", help="Branch to push to, made where it is missing.")
]
CommitMessage = Annotated[str | None, HUB(metavar="TEXT", help="Of the commit on the hub.")]
Timeout = Annotated[
    float | None, typer.Option(metavar="S", min=0, help="Seconds after which no trial starts.", rich_help_panel="Study")
]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer reads it: in place of a parameter whose type is a dataclass, an option for each field."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {n: p.annotation for n, p in signature.parameters.items() if is_dataclass(p.annotation)}

    def called(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        its = inspect.signature(groups[name], eval_str=True).parameters.values() if name in groups else [parameter]
        parameters += [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in its]
    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__doc__ = command.__doc__
    return called


def interrupted(err: Terminal, saved: str, ctx: typer.Context, storage: str) -> typer.Exit:
    """How a command ends after Ctrl-C, once it has said what is saved, and how to go on: with the same command."""
    from moeopt.study.storage.urls import HIDDEN

    command = arguments.command_again(ctx.obj, storage)
    err.say(f"Interrupted; {saved}" + (f" ({HIDDEN}: what is secret)" if HIDDEN in command else ""))
    err.say(f"  {command}")
    return typer.Exit(INTERRUPTED)
