"""Whether an objective is given what it takes, and whether a study searched what is here: the same model, task, space,
sampler and pruner."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.pruners import BasePruner, NopPruner

from moeopt.errors import MoeoptError, SpaceError, StudyError, got
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


def check_space(space: Any, model: nn.Module) -> None:
    """Raise SpaceError unless this is a space for models of this shape, whose plans the model takes.

    Warns where plans run on the model, and moeopt could not export them.
    """
    from moeopt.models import check_takes, shape_of
    from moeopt.models.layers import has_custom_form

    if not isinstance(space, Space):
        raise SpaceError(f"space must be one of moeopt's, such as moeopt.EEPSpace.of(model, keep=4), got {got(space)}")
    shape = shape_of(model)
    if shape != space.shape:
        raise SpaceError(f"the space is for {space.shape}, the model has {shape}")
    for plan in space.extremes():
        try:
            check_takes(model, plan)
        except MoeoptError as error:
            merges = "prune" in space.phases and any(layer.makes_experts for layer in plan.layers)
            why = f"{error}; PruneSpace searches prunings" if merges else str(error)
            raise SpaceError(f"{type(space).__name__} has plans that the model does not take: {why}") from error
    if "merge" in space.phases and space.router == "prob" and not has_custom_form(model):
        warnings.warn(
            f"{type(space).__name__} maps probabilities, which needs a class that moeopt has none of for "
            f"{type(model).__name__}: of its plans only prunings export; with router='logit' or 'rows' all do",
            stacklevel=3,
        )


def check_options(*, rungs: Any, report: Any, active_weight: Any, guide: Any) -> None:
    """Raise StudyError, naming the argument, unless an objective takes these."""
    if isinstance(rungs, bool) or not isinstance(rungs, int) or rungs < 1:
        raise StudyError(f"rungs must be an integer of at least 1, got {rungs!r}")
    if report not in ("mean", "block"):
        raise StudyError(f"report must be 'mean' or 'block', got {report!r}")
    weighs = isinstance(active_weight, (int, float)) and not isinstance(active_weight, bool)
    if not weighs or not 0 <= active_weight < float("inf"):
        raise StudyError(f"active_weight must be a number of at least 0, got {active_weight!r}")
    if isinstance(guide, bool) or not isinstance(guide, (int, float)) or not 0 <= guide < 1:
        raise StudyError(f"guide is the share of layer-tokens for guides, at least 0 and below 1, got {guide!r}")


def warn_of_too_little(task: Task, split: str, limit: int | None, examples: int) -> None:
    """Say what a task lacks for a search of which `examples` (text: windows) are in use."""
    lacks = " and ".join(f"no {name} split" for name in ("dev", "test") if name not in task.splits)
    if lacks:
        warnings.warn(
            f"task {task.name!r} has {lacks} (it has {task.summary}): whether what is found holds on examples that the"
            " search has not seen cannot be told. Give more rows, or a file for each split",
            stacklevel=4,
        )
    distinct = examples
    if task.unit == "examples":  # not windows
        examples, distinct = len(task.examples(split)), len({example.likeness for example in task.examples(split)})
    if limit is not None and distinct < limit:
        repeats = f", {distinct:,} of them distinct" if distinct < examples else ""
        warnings.warn(
            f"the limit is {limit:,}, but the {split} split of task {task.name!r} gives {examples:,}"
            f" {task.unit.replace('documents', 'windows')}{repeats} (it has {task.summary})",
            stacklevel=4,
        )


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
