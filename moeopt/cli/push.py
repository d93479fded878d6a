"""`moeopt push`: arguments are checked and handed to `moeopt.exporting.push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeopt.cli import options as opt

EXAMPLES = (
    "[bold]Examples[/bold]\n\nmoeopt push small/ me/mixtral-boolq --private\n\n"
    "The token is the one that [bold]hf auth login[/bold] keeps, or HF_TOKEN. The same command goes on after a failure."
)


def push(
    folder: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="What moeopt export wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the hub, as me/name; made where missing.")],
    private: opt.Private = False,
    revision: opt.PushRevision = None,
    commit_message: opt.CommitMessage = None,
) -> None:
    """Upload an exported checkpoint, with its model card, to the Hugging Face hub."""
    from rich.text import Text

    from moeopt.exporting import push as upload
    from moeopt.report.terminal import consoles

    console, err = consoles()
    with err.status(Text(f"pushing {folder} to {repo}")):
        place = upload(folder, repo, private=private, revision=revision, commit_message=commit_message)
    console.say(f"pushed {folder}: {place}")
