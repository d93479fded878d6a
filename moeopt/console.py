"""What moeopt shows on a terminal: the progress of a search, tables of plans and of studies."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from moeopt.description import COUNT, check_whole
from moeopt.description import number as numeric
from moeopt.errors import MoeoptError
from moeopt.genome import ESTIMATE
from moeopt.plan import LayerPlan, Matrix, Plan
from moeopt.showing import line, visible

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

PIPE_WIDTH = 120
LINE_EVERY = 10.0
"""Seconds between progress lines where there is no terminal to draw on."""


class Terminal(Console):
    """A console on which text is text: no markup, no emoji codes, and whatever controls a terminal is escaped."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def consoles() -> tuple[Console, Console]:
    """Standard output, and standard error for progress and errors; wide enough for a table when they are pipes."""
    out, err = Terminal(), Terminal(stderr=True)
    for console in (out, err):
        if not console.is_terminal:
            console.width = max(console.width, PIPE_WIDTH)
    return out, err


class SearchProgress:
    """An Optuna callback that shows trial, phase, loss, best and time left: one live line, or a line now and then.

    Args:
        console: where to draw; the live line vanishes at the end.
        trials: finished trials the study shall hold, for the time left; None when it is not known.
        timeout: seconds this run may take.
        quiet: show nothing.
    """

    def __init__(
        self, console: Console, trials: int | None, timeout: float | None = None, *, quiet: bool = False
    ) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.console, self.trials, self.timeout, self.quiet = console, trials, timeout, quiet
        text = TextColumn("{task.description}", markup=False)
        self.live = Progress(SpinnerColumn(), BarColumn(20), text, console=console, transient=True)
        self.bar = self.live.add_task("first trial", total=trials)
        self.before: int | None = None
        self.started = self.since = time.monotonic()
        self.shown = -LINE_EVERY

    def __enter__(self) -> SearchProgress:
        if self.console.is_terminal and not self.quiet:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal and not self.quiet:
            self.live.stop()

    def say(self, line: str) -> None:
        """A line above the live one."""
        self.console.print(line, style="yellow", markup=False, soft_wrap=True)

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        from moeopt.study import finished

        if self.quiet:
            return
        done = finished(study)
        if self.before is None:
            self.before, spent = done - 1, trial.duration
            self.since = time.monotonic() - (spent.total_seconds() if spent else 0.0)
        if trial.state.name == "FAIL":
            reason = trial.user_attrs.get("failure", "its loss is not a number")
            self.say(f"trial {trial.number} failed: {line(reason, 1000)}")
        text = self.line(study, trial, done)
        if self.console.is_terminal:
            self.live.update(self.bar, completed=done, description=text)
        elif time.monotonic() - self.shown >= LINE_EVERY or done == self.trials:
            self.shown = time.monotonic()
            self.console.print(text, markup=False, soft_wrap=True)

    def line(self, study: optuna.Study, trial: FrozenTrial, done: int) -> str:
        best = best_trial(study)
        parts = [
            f"trial {done}" + (f"/{self.trials}" if self.trials else ""),
            line(trial.user_attrs.get("phase") or trial.user_attrs.get("operator") or "", 40),
            _outcome(trial),
            f"best {best.value:.4f} (trial {best.number})" if best is not None else "",
            f"{timedelta(seconds=round(left))} left" if (left := self.left(done)) is not None else "",
        ]
        return " · ".join(part for part in parts if part)

    def left(self, done: int) -> float | None:
        """Seconds until the trials or the time are used up, whichever is first."""
        elapsed = time.monotonic() - self.started
        limits = [] if self.timeout is None else [max(0.0, self.timeout - elapsed)]
        if self.trials is not None:
            searched = time.monotonic() - self.since
            limits.append(searched / max(1, done - (self.before or 0)) * max(0, self.trials - done))
        return min(limits, default=None)


def _outcome(trial: FrozenTrial) -> str:
    if trial.state.name == "PRUNED":
        estimate = trial.user_attrs.get(ESTIMATE)
        return f"pruned, about {estimate:.4f}" if isinstance(estimate, float) else "pruned"
    return "failed" if trial.value is None else f"loss {trial.value:.4f}"


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The completed trial of least loss, the first of equals."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE" and t.value is not None]
    return min(done, key=lambda t: (t.value, t.number), default=None)


def layer_rows(plan: Plan) -> Iterator[dict[str, Any]]:
    """Facts of every run of equal consecutive layers, JSON: layers, experts, merged rows, routing, k, negatives."""
    for layer, run in groupby(enumerate(plan.layers), key=lambda item: item[1]):
        indices = [i for i, _ in run]
        w_em, w_rm = layer.expert_matrix, layer.router_matrix
        yield {
            "layers": f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0]),
            "experts": short(layer),
            "kept": layer.kept_experts,
            "of": layer.experts,
            "k": layer.k,
            "skip": layer.skip,
            "merged_rows": int(_mixed(w_em).sum()),
            "routing": _routing(layer),
            "negative_w_em": int((w_em < 0).sum()),
            "negative_w_rm": int((w_rm < 0).sum()),
        }


def short(layer: LayerPlan) -> str:
    """A layer in a few characters: the expert that leads each row, with ~ where others are mixed in."""
    if layer.kept == tuple(range(layer.experts)):
        return "all"
    leads = np.abs(layer.expert_matrix).argmax(axis=1)
    return " ".join(f"{lead}{'~' if mixed else ''}" for lead, mixed in zip(leads, _mixed(layer.expert_matrix)))


def _mixed(matrix: Matrix) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(~(((matrix == 0) | (matrix == 1)).all(axis=1) & (matrix.sum(axis=1) == 1)))


def _routing(layer: LayerPlan) -> str:
    where = {"rows": "router rows", "prob": "probabilities", "logit": "logits", "alias": "picks"}[layer.router]
    if layer.router == "alias":
        return f"{where}, aliased"
    if layer.router_rows is not None:
        followed = layer.kept is not None and layer.router_rows == layer.kept
        return f"{where}, {'as kept' if followed else 'one-hot'}"
    return f"{where}, dense" + (" (negatives as EEP)" if layer.router == "prob" and layer.negative == "eep" else "")


def plan_table(plan: Plan, title: str | None = None) -> Table:
    """One row for every run of equal layers."""
    first = plan.layers[0]
    table = Table(
        "layers", "experts", "r", "merged rows", "router map", "k", "negative entries",
        title=title, title_justify="left",
        caption=f"n = {first.experts} experts; a ~ marks an expert that others are mixed into", caption_justify="left",
    )  # fmt: skip
    for row in layer_rows(plan):
        negative = f"{row['negative_w_em']} W_EM, {row['negative_w_rm']} W_RM"
        merged = f"{row['merged_rows']} of {row['kept']}"
        active = f"{row['k']}, skip {row['skip']:.2f}" if row["skip"] else str(row["k"])
        table.add_row(
            row["layers"], row["experts"], str(row["kept"]), merged, row["routing"], active,
            negative if row["negative_w_em"] or row["negative_w_rm"] else "none",
        )  # fmt: skip
    return table


def study_record(study: optuna.Study, *, top: int = 10) -> dict[str, Any]:
    """A study in one JSON object: trials by state, best, phases, the `top` trials, what was selected, description.

    Raises:
        StudyError, StorageError: when the study is not one that `moeopt.load_study` opens.
    """
    from moeopt.selection import recorded

    about = check_whole(study)
    trials = study.get_trials(deepcopy=False)
    ranked = sorted((t for t in trials if t.state.name == "COMPLETE"), key=lambda t: (t.value, t.number))
    phases: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        if trial.state.is_finished():
            phase = line(trial.user_attrs.get("phase") or trial.user_attrs.get("operator") or "None", 40)
            phases.setdefault(phase, []).append(trial)
    return {
        "name": study.study_name,
        "trials": {
            state: sum(t.state.name == name for t in trials)
            for state, name in (("done", "COMPLETE"), ("failed", "FAIL"), ("pruned", "PRUNED"), ("running", "RUNNING"))
        },
        "best": trial_record(ranked[0]) if ranked else None,
        "phases": [
            {
                "phase": phase,
                "trials": len(members),
                "best_loss": min(
                    (t.value for t in members if t.state.name == "COMPLETE" and t.value is not None), default=None
                ),
                "seconds": round(sum(numeric(t.user_attrs, "seconds") or 0.0 for t in members), 2),
                "layer_tokens": sum(numeric(t.user_attrs, "layer_tokens") or 0 for t in members),
            }
            for phase, members in phases.items()
        ],
        "top": [trial_record(trial) for trial in ranked[:top]],
        "selection": recorded(study),
        "description": about,
    }


def study_summary(study: optuna.Study) -> dict[str, Any]:
    """`study_record` without trials; of a study that moeopt cannot read name and reason, as ``"unreadable"``."""
    try:
        return study_record(study, top=0)
    except MoeoptError as error:
        return {"name": study.study_name, "unreadable": str(error)}


def json_text(record: Any) -> str:
    """JSON of ASCII characters; numbers that are not finite, which JSON does not have, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), indent=2, allow_nan=False)


def trial_record(trial: FrozenTrial) -> dict[str, Any]:
    """Number, loss and attributes of a completed trial."""
    attrs, parents = trial.user_attrs, trial.user_attrs.get("parents")
    return {
        "number": trial.number,
        "loss": trial.value,
        "accuracy": numeric(attrs, "accuracy"),
        **{key: line(attrs[key], 40) if attrs.get(key) else None for key in ("phase", "operator", "method")},
        "parents": parents if isinstance(parents, list) and all(COUNT.holds(parent) for parent in parents) else None,
        **{key: numeric(attrs, key) for key in ("drift", "active", "seconds", "tokens", "layer_tokens")},
    }


def studies_table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """One row a study."""
    table = Table(
        "study",
        "done",
        "pruned",
        "failed",
        "running",
        "best loss",
        "sampler",
        "task",
        "model",
        title=title,
        title_justify="left",
    )
    for record in records:
        name, about = line(record["name"], 80), record.get("description")
        if about is None:
            table.add_row(name, *["–"] * 5, line(record["unreadable"]), "", "")
            continue
        table.add_row(
            name,
            *(str(record["trials"][state]) for state in ("done", "pruned", "failed", "running")),
            number(record["best"] and record["best"]["loss"]),
            *(
                line(about[part].get(key) or "?", 80)
                for part, key in (("sampler", "name"), ("task", "name"), ("model", "name_or_path"))
            ),
        )
    return table


def study_view(record: dict[str, Any], plan: Plan | None) -> RenderableType:
    """A study's description, phases, best trials, its best plan, and what was selected."""
    about = record["description"]
    facts = Table.grid(padding=(0, 2))
    for label, text in (
        (
            "study",
            f"{line(record['name'])}: " + ", ".join(f"{count} {state}" for state, count in record["trials"].items()),
        ),
        ("model", f"{line(about['model']['name_or_path'])} ({line(about['model']['architecture'])})"),
        ("task", _task_line(about["task"])),
        ("score", line(_evaluation(about).get("score") or "likelihood")),
        ("space", _space_line(about["space"])),
        ("sampler", _sampler_line(about["sampler"])),
    ):
        facts.add_row(Text(label, style="bold"), Text(text))
    if record["best"] is None:
        return Group(facts, Text("no trial is finished yet"))
    phases = Table("phase", "trials", "best loss", "layer-tokens", "seconds", title="phases", title_justify="left")
    for phase in record["phases"]:
        phases.add_row(
            phase["phase"], str(phase["trials"]), number(phase["best_loss"]), f"{phase['layer_tokens']:,}",
            number(phase["seconds"], 1),
        )  # fmt: skip
    label_free = _evaluation(about).get("score") in ("kl", "acceptance")
    top = Table(
        "trial", "loss", "agreement" if label_free else "accuracy", "operator", "parents", "layer-tokens", "seconds",
        title="best trials", title_justify="left",
    )  # fmt: skip
    for trial in record["top"]:
        top.add_row(
            str(trial["number"]), number(trial["loss"]), percent(trial["accuracy"]),
            str(trial["method"] or trial["operator"] or ""),
            " ".join(map(str, trial["parents"] or ())), f"{trial['layer_tokens'] or 0:,}", number(trial["seconds"], 2),
        )  # fmt: skip
    shown: list[RenderableType] = [facts, phases, top]
    if plan is not None:
        shown.append(plan_table(plan, f"plan of the best trial, {record['best']['number']}"))
    if record["selection"] is not None:
        from moeopt.selection import view

        shown.append(view(record["selection"]))
    return Group(*shown)


def _task_line(task: dict[str, Any]) -> str:
    count = (task.get("examples") or {}).get(task["split"])
    limit = f", first {task['limit']}" if task.get("limit") else ""
    return f"{line(task['name'])}, split {line(task['split'])}" + (f" of {count} examples{limit}" if count else limit)


def _space_line(space: dict[str, Any]) -> str:
    shape, groups = space["shape"], len(space["groups"])
    return (
        f"{line(space['kind'])}: {shape['layers']} layers in {groups} groups, {space['keep']} of {shape['experts']} "
        f"experts kept, {space['k']} active, router {line(space['router'])}"
    )


def _sampler_line(sampler: dict[str, Any]) -> str:
    settings = (f"{line(key, 40)}={line(value, 80)}" for key, value in sampler.items() if key != "name")
    return f"{line(sampler.get('name') or '?')}: {', '.join(settings)}"


def _evaluation(description: dict[str, Any]) -> dict[str, Any]:
    """How trials were scored; studies of the first versions do not say, as there was one way."""
    return description.get("evaluation") or {}


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share from 0 to 1 as percent for a table, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}%"
