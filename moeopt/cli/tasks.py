"""`moeopt tasks`: the tasks that there are, a line each."""

from __future__ import annotations

from typing import Annotated

import typer

NAME_WIDTH = 18
EXAMPLES = "[bold]Examples[/bold]\n\nmoeopt tasks\n\nmoeopt tasks eep\n\nmoeopt tasks gsm8k"


def tasks(
    part: Annotated[
        str, typer.Argument(metavar="[PART]", help="Only names that have this in them, of lm-evaluation-harness, too.")
    ] = "",
) -> None:
    """List the tasks to search on: of your own data, EEP's prompts, and those of lm-evaluation-harness."""
    from moeopt.errors import TaskError, nearest
    from moeopt.report.terminal import consoles
    from moeopt.tasks.lm_eval.catalogue import harness_folder, ours, theirs
    from moeopt.tasks.registry import REGISTRY, summaries

    lines = {name: line for name, line in summaries().items() if part.lower() in name.lower()}
    matching = [name for name in theirs() if part and part.lower() in name.lower() and name not in lines]
    for name in sorted(matching, key=lambda name: (name != part, not name.startswith(part), name)):
        lines[name] = f"lm_eval: {theirs()[name][0].parent.relative_to(harness_folder())}"
    if not lines:
        raise TaskError(f"no task has {part!r} in its name{nearest(part, [*REGISTRY, *ours(), *theirs()])}")
    console = consoles()[0]
    for name, line in lines.items():  # some of the harness's names are as long as a line
        console.say(f"{name:<{NAME_WIDTH}}  {line}")
    if not part:
        console.say(
            f"and {len(set(theirs()) - set(ours())):,} tasks, groups and tags of lm-evaluation-harness, such as boolq:"
            " moeopt tasks PART lists those with PART in their names"
        )
