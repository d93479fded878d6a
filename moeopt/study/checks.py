"""Whether a study searched what is here: the same model, task, space, sampler and pruner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner, NopPruner

from moeopt.errors import StudyError, got
from moeopt.samplers import GenomeSampler, UnknownSampler
from moeopt.samplers.shadow import describe
from moeopt.showing import shown
from moeopt.spaces import Space
from moeopt.study.storage.attributes import check_sampler, record_sampler, recorded_sampler
from moeopt.trials.description import DESCRIPTION, check_same, described, go_on

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from torch import nn

    from moeopt.study.objective import Objective
    from moeopt.tasks import Task


def description_of(objective: Objective, sampler: BaseSampler, pruner: BasePruner) -> dict[str, Any]:
    """What a study must agree on to be resumed, JSON: model, task, space, evaluation, sampler and pruner."""
    return {**objective.describe(), "sampler": settings_of(sampler), "pruner": describe(pruner)}


def check_objective(objective: object) -> None:
    """Raise StudyError for what does not say, as an objective of moeopt does, what it searches, and where."""
    space, describes = getattr(objective, "space", None), callable(getattr(objective, "describe", None))
    if isinstance(objective, type) or not isinstance(space, Space) or not describes:
        raise StudyError(f"objective must be a moeopt.Objective, got {got(objective)}")


def settings_of(sampler: BaseSampler) -> dict[str, Any]:
    """The settings of a sampler of moeopt, or what one of Optuna's own, used as it is, shows of itself."""
    if isinstance(sampler, GenomeSampler):
        return sampler.settings()
    return {"name": type(sampler).__name__, "plain": describe(sampler)}


def check_goes_on(study: optuna.Study, objective: Objective) -> None:
    """Raise StudyError, naming what differs, unless a study goes on as it was made.

    A study of `create_study` is held against all that it is made with. In one of plain `optuna.create_study` the first
    trial notes the sampler, and later ones are held against that.
    """
    sampler = study.sampler
    if isinstance(sampler, UnknownSampler):
        raise StudyError(sampler.why)
    if isinstance(sampler, GenomeSampler):
        sampler.adopt_seed(study)
    if DESCRIPTION in study.user_attrs:
        raced = len(objective.evaluator.rungs) > 1  # else no pruner has anything to do, and any counts as none
        check_same(study, description_of(objective, sampler, study.pruner if raced else NopPruner()), go_on(study))
        return
    if recorded_sampler(study) is None:
        record_sampler(study, settings_of(sampler))
    check_sampler(study, settings_of(sampler))


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
    description = described(study)
    searched, here = description["task"], task.describe()
    if searched["fingerprint"] != here["fingerprint"]:
        raise StudyError(
            f"study {study.study_name!r} searched another task: {shown(searched['name'])} with examples "
            f"{shown(searched['fingerprint'][:16])}, here is {here['name']!r} with {here['fingerprint'][:16]}"
        )
    if searched["split"] in unseen:
        raise StudyError(
            f"study {study.study_name!r} searched the {searched['split']} split: its result there would mean nothing"
        )
    if model is not None:
        from moeopt.models import describe

        ours = describe(model)
        differing = [key for key in ("config_hash", "weights") if description["model"][key] != ours[key]]
        if differing:
            raise StudyError(
                f"study {study.study_name!r} searched another model ({shown(description['model']['name_or_path'])}): "
                + ", ".join(
                    f"{key} {shown(description['model'][key][:16])}, here {ours[key][:16]}" for key in differing
                )
                + ("; the same weights in another dtype count as others" if differing == ["weights"] else "")
            )
