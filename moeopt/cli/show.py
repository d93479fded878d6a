"""`moeopt show`, studies as tables or JSON, and `moeopt plan`, a plan layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeopt.cli import arguments
from moeopt.cli import options as opt
from moeopt.cli.options import DEFAULT_STORAGE, OUT
from moeopt.errors import MoeoptError, PlanError

EXAMPLES = "[bold]Examples[/bold]\n\nmoeopt show --storage sqlite:///moeopt.db\n\nmoeopt show boolq-8to4 --json"
PLAN_EXAMPLES = (
    "[bold]Examples[/bold]\n\nmoeopt plan pruned.safetensors\n\n"
    "moeopt plan squad_budget_4.pth --layers 32 --out squad.safetensors\n\nmoeopt plan --study boolq-8to4 --trial 57"
)


def show(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="A study; without it, all are listed.")] = None,
    storage: opt.Storage = DEFAULT_STORAGE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the studies of a storage, or show one: what it searches, its best trials and the best plan."""
    from moeopt import study as room
    from moeopt.report.tables import json_text
    from moeopt.report.terminal import consoles, layer_rows, studies_table, study_record, study_summary, study_view
    from moeopt.study.storage import hidden, open_storage, readable_errors, study_names
    from moeopt.trials.description import reading

    out, _ = consoles()
    if study is None:
        import optuna

        opened = open_storage(storage, create=False)
        records = []
        with readable_errors(storage), reading("in the storage"):
            for name in study_names(opened):
                try:
                    with reading(name):
                        loaded = optuna.load_study(study_name=name, storage=opened)
                except MoeoptError as error:
                    records.append({"name": name, "unreadable": str(error)})
                else:
                    records.append(study_summary(loaded))
        if as_json:
            print(json_text(records))
        else:
            out.print(studies_table(records, f"studies in {hidden(storage)}"))
        return
    opened_study = room.read_study(study, storage)
    with readable_errors(storage):
        record = study_record(opened_study)
    plan = None if record["best"] is None else arguments.plan_of(opened_study, str(record["best"]["number"]))[1]
    if as_json:
        print(json_text(record | {"best_plan": None if plan is None else list(layer_rows(plan))}))
    else:
        out.print(study_view(record, plan))


def plan(
    source: Annotated[
        Path | None, typer.Argument(metavar="[SOURCE]", help="Plan file of moeopt, or an EEP .pth.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="MoE layers of the model an EEP .pth is for.")] = None,
    study: opt.StudyName = None,
    trial: opt.Trial = "best",
    storage: opt.Storage = DEFAULT_STORAGE,
    out: Annotated[Path | None, OUT(help="Save the plan to this file.")] = None,
) -> None:
    """Show a plan layer by layer, and whether an ordinary checkpoint can hold it; read it from a file or a study."""
    shown, title, _ = arguments.chosen_plan("SOURCE", source, layers, storage, study, trial)
    if out is not None:
        try:
            shown.save(out)
        except OSError as error:
            raise PlanError(f"cannot write {str(out)!r}: {error.strerror or error}") from None
    from moeopt.exporting import why_not_stock
    from moeopt.report.terminal import consoles, plan_table

    console, _ = consoles()
    console.print(plan_table(shown, title))
    reason = why_not_stock(shown)
    console.say(
        "An ordinary checkpoint can hold this plan."
        if reason is None
        else f"No ordinary checkpoint holds it, a custom one does: {reason}"
    )
    if out is not None:
        console.say(f"saved to {out}")
