"""What a search will need of memory and storage, told before it starts rather than found in its hundredth trial."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moeopt.errors import StudyError
from moeopt.evaluation.memory import free_bytes, merged_bytes
from moeopt.evaluation.runners import LayerMajor, hidden_dtype
from moeopt.methods.base import Budget, CalibrationSize
from moeopt.models.layerwise import input_device
from moeopt.plan import Plan
from moeopt.study.storage.opening import sqlite_file
from moeopt.trials import genome

if TYPE_CHECKING:
    from moeopt.spaces import Space
    from moeopt.study.objective import Objective

WEIGHTS, STORAGE = "weights", "storage"


@dataclass(frozen=True)
class Need:
    """One thing that takes room.

    Args:
        what: it.
        where: a device as torch names it, ``"cpu"`` being RAM, or ``"storage"``: the study's database.
        bytes: about how many, at most.
        how: what that is for, or what would make it less.
    """

    what: str
    where: str
    bytes: int
    how: str = ""


@dataclass(frozen=True)
class Needs:
    """What a search needs, and what is free.

    Args:
        rows: of all that it needs; the weights are loaded already.
        free: bytes free by `Need.where`, as far as that can be told.
    """

    rows: tuple[Need, ...]
    free: Mapping[str, int]

    def check(self) -> None:
        """Raise StudyError, naming what takes most, where more is needed than is free."""
        needed = Counter[str]()
        for row in self.rows:
            needed[row.where] += row.bytes if row.what != WEIGHTS else 0
        for where, total in needed.items():
            if total > self.free.get(where, total):
                rows = [row for row in self.rows if row.where == where and row.what != WEIGHTS]
                most = max(rows, key=lambda row: row.bytes)
                raise StudyError(
                    f"the search needs about {total / 1e9:.1f} GB of {where}, of which {self.free[where] / 1e9:.1f} GB "
                    f"are free; most of it, {most.bytes / 1e9:.1f} GB, for {most.what} ({most.how})"
                )


def needs_of(
    objective: Objective, *, n_trials: int | None = None, warm_starts: Iterable[str] = (), storage: object = None
) -> Needs:
    """What a search by an objective needs beside the model's weights, which are loaded.

    Args:
        objective: what is minimised.
        n_trials: trials that the study shall hold; None: of each trial.
        warm_starts: names of methods that are calibrated first, on the objective's examples.
        storage: the study's, as for `create_study`; of an SQLite file it is told what its disk has left.

    Raises:
        StorageError: when `storage` is a string that is no URL.
    """
    evaluator, space = objective.evaluator, objective.space
    model, passes = evaluator.model, evaluator.passes
    device, dtype = input_device(model), hidden_dtype(model)
    hidden = int(model.config.get_text_config().hidden_size)
    states = sum(batch.ids.numel() for batch in passes.batches[-1]) * hidden * dtype.itemsize
    weights = Counter[str]()
    for parameter in model.parameters():
        weights["offloaded" if parameter.is_meta else str(parameter.device)] += parameter.nbytes
    rows = [Need(WEIGHTS, place, size, "loaded") for place, size in weights.items()]
    free = {str(device): free_bytes(device), "cpu": free_bytes(torch.device("cpu"))}
    if isinstance(passes.runner, LayerMajor):
        rows.append(Need("hidden states", str(device), 2 * states, "fewer with limit"))
    every = {"": evaluator, **{f" of guard {name}": each for name, each in objective.guards.evaluators.items()}}
    for of, each in every.items():
        prefixes = each.passes.runner.prefixes if isinstance(each.passes.runner, LayerMajor) else None
        if prefixes is not None and prefixes.budget:
            rows.append(Need(f"reused prefixes{of}", str(prefixes.device or device), prefixes.budget, "prefix_memory"))
    if "merge" in space.phases:
        rows.append(_merged(objective, str(device)))
    batch_tokens = max(batch.ids.numel() for rung in passes.batches for batch in rung)
    shape = CalibrationSize(evaluator.tokens, batch_tokens, evaluator.layers, hidden, dtype.itemsize)
    budget = Budget(space.shape.experts, space.shape.k, space.keep, space.k)
    for name in warm_starts:
        from moeopt import methods

        held = methods.get(name).bytes_held(budget, shape)
        rows.append(Need(f"method {name}", str(device), held, "calibration; less with limit"))
    rows += _trials(space, evaluator.examples, n_trials)
    disk = _disk(storage)
    return Needs(tuple(rows), free if disk is None else {**free, STORAGE: disk})


def _merged(objective: Objective, device: str) -> Need:
    """Experts of the plan that merges most, kept or made anew at every pass."""
    passes = objective.evaluator.passes
    largest = max(objective.space.extremes(), key=lambda plan: merged_bytes(passes.moe, plan))
    whole = merged_bytes(passes.moe, largest)
    scratch = max(merged_bytes([layer], Plan((part,))) for layer, part in zip(passes.moe, largest.layers))
    if passes.where_merged(largest) != "scratch":
        return Need("merged experts", device, whole, "resident, or less with merged_weights='scratch'")
    return Need("merged experts", device, scratch, f"scratch; resident would take {whole / 1e9:.1f} GB")


def _trials(space: Space, examples: int, n_trials: int | None) -> list[Need]:
    """Genotypes and scores of trials, stored, and held by the sampler."""
    x = space.sample(np.random.default_rng(0))
    if "merge" in space.phases:  # numbers that differ are what compresses least
        x = space.snap(np.random.default_rng(0).uniform(space.low, space.high))
    packed = sum(len(str(value)) for value in genome.pack(genome.GENOME, x).values())
    scores = 2 * 4 * examples  # losses and correctness, float32, hardly compressed
    many = 1 if n_trials is None else n_trials
    each = "a trial" if n_trials is None else f"{n_trials} trials"
    return [
        Need("trials", STORAGE, many * (packed + scores), each),
        Need("the sampler's history", "cpu", many * x.nbytes, f"{each} of {x.size:,} numbers"),
    ]


def _disk(storage: object) -> int | None:
    """Bytes free where an SQLite file is or will be; None for what is no such file."""
    file = sqlite_file(storage) if isinstance(storage, str) else None
    return None if file is None or not file.parent.is_dir() else shutil.disk_usage(file.parent).free
