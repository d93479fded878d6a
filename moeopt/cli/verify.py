"""`moeopt verify`: arguments are checked and handed to `moeopt.exporting.verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli.options import GOAL, MACHINE, Data, DeviceMap, TaskOption
from moeopt.errors import MoeoptError

EXAMPLES = (
    "[bold]Examples[/bold]\n\nmoeopt verify small/\n\n"
    "moeopt verify small/ --model ./mixtral --task boolq --data boolq.jsonl\n\n"
    "Exit code 0: the checkpoint is the original under its plan. 1: it is not. 2: it cannot be told."
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify", epilog=EXAMPLES)(verify)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A checkpoint that moeopt export wrote.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The full model. Default: where it was on exporting.")
    ] = None,
    task: Annotated[str | None, GOAL(help="Also compare on texts of this task's test examples.")] = None,
    data: Data = None,
    task_option: TaskOption = None,
    limit: Annotated[int, GOAL(metavar="N", min=1, help="How many of them.")] = 4,
    sequences: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences of random tokens.")] = 2,
    length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each.")] = 32,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to generate.")] = 16,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the random tokens.")] = 0,
    device_map: DeviceMap = "auto",
    trust_remote_code: Annotated[
        bool, MACHINE("--trust-remote-code", help="Run code in the checkpoint even if it is not what moeopt ships.")
    ] = False,
) -> None:
    """Reload an exported checkpoint in a fresh process and compare it with the original under its plan."""
    texts: list[str] = []
    if task is not None:
        from moeopt import tasks

        chosen = tasks.get(task, data=data, **arguments.pairs("--task-option", task_option))
        split = chosen.splits[-1]
        texts = [example.prompt + example.options[example.answer] for example in chosen.examples(split)[:limit]]
    elif data is not None or task_option:
        raise MoeoptError("--data and --task-option need --task")
    from rich.text import Text

    from moeopt.exporting import verify as check
    from moeopt.report.terminal import consoles

    console, err = consoles()
    with err.status(Text(f"verifying {folder}")):
        found = check(
            folder,
            model=model,
            texts=texts,
            sequences=sequences,
            length=length,
            new_tokens=new_tokens,
            seed=seed,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
    console.print("\n".join(found.lines()), markup=False, soft_wrap=True)
    if not found.ok:
        raise typer.Exit(1)
