"""`moeopt verify`: arguments are checked and handed to `moeopt.exporting.verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import GOAL, MACHINE

EXAMPLES = (
    "[bold]Examples[/bold]\n\nmoeopt verify small/\n\n"
    "moeopt verify small/ --model ./mixtral --task boolq --data boolq.jsonl\n\n"
    "moeopt verify other/ --model ./mixtral --plan pruned.safetensors\n\n"
    "Exit code 0: the checkpoint is the original under its plan. 1: it is not. 2: it cannot be told."
)


def verify(
    folder: Annotated[str, typer.Argument(metavar="OUT_DIR", help="The smaller checkpoint: folder or hub id.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The full model. Default: where it was on exporting.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What it should be. Default: the plan.safetensors that moeopt export wrote."),
    ] = None,
    task: Annotated[str | None, GOAL(help="Also compare on texts of this task's test examples.")] = None,
    data: opt.Data = None,
    task_option: opt.TaskOption = None,
    limit: Annotated[int, GOAL(metavar="N", min=1, help="How many of them.")] = 4,
    sequences: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences of random tokens.")] = 2,
    length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each.")] = 32,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to generate.")] = 16,
    seed: opt.Seed = 0,
    device_map: opt.DeviceMap = "auto",
    trust_remote_code: Annotated[
        bool,
        MACHINE(
            "--trust-remote-code",
            help="Run code in the checkpoint that is not what moeopt ships, and the full model's.",
        ),
    ] = False,
) -> None:
    """Reload a smaller checkpoint in a fresh process and compare it with the original under its plan.

    One that another tool wrote needs --plan and --model.
    """
    shape = None if model is None else arguments.quick_shape(model, trust_remote_code=trust_remote_code)
    chosen_plan = None if plan is None else arguments.read_plan(plan, shape.layers if shape else None)
    texts: list[str] = []
    chosen = arguments.other_task(task, data, task_option)
    if chosen is not None:
        examples = chosen.examples(chosen.splits[-1])[:limit]
        texts = [example.prompt + example.options[example.answer] for example in examples]
    from rich.text import Text

    from moeopt.exporting import verify as check
    from moeopt.report.terminal import consoles

    console, err = consoles()
    with err.status(Text(f"verifying {folder}")):
        verification = check(
            folder, model=model, plan=chosen_plan, texts=texts, sequences=sequences, length=length,
            new_tokens=new_tokens, seed=seed, device_map=device_map, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    console.say(*verification.lines())
    if not verification.ok:
        raise typer.Exit(1)
