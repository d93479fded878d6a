"""`moeopt lm-eval`: arguments are checked and handed to `moeopt.evaluation.lm_eval_report`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, GOAL, MACHINE, OUT
from moeopt.errors import MoeoptError, TaskError

if TYPE_CHECKING:
    from rich.table import Table

    from moeopt.evaluation import HarnessReport

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "moeopt lm-eval ./mixtral --tasks arc_easy,hellaswag --study boolq-8to4 --limit 200\n\n"
    "moeopt lm-eval ./mixtral --tasks my_task --include-path my_tasks/ --plan pruned.safetensors --out results.json\n\n"
    "moeopt lm-eval ./mixtral --tasks arc_easy --data arc_easy=arc/ --num-fewshot 5"
)


def lm_eval(
    model: opt.Model,
    tasks: Annotated[
        str, GOAL(metavar="NAME,...", help="Tasks, groups or tags of lm-evaluation-harness, such as arc_easy.")
    ],
    plan: opt.PlanFile = None,
    study: opt.StudyName = None,
    trial: opt.Trial = "best",
    storage: opt.Storage = DEFAULT_STORAGE,
    include_path: Annotated[
        Path | None,
        GOAL(
            "--include-path",
            "--include_path",
            metavar="DIR",
            help="Folder with tasks of your own, in the harness's YAML.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        GOAL(metavar="NAME=DATA", help="Local JSONL or parquet file or folder for a task, in its own schema."),
    ] = None,
    limit: Annotated[
        int | None, GOAL(metavar="N", min=1, help="Evaluate the first N documents of each task. Default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        GOAL(
            "--num-fewshot",
            "--num_fewshot",
            metavar="N",
            min=0,
            help="Examples in front of every question. Default: the task's.",
        ),
    ] = None,
    chat_template: Annotated[
        bool, GOAL("--chat-template", "--apply-chat-template", help="Write prompts with the tokenizer's chat template.")
    ] = False,
    unsafe_code: Annotated[
        bool,
        GOAL("--unsafe-code", "--confirm-run-unsafe-code", help="Allow tasks that run code which the model writes."),
    ] = False,
    out: Annotated[
        Path | None, OUT(metavar="FILE", help="Also write all of it, by document, as JSON.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences a forward pass.")] = 8,
    device_map: opt.DeviceMap = "auto",
    dtype: opt.Dtype = "auto",
    trust_remote_code: Annotated[
        bool,
        MACHINE("--trust-remote-code", help="Run code that comes with a checkpoint, or with tasks in --include-path."),
    ] = False,
) -> None:  # fmt: skip
    """Run lm-evaluation-harness on the full model and, side by side, on a smaller one; no checkpoint is written."""
    names = arguments.words("--tasks", tasks, "arc_easy,hellaswag")
    if plan is not None and study is not None:
        raise MoeoptError("give --plan or --study, not both")
    if out is not None and not out.absolute().parent.is_dir():
        raise MoeoptError(f"cannot write {str(out)!r}: its folder does not exist")
    places = {}
    for text in data or ():
        name, equals, place = text.partition("=")
        if not equals or not place:
            raise TaskError(f"--data must be NAME=DATA, got {text!r}")
        places[name] = place
    shape = arguments.quick_shape(model)
    chosen, title = None, "full model"
    if plan is not None or study is not None:
        layers = shape.layers if shape else None
        chosen, title, _ = arguments.chosen_plan("--plan", plan, layers, storage, study, trial)
    from moeopt.tasks.lm_eval.loading import load as load_tasks

    harness = load_tasks(
        names,
        include_path=include_path,
        data=places,
        num_fewshot=num_fewshot,
        unsafe_code=unsafe_code,
        trust_remote_code=trust_remote_code,
    )
    from moeopt.evaluation import lm_eval_report
    from moeopt.models import load
    from moeopt.report.tables import json_text, write
    from moeopt.report.terminal import consoles

    console, err = consoles()
    err.say(f"loading {model}")
    loaded, tokenizer = load(model, device_map=device_map, dtype=dtype, trust_remote_code=trust_remote_code)
    report = partial(
        lm_eval_report, loaded, tokenizer, harness, limit=limit, batch_size=batch_size, chat_template=chat_template,
        unsafe_code=unsafe_code,
    )  # fmt: skip
    small = None if chosen is None else report(chosen)
    full = report()
    console.print(_table(full, small, title))
    if out is not None:
        record = {"full": full.to_json()} | ({} if small is None else {"small": small.to_json(), "plan": title})
        write({out: json_text(record) + "\n"}, MoeoptError)
        console.say(f"saved to {out}")


def _table(full: HarnessReport, small: HarnessReport | None, title: str) -> Table:
    from moeopt.report.tables import table

    def score(report: HarnessReport, name: str, key: str) -> str:
        stderr = report[name].stderr.get(key)
        return _short(report[name].metrics[key]) + ("" if stderr is None else f" ± {_short(stderr)}")

    def gain(name: str, key: str) -> str:
        if small is None or key not in full[name].samples:
            return "–"
        change = small[name].difference(full[name], key)
        return f"{_short(change.mean, '+')} [{_short(change.low, '+')}, {_short(change.high, '+')}]"

    columns: list[tuple[str, Callable[[tuple[str, str]], str]]] = [
        ("task", lambda row: row[0]),
        ("version", lambda row: str(full[row[0]].version)),
        ("shots", lambda row: str(full[row[0]].num_fewshot)),
        ("n", lambda row: str(len(full[row[0]].documents))),
        ("metric", lambda row: row[1].removesuffix(",none")),
        ("full", lambda row: score(full, *row)),
    ]
    if small is not None:
        columns += [("small", lambda row: score(small, *row)), ("small − full [95%]", lambda row: gain(*row))]
    rows = [(name, key) for name, result in full.results.items() for key in result.metrics]
    title = f"lm_eval {full.version}, n documents: {title}"
    return table(title, columns, rows, text=("version", "shots", "n", "metric"))


def _short(value: float, sign: str = "") -> str:
    """A number in few characters: a perplexity may be huge."""
    return format(value, f"{sign}.3f" if abs(value) < 1000 else f"{sign}.2e")
