"""What every sampler promises on every space. Objectives are cheap functions of the plan; no model is needed.

One search of every sampler on every space; pruners, workers and storages take turns, so that every pair of them and of
one with each sampler and each space is tried.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from databases import servers
from optuna.trial import FrozenTrial, TrialState

from moeopt.errors import SamplerError
from moeopt.plan import ModelShape, Plan
from moeopt.samplers import SAMPLERS, GenomeSampler, get, operators
from moeopt.spaces import ActiveSpace, EEPSpace, MergeSpace, PruneSpace, Space
from moeopt.trials import genome

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SHAPE = ModelShape(layers=6, experts=6, k=2)
GROUPED = ModelShape(layers=6, experts=6, k=2, router_groups=2)
AROUND = Plan.one_hot([[0, 2, 4]] * 3 + [[1, 2, 5]] * 3, experts=6, k=2)

SPACES: dict[str, Callable[[], Space]] = {
    "scores": lambda: PruneSpace(SHAPE, keep=3, groups=3),
    "rows": lambda: PruneSpace(SHAPE, keep=3, groups=3, encoding="rows"),
    "subset": lambda: PruneSpace(SHAPE, keep=3, groups=3, encoding="subset"),
    "merge": lambda: MergeSpace(SHAPE, around=AROUND, groups=2),
    "eep": lambda: EEPSpace(SHAPE, keep=3, groups=2),
    "active": lambda: ActiveSpace(PruneSpace(SHAPE, keep=3, groups=3), k=(1, 2), skip=True, groups=2),
    "active alone": lambda: ActiveSpace(SHAPE, k=(1, 2)),
    "grouped": lambda: PruneSpace(GROUPED, keep=4, groups=3),
    "range": lambda: PruneSpace(SHAPE, keep=(2, 4), total=18, groups=3),
    "order": lambda: PruneSpace(
        SHAPE, keep=(2, 5), total=21, order=[[3, 0, 5, 1, 2, 4]] * 3 + [[0, 1, 2, 3, 4, 5]] * 3
    ),
    "range eep": lambda: EEPSpace(SHAPE, keep=(2, 4), total=18, groups=2),
    "grouped eep": lambda: EEPSpace(GROUPED, keep=4, groups=2, router="rows"),
}

Make = Callable[..., GenomeSampler]


def named(name: str, **options: Any) -> Make:
    return lambda space, seed=1, **more: get(name, space, seed=seed, **(options | more))


def wrapped(make: Callable[[], optuna.samplers.BaseSampler]) -> Make:
    return lambda space, seed=1, **more: get(make(), space, seed=seed, **more)


MAKE: dict[str, Make] = {
    "eep": named("eep", initial=3, prune_until=6),
    **{name: named(name) for name in SAMPLERS if name not in ("eep", "evoesap", "nevergrad", "gp")},
    "gp": named("gp", n_startup_trials=8),
    **{f"nevergrad:{o}": named(f"nevergrad:{o}") for o in ("DE", "OnePlusOne", "PSO", "NGOpt", "OldCMA", "NelderMead")},
    "optuna TPE": wrapped(lambda: optuna.samplers.TPESampler(multivariate=True, n_startup_trials=5)),
    "optuna NSGA-II": wrapped(lambda: optuna.samplers.NSGAIISampler(population_size=5)),
    "optuna QMC": wrapped(lambda: optuna.samplers.QMCSampler(seed=0)),
    "optuna nested": wrapped(lambda: optuna.samplers.PartialFixedSampler({}, optuna.samplers.RandomSampler())),
    "evoesap": named("evoesap", population=8, elites=3),
}

TRIALS = {"tpe": 50, "optuna TPE": 50, "gp": 25}
"""Of those that take long to ask."""
GOOD = {"gp": 0.2}
"""The share of random plans that the best is among, where it is not a twentieth: 25 trials, 8 of them random."""

SIBLINGS = (
    "nevergrad:PSO", "nevergrad:NGOpt", "nevergrad:OldCMA", "nevergrad:NelderMead", "sepcmaes", "nsgaiii", "gp",
    "optuna NSGA-II", "optuna QMC", "optuna nested",
)  # fmt: skip
"""Other names of code that others stand for: on every fourth space."""

each_sampler = pytest.mark.parametrize("name", MAKE)


def in_turn(*kinds: str) -> pytest.MarkDecorator:
    """Every sampler on one of these spaces, every space with some of the samplers: what the base class promises."""
    return pytest.mark.parametrize(("name", "kind"), list(zip(MAKE, cycle(kinds))))


def loss_of(plan: Plan) -> float:
    """How far each layer's mixture is off a target: smooth in the matrices, with interactions between experts.

    Some layers are better off with one active expert, and all with some skipping.
    """
    total = 0.0
    for i, layer in enumerate(plan.layers):
        experts, target = _layer_data(i // 2, layer.experts)
        mixture = (layer.expert_matrix + 0.5 * layer.router_matrix).mean(axis=0) @ experts
        total += float(((mixture - target) ** 2).mean())
        total += (2 - layer.k) * (0.2 if i % 3 else -0.3) + layer.skip * (layer.skip - 0.6)
    return total / len(plan.layers)


@cache
def _layer_data(i: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([7, i])
    return rng.standard_normal((experts, 12)), rng.standard_normal(12)


def run(name: str, space: Space, n: int, study: optuna.Study | None = None, **options: Any) -> optuna.Study:
    study = study or optuna.create_study()
    study.sampler = MAKE[name](space, **options)
    for _ in range(n):
        trial = study.ask()
        plan = space.plan(trial)
        if space.shape.router_groups > 1:
            assert all([row // 3 for row in layer.router_rows or ()] == [0, 0, 1, 1] for layer in plan.layers)
        study.tell(trial, loss_of(plan))
    return study


def proposals(study: optuna.Study) -> list[bytes]:
    """The genotypes that were evaluated, by slot; those of trials that died are evaluated again."""
    trials = study.trials
    by_slot = {genome.slot(trial, trials): stored(trial).tobytes() for trial in trials}
    return [by_slot[slot] for slot in sorted(by_slot)]


def stored(trial: FrozenTrial) -> np.ndarray:
    x = genome.read(trial)
    assert x is not None
    return x


def plans(study: optuna.Study) -> list[str]:
    return [genome.origin(trial)["plan"] for trial in study.trials]


UNSEEDED = ("nevergrad:NelderMead", "nevergrad:NGOpt", "optuna QMC")
"""Scipy's methods, NGOpt's choice here among them, draw nothing at random; the QMC sampler was made with its seed."""
STUBBORN = ("nevergrad:NelderMead", "nevergrad:NGOpt")
"""Scipy's local methods: on a plateau they ask for one plan more often than any bound."""
CAREFUL = ("nevergrad:OldCMA", "nevergrad:NelderMead")
"""Pycma as Nevergrad sets it up, and scipy's simplex, begin with steps too small for 90 trials of 72 numbers."""
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=2),
    "hyperband": lambda: optuna.pruners.HyperbandPruner(1, 4, 2),
}


class Search:
    """A search by one or two workers in turn: with two, the next trial starts before the last one has ended.

    One plan in seven fails. Where there is a pruner a trial reports four times, and when pruned has an estimate.
    """

    def __init__(
        self, name: str, kind: str, pruner: str, workers: int, url: str | None = None, sign: float = 1
    ) -> None:
        self.name, self.kind, self.pruner, self.workers, self.url, self.sign = name, kind, pruner, workers, url, sign
        self.study_name = "contract"  # on which Hyperband's brackets depend
        self.storage: Any = self._storage() or optuna.storages.InMemoryStorage()
        direction = "minimize" if sign > 0 else "maximize"
        optuna.create_study(study_name=self.study_name, storage=self.storage, direction=direction)
        self._start()

    def _storage(self) -> optuna.storages.RDBStorage | None:
        return None if self.url is None else optuna.storages.RDBStorage(self.url)

    def _start(self) -> None:
        """What new processes do: they have nothing but the storage."""
        self.space, self.running = SPACES[self.kind](), []
        self.samplers = [MAKE[self.name](SPACES[self.kind]()) for _ in range(self.workers)]
        self.study = optuna.load_study(
            study_name=self.study_name, storage=self.storage, sampler=self.samplers[0], pruner=PRUNERS[self.pruner]()
        )

    def run(self, trials: int) -> Search:
        for i in range(trials):
            self.study.sampler = self.samplers[i % self.workers]
            self.running.append(self.study.ask())
            if len(self.running) == self.workers:
                self._finish(self.running.pop(0))
        return self

    def _finish(self, trial: optuna.Trial) -> None:
        plan = self.space.plan(trial)
        frozen = self.study.trials[trial.number]
        assert plan == self.space.decode(stored(frozen)) == self.space.plan(frozen)
        assert genome.origin(frozen)["plan"] == plan.fingerprint
        assert set(trial.params) == (set(self.space.names) if self.space.size <= 48 else {"drift"})
        loss = self.sign * loss_of(plan)
        if int(plan.fingerprint, 16) % 7 == 0:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        for rung in range(4 if self.pruner != "none" else 0):
            trial.report(loss + self.sign / (1 + rung), rung)
            if trial.should_prune():
                trial.set_user_attr("estimate", loss)
                self.study.tell(trial, state=TrialState.PRUNED)
                return
        self.study.tell(trial, loss)

    def killed(self) -> list[int]:
        """Every process dies; new ones mark its running trials failed, and queue them again. Returns which."""
        if self.pruner == "hyperband":  # whose brackets depend on the trials' numbers: nothing may run twice
            running = self.running
            self._start()
            self.running = running
            return []
        if not self.running:
            self.study.sampler = self.samplers[0]
            self.running.append(self.study.ask())
        dead = [trial.number for trial in self.running]
        self.storage = self._storage() or self.storage
        self._start()
        for number in dead:
            self.study.tell(number, state=TrialState.FAIL)
            self.study.add_trial(genome.retry(self.study.trials[number]))
        return dead


def pairs() -> Iterator[Any]:
    """Every sampler on every space, with pruners, workers and storages so that each pair of any two is there."""
    for i, kind in enumerate(SPACES):
        for j, name in enumerate(MAKE):
            pruner, where = list(PRUNERS)[(i + j) % 3], "sqlite" if (2 * i + j) % 7 == 0 else "memory"
            marks = () if i == j % len(SPACES) else (pytest.mark.slow,)
            if marks and name in SIBLINGS and (i + j) % 4:
                continue
            yield pytest.param(name, kind, pruner, 1 + (i + j) % 2, where, marks=marks)


@pytest.mark.parametrize(("name", "kind", "pruner", "workers", "where"), list(pairs()))
def test_a_killed_search_goes_on_as_if_uninterrupted(
    name: str, kind: str, pruner: str, workers: int, where: str, tmp_path: Path
) -> None:
    """On any storage, and when it maximises the negative; and no random state of the process is touched."""
    whole = Search(name, kind, pruner, workers).run(10)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.random.get_rng_state()  # noqa: NPY002
    url = f"sqlite:///{tmp_path}/study.db" if where == "sqlite" else None
    broken = Search(name, kind, pruner, workers, url=url, sign=-1.0).run(6)
    dead = broken.killed()
    again = sum(trial.state == TrialState.WAITING for trial in broken.study.trials)
    broken.run(10 - len(broken.study.trials) + 2 * again)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before[:2]  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert proposals(broken.study) == proposals(whole.study)
    assert len(broken.study.trials) == 10 + len(dead)

    if name not in STUBBORN and kind not in ("subset", "active alone", "order"):
        assert len(set(plans(whole.study))) == 10
    made_by = operators(json.loads(json.dumps(whole.samplers[0].settings())))
    assert made_by is not None, "the class of the sampler names no `operators`"
    assert {genome.origin(trial)["operator"] for trial in whole.study.trials} <= made_by
    history = {obs.number: obs for obs in whole.samplers[0].history(whole.study, whole.study.trials, without=-1)}
    assert len(history) == 10
    for trial in whole.study.trials:
        observation = history[trial.number]
        assert observation.failed == (trial.state == TrialState.FAIL)
        if trial.state == TrialState.PRUNED:
            assert observation.loss == trial.user_attrs["estimate"] != trial.value


def on_servers() -> Iterator[Any]:
    for server in servers():
        for name, kind in (("eep", "subset"), ("cmaes", "merge"), ("nevergrad:DE", "subset"), ("optuna TPE", "merge")):
            yield pytest.param(*server.values, name, kind, id=f"{server.id}-{kind}-{name}", marks=server.marks)


@pytest.mark.slow
@pytest.mark.parametrize(("url", "name", "kind"), list(on_servers()))
def test_servers_give_the_same(url: str, name: str, kind: str) -> None:
    space, study_name, storage = SPACES[kind](), f"contract-{uuid.uuid4()}", optuna.storages.RDBStorage(url)
    try:
        run(name, space, 4, optuna.create_study(storage=storage, study_name=study_name))
        study = run(name, SPACES[kind](), 4, optuna.load_study(storage=storage, study_name=study_name))
        assert proposals(study) == proposals(run(name, SPACES[kind](), 8))
    finally:
        optuna.delete_study(storage=storage, study_name=study_name)
        storage.engine.dispose()


@in_turn("scores", "merge", "active")
def test_settings_and_seeds(name: str, kind: str) -> None:
    space = SPACES[kind]()
    settings = MAKE[name](space).settings()
    assert json.loads(json.dumps(settings)) == settings == MAKE[name](SPACES[kind]()).settings()
    assert settings["seed"] == 1
    assert settings != MAKE[name](space, seed=2).settings()
    assert settings != MAKE[name](space, redraw=3).settings()
    other = proposals(run(name, space, 6, seed=2))
    assert name in UNSEEDED or other[2:] != proposals(run(name, space, 6))[2:]


@pytest.mark.slow
@in_turn("scores", "rows", "subset")
def test_an_exhausted_space_goes_on(name: str, kind: Any) -> None:
    space = PruneSpace(ModelShape(layers=1, experts=3, k=1), keep=2, encoding=kind)
    study = run(name, space, 8, redraw=3)
    assert len(study.trials) == 8
    assert len(set(plans(study))) <= 3


@in_turn("scores", "merge", "active")
def test_enqueued_plan_is_evaluated_as_it_is_and_told(name: str, kind: str) -> None:
    space = SPACES[kind]()
    plan = space.decode(space.sample(np.random.default_rng(5)))
    study = optuna.create_study()
    for _ in range(2):
        study.add_trial(genome.waiting(genome.pack(genome.GENOME, space.encode(plan)), {"why": "a guess"}))
    run(name, space, 4, study)
    assert space.plan(study.trials[0]) == plan
    assert [genome.origin(trial)["operator"] for trial in study.trials[:2]] == ["enqueued"] * 2
    assert name in STUBBORN or plan.fingerprint not in plans(study)[2:]
    history = study.sampler.history(study, study.trials, without=-1)
    assert (history[0].loss, history[0].fingerprint) == (loss_of(plan), plan.fingerprint)
    assert history[0].attrs == {"why": "a guess"}


@pytest.mark.parametrize("name", ["eep", "cmaes", "nevergrad:DE", "optuna TPE"])
def test_enqueue_by_parameter_names(name: str) -> None:
    space = SPACES["rows"]()
    study = optuna.create_study()
    study.enqueue_trial(dict(zip(space.names, [5, 1, 3, 0, 1, 2, 2, 3, 4])))
    study.enqueue_trial({space.names[0]: 4})
    run(name, space, 3, study)
    kept = [layer.kept for layer in space.plan(study.trials[0]).layers]
    assert kept == [(1, 3, 5)] * 2 + [(0, 1, 2)] * 2 + [(2, 3, 4)] * 2
    assert study.trials[1].params[space.names[0]] == stored(study.trials[1])[0] == 4
    assert 4 in space.plan(study.trials[1]).layers[0].kept


@pytest.mark.parametrize("value", ["four", float("nan"), None, [4]])
def test_what_is_enqueued_and_no_number_is_said_and_drawn(value: Any) -> None:
    space = SPACES["rows"]()
    study = optuna.create_study()
    study.enqueue_trial({space.names[0]: value})
    with pytest.warns(UserWarning, match="none of which is a finite number of the space"):
        run("random", space, 2, study)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2


@pytest.mark.slow
@in_turn("scores", "merge", "active")
def test_trials_that_all_fail_are_of_different_plans(name: str, kind: str) -> None:
    study = optuna.create_study(sampler=MAKE[name](SPACES[kind]()))
    study.optimize(lambda trial: float("nan"), n_trials=6)
    assert len(set(plans(study))) > 1


def test_several_objectives_are_refused() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=MAKE["eep"](SPACES["scores"]()))
    with pytest.raises(SamplerError, match="one objective, the study has 2"):
        study.ask()


@pytest.mark.slow
@each_sampler
def test_finds_better_plans_in_which_k_and_beta_move(name: str) -> None:
    """Better than its first trial, and than 19 of 20 random plans; the plans have the k and beta of their numbers."""
    space, rng = SPACES["active"](), np.random.default_rng(0)
    trials = run(name, space, 25 if name == "gp" else 90).trials
    losses = [trial.value for trial in trials]
    chance = [loss_of(space.decode(space.sample(rng))) for _ in range(400)]
    assert min(losses) < losses[0]
    assert name in CAREFUL or min(losses) <= np.quantile(chance, GOOD.get(name, 0.05))
    if name in CAREFUL:
        trials = run(name, space, 30, sigma=4.0).trials
    extras = np.stack([stored(trial)[space.extras] for trial in trials])
    count = len(space.extra_groups)
    for trial, row in zip(trials, extras):
        layers = [space.plan(trial).layers[first] for first, _ in space.extra_groups]
        ks, betas = row[:count].tolist(), row[count:].tolist()
        assert [layer.k for layer in layers] == ks
        assert [layer.skip for layer in layers] == [beta if k > 1 else 0.0 for k, beta in zip(ks, betas)]
    if name not in STUBBORN:
        assert (np.ptp(extras, axis=0) > 0).all()
        assert set(np.unique(extras[:, :count])) == {1.0, 2.0}


@pytest.mark.slow
@in_turn("scores", "merge")
def test_finds_better_plans(name: str, kind: str) -> None:
    space, rng = SPACES[kind](), np.random.default_rng(0)
    losses = [trial.value for trial in run(name, space, TRIALS.get(name, 90)).trials]
    chance = [loss_of(space.decode(space.sample(rng))) for _ in range(400)]
    assert min(losses) < losses[0]
    if kind == "scores" or name not in CAREFUL:
        assert min(losses) <= np.quantile(chance, GOOD.get(name, 0.05))
