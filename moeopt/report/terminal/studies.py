"""Studies as JSON records, and those as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from optuna.study import StudyDirection
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moeopt.errors import MoeoptError
from moeopt.plan import Plan
from moeopt.report.facts import facts, is_label_free
from moeopt.report.formatting import DASH, number, percent
from moeopt.report.tables import Columns, table
from moeopt.report.terminal.plans import plan_table
from moeopt.showing import line
from moeopt.study.guards import changes
from moeopt.study.reference import MOST_SHOWN, Reference, of_facts
from moeopt.trials.description import COUNT, check_whole, full_model, held_facts, objective_names, serving
from moeopt.trials.description import number as numeric
from moeopt.trials.front import front, is_feasible, points
from moeopt.trials.objectives import LOSS

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


def study_record(study: optuna.Study, *, top: int = 10) -> dict[str, Any]:
    """A study in one JSON object: trials by state, best, phases, the `top` trials, full model, selected, description.

    Raises:
        StudyError, StorageError: when the study is not one that `moeopt.load_study` opens.
    """
    from moeopt.results.selection import recorded
    from moeopt.study import foreign_trials

    about = check_whole(study)
    trials = study.get_trials(deepcopy=False)
    names = objective_names(about)
    done = [t for t in trials if t.state.name == "COMPLETE"]
    signed = points(done, study.directions).tolist()
    ranked = [t for t, _ in sorted(zip(done, signed), key=lambda each: (not is_feasible(each[0]), each[1]))]
    best = front(study)  # of several objectives, all that is best
    if len(names) > 1:
        ranked = best
    phases: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        if trial.state.is_finished():
            phase = line(trial.user_attrs.get("phase") or trial.user_attrs.get("operator") or "None", 40)
            phases.setdefault(phase, []).append(trial)
    best_of = max if study.directions[0] == StudyDirection.MAXIMIZE else min
    return {
        "name": study.study_name,
        "trials": {
            state: sum(t.state.name == name for t in trials)
            for state, name in (("done", "COMPLETE"), ("failed", "FAIL"), ("pruned", "PRUNED"), ("running", "RUNNING"))
        },
        "objectives": list(names),
        "best": trial_record(best[0], names) if best else None,
        "guards": [{**each.record, "told": str(each)} for each in (changes(study, best[0]) if best else ())],
        "phases": [
            {
                "phase": phase,
                "trials": len(members),
                "best_loss": best_of((t.values[0] for t in members if t.state.name == "COMPLETE"), default=None),
                "seconds": round(sum(numeric(t.user_attrs, "seconds") or 0.0 for t in members), 2),
                "layer_tokens": sum(numeric(t.user_attrs, "layer_tokens") or 0 for t in members),
            }
            for phase, members in phases.items()
        ],
        "top": [trial_record(trial, names) for trial in ranked[:top]],
        "full_model": full_model(study.user_attrs, study.study_name),
        "held": held_facts(study.user_attrs, study.study_name),
        "serving": serving(study.user_attrs, study.study_name),
        "foreign": foreign_trials(study),
        "selection": recorded(study),
        "description": about,
    }


def study_summary(study: optuna.Study) -> dict[str, Any]:
    """`study_record` without trials; of a study that moeopt cannot read name and reason, as ``"unreadable"``."""
    try:
        return study_record(study, top=0)
    except MoeoptError as error:
        return {"name": study.study_name, "unreadable": str(error)}


def trial_record(trial: FrozenTrial, names: Sequence[str] = (LOSS,)) -> dict[str, Any]:
    """Number, values and attributes of a completed trial of a study with these objectives."""
    attrs, parents = trial.user_attrs, trial.user_attrs.get("parents")
    return {
        "number": trial.number,
        **dict(zip(names, trial.values)),
        "accuracy": numeric(attrs, "accuracy"),
        **{key: line(attrs[key], 40) if attrs.get(key) else None for key in ("phase", "operator", "method")},
        "breaks": [name for name, value in trial.constraints.items() if not value <= 0],
        "parents": parents if isinstance(parents, list) and all(COUNT.holds(parent) for parent in parents) else None,
        **{key: numeric(attrs, key) for key in ("drift", "active", "seconds", "tokens", "layer_tokens")},
    }


def studies_table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """One row a study; of one that cannot be read, the reason."""

    def of_readable(cell: Callable[[dict[str, Any]], str], otherwise: str = DASH) -> Callable[[dict[str, Any]], str]:
        return lambda record: cell(record) if "unreadable" not in record else otherwise

    def state(name: str) -> Callable[[dict[str, Any]], str]:
        return of_readable(lambda record: str(record["trials"][name]))

    def about(part: str, key: str) -> Callable[[dict[str, Any]], str]:
        return of_readable(lambda record: line(record["description"][part].get(key) or "?", 80), "")

    sampler = about("sampler", "name")
    return table(
        title,
        [
            ("study", lambda record: line(record["name"], 80)),
            *((name, state(name)) for name in ("done", "pruned", "failed", "running")),
            ("best loss", of_readable(lambda record: number((record["best"] or {}).get(LOSS)))),
            ("sampler", lambda record: line(record["unreadable"]) if "unreadable" in record else sampler(record)),
            ("task", about("task", "name")),
            ("model", about("model", "name_or_path")),
        ],
        records,
        text=("sampler", "task", "model"),
    )


def study_view(record: dict[str, Any], plan: Plan | None) -> RenderableType:
    """A study's description, phases, best trials, its best plan, and what was selected."""
    about = record["description"]
    full = None if record["full_model"] is None else of_facts(record["full_model"])
    shown = Table.grid(padding=(0, 2))
    trials = ", ".join(f"{count} {state}" for state, count in record["trials"].items())
    lines = [("study", f"{line(record['name'])}: {trials}"), *facts(about)]
    lines.append(("full model", "not scored" if full is None else str(full)))
    lines += [("", line(warning, 1000)) for warning in (() if full is None else full.warnings[:MOST_SHOWN])]
    for guard in record["guards"]:
        lines.append(("best trial", guard["told"]))
    if record["held"] is not None:
        from moeopt.results.selection.gains import Held

        lines.append(("held", str(Held(**record["held"]))))
    if record["serving"] is not None:
        served, parallel = record["serving"], record["serving"]["parallel"]
        ranks = f", experts divided among {parallel} ranks" if parallel > 1 else ""
        lines.append(("to be served by", line(", ".join(served["on"]), 200) + ranks))
        lines += [("", line(ask, 1000)) for ask in served["asks"][:MOST_SHOWN]]
    if record["foreign"]:
        numbers = ", ".join(map(str, record["foreign"][:20])) + (", ..." if len(record["foreign"]) > 20 else "")
        lines.append(("foreign", f"another sampler than the study's made trials {numbers}"))
    for label, text in lines:
        shown.add_row(Text(label, style="bold"), Text(text, style="" if label else "yellow"))
    if not record["top"]:
        return Group(shown, Text("no trial that keeps its constraints is finished yet"))
    phases: Columns = [
        ("phase", itemgetter("phase")),
        ("trials", lambda phase: str(phase["trials"])),
        (f"best {line(record['objectives'][0], 40)}", lambda phase: number(phase["best_loss"])),
        ("layer-tokens", lambda phase: f"{phase['layer_tokens']:,}"),
        ("seconds", lambda phase: number(phase["seconds"], 1)),
    ]
    columns = [
        ("trial", lambda trial: str(trial["number"])),
        *((line(name, 40), _value(name)) for name in record["objectives"]),
        ("agreement" if is_label_free(about) else "accuracy", lambda trial: percent(trial["accuracy"])),
        ("operator", lambda trial: str(trial["method"] or trial["operator"] or "")),
        ("parents", lambda trial: " ".join(map(str, trial["parents"] or ()))),
        ("layer-tokens", lambda trial: f"{trial['layer_tokens'] or 0:,}"),
        ("seconds", lambda trial: number(trial["seconds"], 2)),
    ]
    if any(trial["breaks"] for trial in record["top"]):
        columns.append(("breaks", lambda trial: ", ".join(line(name, 60) for name in trial["breaks"] or ())))
    several = len(record["objectives"]) > 1
    top = [] if full is None or several else [_as_trial(full)]
    title, first = ("front, by its first objective", "first") if several else ("best trials", "best")
    best = table(title, columns, [*top, *record["top"]], text=("operator", "parents", "breaks"))
    parts: list[RenderableType] = [shown, table("phases", phases, record["phases"]), best]
    if plan is not None:
        parts.append(plan_table(plan, f"plan of the {first} trial, {record['best']['number']}"))
    if record["selection"] is not None:
        from moeopt.report.selection import view

        parts.append(view(record["selection"]))
    return Group(*parts)


def _value(name: str) -> Callable[[dict[str, Any]], str]:
    """A cell that shows what a trial gave of an objective."""
    if name == "bytes":
        return lambda trial: f"{trial[name]:,.0f}"
    return lambda trial: number(trial[name])


def _as_trial(full: Reference) -> dict[str, Any]:
    values = {"number": "full model", "loss": full.loss + full.penalty, "accuracy": full.accuracy}
    none = dict.fromkeys(("method", "operator", "parents", "breaks"))
    return {**values, **none, "layer_tokens": full.layer_tokens, "seconds": full.seconds}
