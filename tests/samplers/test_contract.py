"""What every sampler promises on every space. Objectives are cheap functions of the plan; no model is needed."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle, product
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
from moeopt.samplers import SAMPLERS, GenomeSampler, get
from moeopt.spaces import ActiveSpace, EEPSpace, MergeSpace, PruneSpace, Space
from moeopt.trials import genome

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SHAPE = ModelShape(layers=6, experts=6, k=2)
AROUND = Plan.one_hot([[0, 2, 4]] * 3 + [[1, 2, 5]] * 3, experts=6, k=2)

SPACES: dict[str, Callable[[], Space]] = {
    "scores": lambda: PruneSpace(SHAPE, keep=3, groups=3),
    "rows": lambda: PruneSpace(SHAPE, keep=3, groups=3, encoding="rows"),
    "subset": lambda: PruneSpace(SHAPE, keep=3, groups=3, encoding="subset"),
    "merge": lambda: MergeSpace(SHAPE, around=AROUND, groups=2),
    "eep": lambda: EEPSpace(SHAPE, keep=3, groups=2),
    "active": lambda: ActiveSpace(PruneSpace(SHAPE, keep=3, groups=3), k=(1, 2), skip=True, groups=2),
    "active alone": lambda: ActiveSpace(SHAPE, k=(1, 2)),
}

Make = Callable[..., GenomeSampler]


def named(name: str, **options: Any) -> Make:
    return lambda space, seed=1, **more: get(name, space, seed=seed, **(options | more))


def wrapped(make: Callable[[], optuna.samplers.BaseSampler]) -> Make:
    return lambda space, seed=1, **more: get(make(), space, seed=seed, **more)


MAKE: dict[str, Make] = {
    "eep": named("eep", initial=6, prune_until=12),
    **{name: named(name) for name in SAMPLERS if name not in ("eep", "nevergrad")},
    **{f"nevergrad:{o}": named(f"nevergrad:{o}") for o in ("DE", "OnePlusOne", "PSO", "NGOpt", "OldCMA", "NelderMead")},
    "optuna TPE": wrapped(lambda: optuna.samplers.TPESampler(multivariate=True, n_startup_trials=5)),
    "optuna NSGA-II": wrapped(lambda: optuna.samplers.NSGAIISampler(population_size=5)),
    "optuna QMC": wrapped(lambda: optuna.samplers.QMCSampler(seed=0)),
    "optuna Random": wrapped(lambda: optuna.samplers.RandomSampler()),
}

each_sampler = pytest.mark.parametrize("name", MAKE)
each_space = pytest.mark.parametrize("kind", SPACES)


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


def step(study: optuna.Study, space: Space, sign: float = 1.0) -> None:
    trial = study.ask()
    study.tell(trial, sign * loss_of(space.plan(trial)))


def run(name: str, space: Space, n: int, study: optuna.Study | None = None, **options: Any) -> optuna.Study:
    study = study or optuna.create_study()
    study.sampler = MAKE[name](space, **options)
    for _ in range(n):
        step(study, space)
    return study


def proposals(study: optuna.Study) -> list[bytes]:
    """The genotypes that were evaluated, by slot."""
    trials = study.trials
    finished = {genome.slot(t, trials): t for t in trials if t.state == TrialState.COMPLETE}
    return [stored(finished[slot]).tobytes() for slot in sorted(finished)]


def stored(trial: FrozenTrial) -> np.ndarray:
    x = genome.read(trial)
    assert x is not None
    return x


def plans(study: optuna.Study) -> list[str]:
    return [genome.origin(trial)["plan"] for trial in study.trials]


@cache
def uninterrupted(name: str, kind: str) -> list[bytes]:
    return proposals(run(name, SPACES[kind](), 16))


@pytest.mark.slow
@each_sampler
@each_space
def test_plain_optuna_study(name: str, kind: str) -> None:
    space, live = SPACES[kind](), []

    def objective(trial: optuna.Trial) -> float:
        live.append(space.plan(trial))
        return loss_of(live[-1])

    study = optuna.create_study(sampler=MAKE[name](space))
    study.optimize(objective, n_trials=8)
    for trial, plan in zip(study.trials, live):
        assert space.plan(trial) == space.decode(stored(trial)) == plan
        assert genome.origin(trial)["plan"] == plan.fingerprint
        assert set(trial.params) == (set(space.names) if space.size <= 48 else {"drift"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [*product(MAKE, ("scores", "subset", "eep", "active")), *zip(MAKE, cycle(("rows", "merge", "active alone")))],
)
def test_goes_on_after_a_kill_as_if_uninterrupted(name: str, kind: str) -> None:
    """A trial dies running, a new process marks it failed, evaluates it again under a new number, and goes on."""
    space = SPACES[kind]()
    study = run(name, space, 9)
    dead = study.ask()
    space.plan(dead)

    study.tell(dead.number, state=TrialState.FAIL)
    study.add_trial(genome.retry(study.trials[dead.number]))
    study = run(name, SPACES[kind](), 7, optuna.load_study(study_name=study.study_name, storage=study._storage))
    assert genome.slot(study.trials[10], study.trials) == 9
    assert proposals(study) == uninterrupted(name, kind)


UNSEEDED = ("nevergrad:NelderMead", "nevergrad:NGOpt", "optuna QMC")
"""Scipy's methods, NGOpt's choice here among them, draw nothing at random; the QMC sampler was made with its seed."""

STUBBORN = ("nevergrad:NelderMead", "nevergrad:NGOpt")
"""Scipy's local methods: on a plateau they ask for one plan more often than any bound."""


@in_turn("scores", "merge", "active")
def test_seeds(name: str, kind: str) -> None:
    space = SPACES[kind]()
    assert proposals(run(name, space, 6)) == uninterrupted(name, kind)[:6]
    other = proposals(run(name, space, 6, seed=2))
    if name not in UNSEEDED:
        assert other[2:] != uninterrupted(name, kind)[2:6]


def on_storages() -> Iterator[Any]:
    """Every sampler on SQLite, where it depends on what is read back, and every server with a few of the samplers."""
    for name, kind in zip(MAKE, cycle(["subset", "merge"])):
        yield pytest.param("sqlite", name, kind, id=f"sqlite-{kind}-{name}")
    for server in servers():
        for name, kind in (("eep", "subset"), ("cmaes", "merge"), ("nevergrad:DE", "subset"), ("optuna TPE", "merge")):
            yield pytest.param(*server.values, name, kind, id=f"{server.id}-{kind}-{name}", marks=server.marks)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "name", "kind"), list(on_storages()))
def test_every_storage_gives_the_same(where: str, name: str, kind: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db" if where == "sqlite" else where
    space, study_name, storage = SPACES[kind](), f"contract-{uuid.uuid4()}", optuna.storages.RDBStorage(url)
    try:
        run(name, space, 4, optuna.create_study(storage=storage, study_name=study_name))
        study = run(name, SPACES[kind](), 4, optuna.load_study(storage=storage, study_name=study_name))
        assert proposals(study) == uninterrupted(name, kind)[:8]
        assert [space.plan(trial) for trial in study.trials] == [space.decode(stored(trial)) for trial in study.trials]
    finally:
        optuna.delete_study(storage=storage, study_name=study_name)
        storage.engine.dispose()


@pytest.mark.slow
@in_turn("scores", "subset", "merge", "active")
def test_no_plan_is_evaluated_twice(name: str, kind: str) -> None:
    fingerprints = plans(run(name, SPACES[kind](), 25, redraw=100))
    if name not in STUBBORN or kind in ("merge", "active"):
        assert len(set(fingerprints)) == 25
    else:
        assert len(set(fingerprints)) > 2


@pytest.mark.slow
@each_sampler
@pytest.mark.parametrize("encoding", ["scores", "rows", "subset"])
def test_an_exhausted_space_goes_on(name: str, encoding: Any) -> None:
    space = PruneSpace(ModelShape(layers=1, experts=3, k=1), keep=2, encoding=encoding)
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


@each_sampler
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
def test_failed_trials(name: str, kind: str) -> None:
    space = SPACES[kind]()
    study = optuna.create_study(sampler=MAKE[name](space))
    study.optimize(lambda t: float("nan") if t.number % 3 == 0 else loss_of(space.plan(t)), n_trials=16)
    assert [t.number for t in study.trials if t.state == TrialState.FAIL] == [0, 3, 6, 9, 12, 15]
    everything_fails = optuna.create_study(sampler=MAKE[name](space))
    everything_fails.optimize(lambda t: float("nan"), n_trials=8)
    assert len(set(plans(everything_fails))) > 1


@pytest.mark.slow
@each_sampler
@pytest.mark.parametrize(
    "pruner",
    [optuna.pruners.MedianPruner(n_startup_trials=2), optuna.pruners.HyperbandPruner(1, 4, 2)],
    ids=["median", "hyperband"],
)
def test_pruned_trials_count_with_their_estimate(name: str, pruner: optuna.pruners.BasePruner) -> None:
    space = SPACES["merge"]()

    def objective(trial: optuna.Trial) -> float:
        loss = loss_of(space.plan(trial))
        for rung in range(4):
            trial.report(loss + 1 / (1 + rung), rung)
            if trial.should_prune():
                trial.set_user_attr("estimate", loss)
                raise optuna.TrialPruned
        return loss

    # Hyperband's brackets depend on the study's name.
    study = optuna.create_study(study_name="pruned", sampler=MAKE[name](space), pruner=pruner)
    study.optimize(objective, n_trials=14)
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
    history = {told.number: told for told in study.sampler.history(study, study.trials, without=-1)}
    assert len(history) == 14
    assert pruned
    for trial in pruned:
        assert history[trial.number].loss == trial.user_attrs["estimate"] != trial.value


CAREFUL = ("nevergrad:OldCMA", "nevergrad:NelderMead")
"""Pycma as Nevergrad sets it up, and scipy's simplex, begin with steps too small for 90 trials of 72 numbers."""


@cache
def long(name: str, kind: str) -> list[FrozenTrial]:
    slow = {"scores": 60, "merge": 40} if "tpe" in name.lower() else {}
    return run(name, SPACES[kind](), slow.get(kind, 90)).trials


@cache
def by_chance(kind: str) -> np.ndarray:
    """The losses of random plans."""
    space, rng = SPACES[kind](), np.random.default_rng(0)
    return np.array([loss_of(space.decode(space.sample(rng))) for _ in range(400)])


@pytest.mark.slow
@each_sampler
@pytest.mark.parametrize("kind", ["scores", "merge", "active"])
def test_finds_better_plans(name: str, kind: str) -> None:
    """Better than its first trial, and than 19 of 20 random plans."""
    losses = [trial.value for trial in long(name, kind)]
    assert min(losses) < losses[0]
    if kind == "scores" or name not in CAREFUL:
        assert min(losses) <= np.quantile(by_chance(kind), 0.05)


@each_sampler
def test_global_random_states_are_left_alone(name: str) -> None:
    space = SPACES["scores"]()
    study = run(name, space, 7)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.random.get_rng_state()  # noqa: NPY002
    for _ in range(3):
        step(study, space)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), before[2])


@in_turn("scores", "merge", "active")
def test_maximising_is_minimising_the_negative(name: str, kind: str) -> None:
    space = SPACES[kind]()
    study = optuna.create_study(direction="maximize", sampler=MAKE[name](space))
    for _ in range(12):
        step(study, space, sign=-1.0)
    assert proposals(study) == uninterrupted(name, kind)[:12]


@each_sampler
def test_multi_objective_is_refused(name: str) -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=MAKE[name](SPACES["scores"]()))
    with pytest.raises(SamplerError, match="one objective, the study has 2"):
        study.ask()


@pytest.mark.slow
@in_turn("scores", "merge", "active")
def test_workers_do_not_try_the_same_plan(name: str, kind: str) -> None:
    space = SPACES[kind]()
    study = run(name, space, 5)
    samplers = [MAKE[name](SPACES[kind]()), MAKE[name](SPACES[kind]())]
    running = []
    for i in range(6):
        study.sampler = samplers[i % 2]
        running.append(study.ask())
    assert name in STUBBORN or len(set(plans(study))) == 11
    for trial in reversed(running):
        study.tell(trial, loss_of(space.plan(trial)))
    for i in range(4):
        study.sampler = samplers[i % 2]
        step(study, space)
    assert len(study.trials) == 15


@each_sampler
def test_settings_describe_the_sampler(name: str) -> None:
    import json

    space = SPACES["scores"]()
    settings = MAKE[name](space).settings()
    assert json.loads(json.dumps(settings)) == settings == MAKE[name](SPACES["scores"]()).settings()
    assert settings["seed"] == 1
    assert settings != MAKE[name](space, seed=2).settings()
    assert settings != MAKE[name](space, redraw=3).settings()


@pytest.mark.slow
@each_sampler
@pytest.mark.parametrize("kind", ["active", "active alone"])
def test_k_and_beta_move(name: str, kind: str) -> None:
    """Every one of them takes several values, and the plans have them."""
    space = SPACES[kind]()
    if kind == "active" and name not in CAREFUL:
        trials = long(name, kind)
    else:  # of 64 plans, so that more trials would draw most of them again
        trials = run(name, space, 30, **({"sigma": 4.0} if name in CAREFUL else {})).trials
    extras = np.stack([stored(trial)[space.extras] for trial in trials])
    count = len(space.extra_groups)
    for trial, row in zip(trials, extras):
        layers = [space.plan(trial).layers[first] for first, _ in space.extra_groups]
        ks, betas = row[:count].tolist(), row[count:].tolist() or [0.0] * count
        assert [layer.k for layer in layers] == ks
        assert [layer.skip for layer in layers] == [beta if k > 1 else 0.0 for k, beta in zip(ks, betas)]
    if name not in STUBBORN:
        assert (np.ptp(extras, axis=0) > 0).all()
        assert set(np.unique(extras[:, :count])) == {1.0, 2.0}
