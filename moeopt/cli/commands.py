"""The command line: arguments are checked and handed to the library; every expected error is one line and exit code 2.

Nothing heavy is imported before the arguments that can be judged without it are judged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from moeopt import __version__
from moeopt.cli import (
    compare,
    compare_methods,
    dashboard,
    demo,
    env,
    export,
    front,
    health,
    lm_eval,
    profile,
    push,
    refit,
    search,
    select,
    show,
    similarity,
    tasks,
    verify,
    worker,
)
from moeopt.errors import MoeoptError

app = typer.Typer(
    pretty_exceptions_enable=False,
    # --num_fewshot, --n_trials and the like are read as they are written elsewhere.
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
    rich_markup_mode="rich",
    help="Make a Mixture-of-Experts language model smaller and faster for one task, without training: search which "
    "experts to prune and merge, keep every trial in an SQL study, export the best as an ordinary checkpoint.",
    epilog="[bold]moeopt demo[/bold] shows the whole way on a small model that comes with it, in a minute or two.",
)


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
    from moeopt.report.terminal import consoles
    from moeopt.showing import line

    consoles()[1].say(f"Error: {line(message, 4000)}", style="red")
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


COMMANDS: dict[str, tuple[Callable[..., None], str | None]] = {
    "demo": (demo.demo, None),
    "tasks": (tasks.tasks, tasks.EXAMPLES),
    "search": (search.search, search.EXAMPLES),
    "show": (show.show, show.EXAMPLES),
    "plan": (show.plan, show.PLAN_EXAMPLES),
    "similarity": (similarity.similarity, similarity.EXAMPLES),
    "front": (front.front, front.EXAMPLES),
    "select": (select.select, select.EXAMPLES),
    "refit": (refit.refit, refit.EXAMPLES),
    "export": (export.export, export.EXAMPLES),
    "push": (push.push, push.EXAMPLES),
    "verify": (verify.verify, verify.EXAMPLES),
    "health": (health.health, health.EXAMPLES),
    "profile": (profile.profile, profile.EXAMPLES),
    "lm-eval": (lm_eval.lm_eval, lm_eval.EXAMPLES),
    "compare-methods": (compare_methods.compare_methods, compare_methods.EXAMPLES),
    "compare": (compare.compare, compare.EXAMPLES),
    "dashboard": (dashboard.dashboard, dashboard.EXAMPLES),
    "worker": (worker.worker, worker.EXAMPLES),
    "ray": (worker.on_ray, worker.RAY_EXAMPLES),
    "env": (env.env, env.EXAMPLES),
}
for name, (command, examples) in COMMANDS.items():
    app.command(name, epilog=examples)(command)
