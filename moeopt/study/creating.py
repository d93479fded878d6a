"""Studies made, or resumed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.pruners import BasePruner

from moeopt import samplers
from moeopt.defaults import DEFAULT_STORAGE
from moeopt.errors import StudyError
from moeopt.evaluation.throughput import BATCH_TOKENS
from moeopt.samplers.racing import NOISE_FLOOR, RacingPruner
from moeopt.spaces.serving import check_servers, demands
from moeopt.study import recipe
from moeopt.study.checks import check_objective, description_of
from moeopt.study.opening import check_name, find
from moeopt.study.reclaiming import reclaim
from moeopt.study.storage import check_storage, is_new, open_storage, readable_errors
from moeopt.study.warm_starts import AUTO, WarmStarts, calibrated, checked, enqueue_new
from moeopt.trials.description import DESCRIPTION, SERVING, check_same, serving
from moeopt.trials.description import write as write_description

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

    from moeopt.study.objective import Objective


def create_study(
    study_name: str | None = None,
    *,
    objective: Objective,
    storage: str | BaseStorage | None = DEFAULT_STORAGE,
    sampler: str | BaseSampler = "eep",
    seed: int = 0,
    pruner: str | BasePruner | None = None,
    load_if_exists: bool = False,
    warm_starts: WarmStarts = (),
    serve_on: str | Sequence[str] = (),
    serve_parallel: int = 1,
    **sampler_options: Any,
) -> optuna.Study:
    """Create a study for an objective, or resume it: an ordinary `optuna.Study` that minimises the task loss.

    Args:
        study_name: its name in the storage; Optuna makes one up by default.
        objective: what is minimised; the study keeps a description of its model, task and space.
        storage: an SQLAlchemy URL (SQLite, PostgreSQL, MySQL/MariaDB), an Optuna storage, or None for memory.
        sampler: ``"eep"``, ``"cmaes"``, ``"tpe"``, ``"random"``, ``"nevergrad:NAME"``, or any Optuna sampler.
        seed: of the sampler, where it is given by name.
        pruner: ``"racing"`` (`RacingPruner`), any Optuna pruner, or None; one that prunes needs an objective with
            `rungs`. For racing, the noise floor is measured first, on the first rung.
        load_if_exists: resume a study of this name. Trials that died with a worker of this host are queued again.
        warm_starts: what to evaluate next, unless the study did so before: plans, names of `moeopt.methods`, which are
            then calibrated on the objective's examples, or what methods found, by name; ``"auto"`` stands for
            ``["naee", "loss_aware"]`` in spaces that prune, as far as they run here, and beyond 64 experts for
            ``["loss_aware"]``. Such trials have their method's name as user attribute ``method``. EEP counts them among
            its initial solutions.
        serve_on: servers that shall load what is found, of ``"vllm"``, ``"sglang"`` and ``"llama.cpp"``: what they ask
            for and plans of the space do not give is warned of, and kept in the study's user attribute ``serving``.
        serve_parallel: over how many ranks they divide the experts of a layer.
        sampler_options: hyperparameters of a sampler given by name.

    Warns:
        UserWarning: what a server of `serve_on` asks for (`moeopt.spaces.demands`).

    Raises:
        StudyError: when the name is taken (and `load_if_exists` is not set), or the study to resume was made with
            another model, task, space, sampler or pruner; the message names the fields that differ. Also when the
            pruner is unknown, the objective has a single rung, or more memory is needed than is free (`needs_of`).
        StorageError: when the storage cannot be opened or is not Optuna's.
        SamplerError: when the sampler is unknown or its options are.
        MethodError: when a method is unknown.
        SpaceError: when a warm start is not a plan of the objective's space.
        ExportError: when a server is unknown, or `serve_parallel` is no size.
    """
    if study_name is not None:
        check_name(study_name)
    check_objective(objective)
    servers = check_servers(serve_on, serve_parallel)
    if storage is not None:
        check_storage(storage)
    chosen = samplers.get(sampler, objective.space, seed=seed, **sampler_options)
    directions = list(getattr(objective, "directions", ["minimize"]))  # an objective of the user's own has one
    chosen.check_objectives(len(directions))
    if isinstance(chosen, samplers.GuidedSampler) and not getattr(objective, "guide", 0.0):
        warnings.warn(
            "the sampler 'guided' searches as 'local' does without guides: Objective(guide=0.3)", stacklevel=2
        )
    asked = demands(objective.space, servers, serve_parallel, objective.model.config.to_dict()) if servers else []
    for demand in asked:
        warnings.warn(str(demand), stacklevel=2)
    starts = checked(warm_starts, objective.space)
    racer = _pruner(pruner, objective)
    opened: BaseStorage | None = None
    if not isinstance(storage, str) or not is_new(storage):  # a file is made when nothing else can go wrong
        opened = open_storage(storage) if isinstance(storage, str) else storage
    with readable_errors(storage):
        existing = find(opened, study_name)
        if existing is not None:
            if not load_if_exists:
                raise _taken(study_name)
            chosen.adopt_seed(existing)
    description = description_of(objective, chosen, racer)
    evaluates = hasattr(objective, "evaluator")  # an objective of the user's own may score a space without a model
    if existing is not None:
        with readable_errors(storage):
            check_same(existing, description)
            if evaluates:
                objective.go_on_as(existing, BATCH_TOKENS)
    existing_attrs = [] if existing is None else [trial.user_attrs for trial in existing.get_trials(deepcopy=False)]
    if evaluates:
        from moeopt.study.needs import needs_of

        by_name = [name for name, start in starts if name is not None and start is None]
        needs_of(objective, warm_starts=by_name, storage=storage).check()
    planned = calibrated(starts, objective, existing_attrs, optional=warm_starts == AUTO)
    if opened is None and isinstance(storage, str):
        opened = open_storage(storage)
    with readable_errors(storage):
        try:
            study = optuna.create_study(
                study_name=study_name,
                storage=opened,
                sampler=chosen,
                pruner=racer,
                directions=directions,
                load_if_exists=load_if_exists,
            )
        except DuplicatedStudyError:
            raise _taken(study_name) from None
        if len(directions) > 1 and existing is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                study.set_metric_names(list(objective.objectives))
        if DESCRIPTION in study.user_attrs:
            check_same(study, description)  # another process may have made it since
        else:
            write_description(study, description)
        if servers:
            asks = [str(demand) for demand in asked]
            study.set_user_attr(SERVING, {"on": list(servers), "parallel": serve_parallel, "asks": asks})
        if isinstance(racer, RacingPruner) and racer.noise_floor is None and NOISE_FLOOR not in study.user_attrs:
            study.set_user_attr(NOISE_FLOOR, objective.noise_floor().value)
        if opened is not None:
            recipe.write(study, objective, chosen, racer)
        enqueue_new(study, objective.space, planned, existing_attrs)
        reclaim(study)
    return study


def serving_demands(study: optuna.Study) -> list[str]:
    """What the servers that the study's plans are for ask of them and its space does not give, in sentences."""
    served = serving(study.user_attrs, study.study_name)
    return [] if served is None else list(served["asks"])


def _taken(study_name: str | None) -> StudyError:
    return StudyError(
        f"study {study_name!r} already exists; resume it with load_if_exists=True, or choose another name"
    )


def _pruner(pruner: str | BasePruner | None, objective: Objective) -> BasePruner:
    if pruner is None or isinstance(pruner, optuna.pruners.NopPruner):
        return optuna.pruners.NopPruner()
    if not isinstance(pruner, BasePruner) and pruner != "racing":
        raise StudyError(f"a pruner is 'racing', an Optuna pruner object or None, got {pruner!r}")
    if len(objective.evaluator.rungs) == 1:
        raise StudyError(
            f"pruner {pruner if isinstance(pruner, str) else type(pruner).__name__!r} has nothing to prune: the "
            f"objective scores its {objective.evaluator.examples} examples in one rung; give it Objective(rungs=5)"
        )
    racer = pruner if isinstance(pruner, BasePruner) else RacingPruner()
    names = objective.objectives
    if not objective.goals.races or (len(names) > 1 and not isinstance(racer, RacingPruner)):
        raise StudyError(
            f"pruner {type(racer).__name__!r} cannot prune trials of {', '.join(names)}: RacingPruner races the loss, "
            "beside objectives that are of a plan alone, such as bytes"
        )
    return racer
