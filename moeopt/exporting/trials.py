"""Trials of a study as plans to export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeopt.errors import ExportError
from moeopt.exporting.stock import why_not_stock
from moeopt.plan import Plan
from moeopt.showing import public_command, shown
from moeopt.spaces import space_of
from moeopt.trials.description import COMMAND, described, full_model, held_facts, number
from moeopt.trials.front import completed, objectives_of, points
from moeopt.trials.selected import WINNER, check_scores, recorded

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedModel


def plan_of(trial: FrozenTrial, study: optuna.Study) -> Plan:
    """The plan of a finished trial, from the space that its study describes.

    Raises:
        ExportError: when the study does not say what it searched.
    """
    return space_of(study).plan(trial)


def best_stock_trial(study: optuna.Study) -> FrozenTrial:
    """The completed trial of least loss whose plan a stock checkpoint expresses.

    Raises:
        ExportError: when the study has none, or several objectives.
    """
    if len(study.directions) > 1:
        raise ExportError(f"study {study.study_name!r} has several objectives and no best trial: choose one by number")
    space, trials = space_of(study), completed(study)
    order: list[int] = points(trials, study.directions)[:, 0].argsort(kind="stable").tolist()
    for trial in (trials[i] for i in order):
        if why_not_stock(space.plan(trial)) is None:
            return trial
    raise ExportError(f"study {study.study_name!r} has no completed trial that a stock checkpoint can express")


def check_model(model: PreTrainedModel | str | Path, study: optuna.Study, *, trust_remote_code: bool = False) -> None:
    """Raise ExportError unless the study searched this model; of a mere path only the shape is compared."""
    from moeopt.models import check_checkpoint, describe

    about = described(study)
    if isinstance(model, (str, Path)):
        its_shape, shape = (
            check_checkpoint(model, trust_remote_code=trust_remote_code).describe(),
            about["space"]["shape"],
        )
        if its_shape != shape:
            raise ExportError(f"{str(model)!r} has {its_shape}, the study searched {shape}")
        return
    searched, here = about["model"], describe(model)
    differing = [key for key in ("config_hash", "weights") if searched[key] != here[key]]
    if differing:
        name = shown(searched["name_or_path"])
        raise ExportError(f"study {study.study_name!r} searched another model ({name}): {', '.join(differing)} differ")


def trial_record(trial: FrozenTrial, study: optuna.Study, fingerprint: str) -> dict[str, Any]:
    """What moeopt.json says of a trial and its study, and of what the study holds of the scores of its plan.

    Args:
        trial, study: these.
        fingerprint: of the trial's plan, by which a selection names its winner.

    Raises:
        StudyError: when something of that is not of the form that moeopt writes.
    """
    attrs: dict[str, Any] = {key: trial.user_attrs[key] for key in ("operator", "phase") if key in trial.user_attrs}
    accuracy = number(trial.user_attrs, "accuracy")
    attrs |= {} if accuracy is None else {"accuracy": accuracy}
    record: dict[str, Any] = {
        "study": {"name": study.study_name, **described(study)},
        "trials": len(completed(study)),
        "trial": {"number": trial.number, **dict(zip(objectives_of(study), trial.values or ())), **attrs},
    }
    facts, name = study.user_attrs, study.study_name
    full, held, selection = full_model(facts, name), held_facts(facts, name), recorded(study)
    if full is not None:
        record["full_model"] = {key: full[key] for key in ("loss", "accuracy", "metrics", "examples")}
    if held is not None and held["trial"] == trial.number:
        record["held"] = held
    plans = None if selection is None else selection.get("plans")
    if selection is not None and isinstance(plans, dict) and plans.get(WINNER) == fingerprint:
        check_scores(selection)
        record["selection"] = {key: value for key, value in selection.items() if key != "candidates"}
    if isinstance(facts.get(COMMAND), str):
        record["search_command"] = public_command(facts[COMMAND])
    return record
