"""Whether a study searched what is here: the same model, task, space, sampler and pruner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner

from moeopt.description import DESCRIPTION, check_whole, described, reading
from moeopt.errors import StudyError
from moeopt.samplers.shadow import describe
from moeopt.showing import shown

if TYPE_CHECKING:
    from torch import nn

    from moeopt.objective import Objective
    from moeopt.samplers import GenomeSampler
    from moeopt.tasks import Task

MAY_DIFFER = ("version", "format", "model.name_or_path")
"""Fields of the description that a resumed study need not share: the same weights may lie elsewhere."""


def description_of(objective: Objective, sampler: GenomeSampler, pruner: BasePruner) -> dict[str, Any]:
    """What a study must agree on to be resumed, JSON: model, task, space, evaluation, sampler and pruner."""
    return {**objective.describe(), "sampler": sampler.settings(), "pruner": describe(pruner)}


def check_same(study: optuna.Study, description: dict[str, Any]) -> None:
    """Raise StudyError, naming the fields that differ, unless the study was made with this description."""
    with reading(study.study_name):
        attrs = study.user_attrs
        empty = not attrs and not study.get_trials(deepcopy=False)
    if DESCRIPTION not in attrs:
        if not empty:
            raise StudyError(f"study {study.study_name!r} was not made by moeopt; choose another name")
        return
    stored = check_whole(study)
    differences = [found for found in differences_of(stored, description) if found[0] not in MAY_DIFFER]
    if any(path == "sampler.name" for path, _, _ in differences):  # its hyperparameters differ, too
        differences = [found for found in differences if found[0] == "sampler.name" or found[0][:8] != "sampler."]
    if differences:
        listed = "; ".join(f"{path}: study has {shown(old)}, now {shown(new)}" for path, old, new in differences)
        raise StudyError(f"study {study.study_name!r} cannot be resumed with something else. {listed}")


def check_study(
    study: optuna.Study, task: Task, model: nn.Module | None = None, unseen: Sequence[str] = ("test",)
) -> None:
    """Raise StudyError, naming what differs, unless a study searched this task and this model.

    Args:
        study: it.
        task: its examples must be the same.
        model: None: not loaded yet, not compared.
        unseen: splits that the study must not have searched.
    """
    found = described(study)
    about, own = found["task"], task.describe()
    if about["fingerprint"] != own["fingerprint"]:
        raise StudyError(
            f"study {study.study_name!r} searched another task: {shown(about['name'])} with examples "
            f"{shown(about['fingerprint'][:16])}, here is {own['name']!r} with {own['fingerprint'][:16]}"
        )
    if about["split"] in unseen:
        raise StudyError(
            f"study {study.study_name!r} searched the {about['split']} split: its result there would mean nothing"
        )
    if model is not None:
        from moeopt.models import describe

        ours = describe(model)
        differing = [key for key in ("config_hash", "weights") if found["model"][key] != ours[key]]
        if differing:
            raise StudyError(
                f"study {study.study_name!r} searched another model ({shown(found['model']['name_or_path'])}): "
                + ", ".join(f"{key} {shown(found['model'][key][:16])}, here {ours[key][:16]}" for key in differing)
                + ("; the same weights in another dtype count as others" if differing == ["weights"] else "")
            )


def differences_of(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted path, old and new value of every field in which two descriptions differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences_of(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new and not (isinstance(old, list) and isinstance(new, (list, tuple)) and old == list(new)):
        yield path, old, new
