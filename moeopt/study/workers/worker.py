"""A worker: one process that joins a study, rebuilds its objective and sampler, and runs trials until all are there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moeopt import study as studies
from moeopt.errors import StudyError, TaskError, got
from moeopt.study import recipe as recipes
from moeopt.trials.description import described

if TYPE_CHECKING:
    import optuna
    import torch
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

    from moeopt.study import Callback
    from moeopt.tasks import Task

EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Experts implementations of transformers that a study may ask for by name."""


def run_worker(
    storage: str | BaseStorage,
    study_name: str,
    *,
    model: str | os.PathLike[str] | None = None,
    device_map: str | dict[str, int | str] = "auto",
    dtype: str | torch.dtype | None = None,
    n_trials: int | None = None,
    timeout: float | None = None,
    patience: int | None = None,
    task: Task | None = None,
    sampler: str | BaseSampler | None = None,
    pruner: BasePruner | None = None,
    callbacks: Iterable[Callback] = (),
    trust_remote_code: bool = False,
    **options: Any,
) -> optuna.Study:
    """Join a study that `create_study` made, and run trials until it holds all that are wanted.

    Everything but the checkpoint comes from the study, and all of it is checked: the model by its weights, the task by
    its token sequences. The first Ctrl-C lets the running trial finish, the second one does not.

    Args:
        storage: an SQLAlchemy URL, or an Optuna storage.
        study_name: of the study.
        model: folder or hub id of the checkpoint; None for the hub id that the study was made with. A path in a study
            is never followed.
        device_map: as for `moeopt.load`; ``"auto"`` is one GPU of its own where LOCAL_RANK or SLURM_LOCALID says which.
        dtype: of the weights; None for the study's.
        n_trials: finished trials the study shall hold, those of all workers together; None for what the study says.
        timeout: seconds after which no trial starts.
        patience: finished trials without a better one after which none starts; None for what the study says.
        task: what the search was given, where the study cannot hold it (a task that is code of its own).
        sampler, pruner: likewise (an object of Optuna's, code of your own).
        callbacks: of `study.optimize`.
        trust_remote_code: whether code that comes with the checkpoint may run; a study never says so.
        options: for `moeopt.load`.

    Returns:
        The study.

    Raises:
        StudyError: when there is no such study, something of it cannot be rebuilt, the model or the task is another, or
            `n_trials`, `timeout` or `patience` is out of range.
        StorageError: when the storage cannot be opened.
        ModelError: when the checkpoint cannot be loaded.
    """
    from optuna.pruners import BasePruner

    from moeopt.models import check_checkpoint, check_device_map, check_dtype, load, load_tokenizer
    from moeopt.plan import ModelShape
    from moeopt.samplers import get as get_sampler
    from moeopt.study.objective import Objective
    from moeopt.tasks import Task

    check_device_map(device_map)
    check_dtype(dtype)
    if task is not None and not isinstance(task, Task):
        raise TaskError(f"task must be a moeopt.tasks.Task, got {got(task)}")
    if pruner is not None and not isinstance(pruner, BasePruner):
        raise StudyError(f"pruner must be an Optuna pruner object, got {got(pruner)}")
    study = studies.read_study(study_name, storage)
    recipe = recipes.read(study)
    target = recipes.wanted(study) if n_trials is None else n_trials
    patience = recipes.patience_of(study) if patience is None else patience
    if target is None and timeout is None and patience is None:
        raise StudyError(f"study {study_name!r} does not say how many trials it shall hold: give n_trials or timeout")
    studies.check_limits(target, timeout, patience)
    source = recipe.model if model is None else model
    if source is None:
        raise StudyError(
            f"study {study_name!r} does not say where its model is ({recipe.missing.get('model')}): give the checkpoint"
        )
    about = described(study)
    shape = check_checkpoint(source, trust_remote_code=trust_remote_code)
    of_study = about["space"]["shape"]
    searched = ModelShape(**{key: of_study[key] for key in shape.describe() if key in of_study})
    experts = (about.get("evaluation") or {}).get("experts")
    if shape != searched:
        raise StudyError(f"study {study_name!r} searches {searched}, {str(source)!r} has {shape}")
    space = studies.space_of(study)
    if sampler is None:
        sampler = recipes.sampler_of(recipe, space)
    else:
        sampler = get_sampler(sampler, space, seed=about["sampler"].get("seed", 0))
    study.sampler = sampler
    study.pruner = pruner = recipes.pruner_of(recipe) if pruner is None else pruner
    chosen = recipes.task_of(recipe) if task is None else task
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    chosen.check(tokenizer)
    if experts in EXPERTS:
        options.setdefault("experts_implementation", experts)
    placed = local_device() if device_map == "auto" else None
    options |= {"dtype": dtype or recipe.dtype, "trust_remote_code": trust_remote_code}
    loaded, tokenizer = load(source, device_map=placed or device_map, **options)
    try:
        objective = Objective(loaded, tokenizer, chosen, space, **recipes.arguments(recipe))
    except (TypeError, ValueError) as error:
        raise StudyError(f"the objective of study {study_name!r} cannot be rebuilt: {error}") from error
    studies.check_same(study, studies.description_of(objective, sampler, pruner))
    if objective.evaluator.fingerprint != recipe.scored:
        raise StudyError(
            f"study {study_name!r} scores other token sequences than the tokenizer of {str(source)!r} gives"
        )
    studies.optimize(study, objective, n_trials=target, timeout=timeout, patience=patience, callbacks=callbacks)
    return study


def local_device() -> str | None:
    """The GPU of this process where a launcher runs several on a host, one a GPU; None elsewhere."""
    import torch

    rank = local_rank()
    count = torch.cuda.device_count() if rank is not None else 0
    return f"cuda:{rank % count}" if rank is not None and count > 1 else None


def local_rank() -> int | None:
    """Which of this host's processes this is, as torchrun, accelerate or SLURM say; None when none of them does."""
    for variable in ("LOCAL_RANK", "SLURM_LOCALID"):
        if os.environ.get(variable, "").isdecimal():
            return int(os.environ[variable])
    return None


def threads(device_map: str) -> dict[str, str]:
    """A share of the host's cores, as in `fleet.shared`, where a launcher runs several processes without a GPU.

    SLURM binds its tasks to cores of their own where it is told ``--cpus-per-task``.
    """
    import torch

    from moeopt.study.workers.fleet import THREADS, cores

    local = next((os.environ[v] for v in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE") if v in os.environ), "1")
    bound = "SLURM_CPUS_PER_TASK" in os.environ
    on_gpu = torch.cuda.is_available() if device_map == "auto" else device_map != "cpu"
    if on_gpu or bound or THREADS in os.environ or not local.isdecimal() or int(local) < 2:
        return {}
    return {THREADS: str(max(1, cores() // int(local)))}
