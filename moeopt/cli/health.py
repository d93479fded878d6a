"""`moeopt health`: arguments are checked and handed to `moeopt.results.health`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, INTERRUPTED, OUT
from moeopt.errors import MoeoptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeopt.tasks import Task

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt health ./mixtral --task boolq --study boolq-8to4 --trial selected\n\n"
    "moeopt health ./mixtral --prompts questions.txt --chat --plan pruned.safetensors --out health.json\n\n"
    "Exit code 0: the answers hold, or it is not clear. 1: they fall apart. 2: it cannot be told."
)
ANSWERED = partial(typer.Option, rich_help_panel="What is answered")


def health(
    model: opt.Model,
    task: Annotated[str | None, ANSWERED(help="Task whose dev prompts are answered.")] = None,
    data: opt.Data = None,
    task_option: opt.TaskOption = None,
    prompts: Annotated[
        Path | None,
        ANSWERED(
            metavar="FILE", help="Prompts in place of a task's: a text file, one a line, or rows with a 'prompt'."
        ),
    ] = None,
    chat: Annotated[bool, ANSWERED("--chat", help="The prompts of the file are messages of a chat.")] = False,
    limit: Annotated[
        int | None, ANSWERED(metavar="N", min=1, help="Answer so many prompts. [32 of a task, all of a file]")
    ] = None,
    new_tokens: Annotated[int, ANSWERED(metavar="N", min=1, help="Most tokens of an answer.")] = 64,
    plan: opt.PlanFile = None,
    study: opt.StudyName = None,
    trial: opt.Trial = "best",
    storage: opt.Storage = DEFAULT_STORAGE,
    device_map: opt.DeviceMap = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    batch_tokens: opt.BatchTokens = 1024,
    out: Annotated[
        Path | None,
        OUT(metavar="FILE.json", help="Write the numbers here, and every answer as .csv and .html beside it."),
    ] = None,
) -> None:
    """Hold the answers that a model writes under a plan against the full model's: loops, early ends, empty answers."""
    if (task is None) == (prompts is None):
        raise MoeoptError("give either --task, whose dev prompts are answered, or --prompts, a file of them")
    if chat and prompts is None:
        raise MoeoptError("--chat is of --prompts; a task takes --task-option chat=true")
    if out is not None and out.suffix != ".json":
        raise MoeoptError(f"--out must be a .json file, got {str(out)!r}")
    shape = arguments.quick_shape(model, trust_remote_code=trust_remote_code)
    source: Task | Sequence[str]
    if prompts is not None:
        if data is not None or task_option:
            raise MoeoptError("--data and --task-option need --task")
        source = read_prompts(prompts)[:limit]
    else:
        assert task is not None
        source = arguments.open_task(task, data, task_option, split="dev")
    chosen, title, _ = arguments.chosen_plan(
        "--plan", plan, None if shape is None else shape.layers, storage, study, trial
    )
    arguments.check_layers(chosen, shape)
    from moeopt import report
    from moeopt.models import load
    from moeopt.report.terminal import consoles
    from moeopt.results.health import PROMPTS, HealthCheck

    console, err = consoles()
    try:
        err.say(f"loading {model}")
        loaded, tokenizer = load(model, device_map=device_map, dtype=dtype, trust_remote_code=trust_remote_code)
        check = HealthCheck(
            loaded, tokenizer, source, limit=limit or PROMPTS, new_tokens=new_tokens, chat=chat,
            batch_tokens=batch_tokens,
        )  # fmt: skip
        err.say(f"answering {len(check.prompts)} prompts by the full model and under {title}")
        made = check(chosen)
    except KeyboardInterrupt:
        err.print("Interrupted; nothing is kept of a report that is not finished.")
        raise typer.Exit(INTERRUPTED) from None
    if out is not None:
        report.save(made, out)
    console.print(report.view(made))
    if out is not None:
        console.say(f"saved to {out}, and beside it as .csv and .html")
    if made.verdict == "broken":
        raise typer.Exit(1)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: of text, one a line, or rows with a column "prompt".

    Raises:
        MoeoptError: naming the file, when it cannot be read or has none.
    """
    from moeopt.tasks.formats import form_of, read_rows

    if form_of(path) is not None:
        texts = [(where, row.get("prompt")) for where, row in read_rows(path)]
        for where, text in texts:
            if not isinstance(text, str) or not text.strip():
                raise MoeoptError(f"{where}: 'prompt' must be a text, not empty, got {text!r:.80}")
        return [str(text) for _, text in texts]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MoeoptError(
            f"cannot read prompts from {str(path)!r}: {getattr(error, 'strerror', None) or error}"
        ) from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise MoeoptError(f"{str(path)!r} has no prompts")
    return prompts
