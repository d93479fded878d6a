from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import optuna
import pytest

from moeopt.errors import SamplerError
from moeopt.plan import ModelShape, Plan
from moeopt.samplers import NevergradSampler
from moeopt.spaces import MergeSpace, PruneSpace, Space
from moeopt.trials import genome

SHAPE = ModelShape(layers=4, experts=6, k=2)
AROUND = Plan.one_hot([[0, 1, 2]] * 4, experts=6, k=2)


def evaluate(study: optuna.Study, space: Space, n: int) -> None:
    target = np.sin(np.arange(space.size)) * space.step + space.start()
    for _ in range(n):
        trial = study.ask()
        study.tell(trial, float(((space.vector(trial) - target) ** 2).mean()))


def genotypes(study: optuna.Study) -> list[bytes]:
    return [x.tobytes() for trial in study.trials if (x := genome.read(trial)) is not None]


def test_same_as_nevergrad_itself() -> None:
    """One-at-a-time ask and tell of the bare optimiser, where no plan comes twice."""
    import nevergrad as ng

    space = MergeSpace(SHAPE, around=AROUND, groups=2)
    sampler = NevergradSampler(space, "TwoPointsDE", seed=3, budget=100)
    study = optuna.create_study(sampler=sampler)
    evaluate(study, space, 40)

    x0 = space.start().astype(np.float64)
    array = ng.p.Array(init=np.zeros(space.size))
    array.set_bounds((space.low - x0) / space.step, (space.high - x0) / space.step, full_range_sampling=False)
    array.set_mutation(sigma=1.0)
    array.random_state = np.random.RandomState(np.random.SeedSequence([3, 0]).generate_state(3)[2])
    reference = ng.optimizers.registry["TwoPointsDE"](array, budget=100)
    asked = reference.ask()
    reference.tell(array.spawn_child(new_value=np.zeros(space.size)), study.trials[0].value)
    for trial in study.trials[1:]:
        assert np.array_equal(space.snap(x0 + asked.value * space.step), genome.read(trial))
        reference.tell(asked, trial.value)
        asked = reference.ask()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["DE", "NelderMead", "NGOpt", "CMA"])
def test_kept_optimiser_equals_a_rebuilt_one(optimizer: str) -> None:
    """Duplicates, too, are asked and told alike; the space is small, so that there are many."""
    space = PruneSpace(ModelShape(layers=1, experts=5, k=2), keep=3)
    going_on = optuna.create_study(sampler=NevergradSampler(space, optimizer, seed=1, redraw=4))
    evaluate(going_on, space, 20)
    rebuilt = optuna.create_study()
    for _ in range(20):
        rebuilt.sampler = NevergradSampler(space, optimizer, seed=1, redraw=4)
        evaluate(rebuilt, space, 1)
    assert genotypes(going_on) == genotypes(rebuilt)
    assert max(genome.origin(trial)["notes"].get("asks", 0) for trial in going_on.trials) > 1


def test_trials_it_did_not_ask_for_are_told() -> None:
    space = MergeSpace(SHAPE, around=AROUND, groups=2)
    target = space.snap(space.start() + 2 * space.step)

    def first_own(*enqueued: np.ndarray) -> np.ndarray:
        study = optuna.create_study(sampler=NevergradSampler(space, "OnePlusOne", seed=0, sigma=0.05))
        for x in enqueued:
            study.add_trial(genome.waiting(genome.pack(genome.GENOME, space.snap(x)), {}))
        for _ in range(len(enqueued) + 6):
            trial = study.ask()
            study.tell(trial, float(np.abs(space.vector(trial) - target).mean()))
        x = genome.read(study.trials[-1])
        assert x is not None
        return x

    near, far = first_own(target), first_own()
    assert np.abs(near - target).mean() < 0.5 * np.abs(far - target).mean()


def test_the_start_is_told_once() -> None:
    """OnePlusOne asks for its start first; Nevergrad takes a point told twice for less noisy, and never leaves it."""
    space = MergeSpace(SHAPE, around=AROUND, groups=2)
    sampler = NevergradSampler(space, "OnePlusOne", seed=0)
    study = optuna.create_study(sampler=sampler)
    evaluate(study, space, 60)
    assert sampler._replay is not None
    assert max(value.count for value in sampler._replay._optimizer.archive.values()) == 1
    assert study.best_value < 0.95 * study.trials[0].value


def test_running_trials_of_other_workers_do_not_block() -> None:
    """Scipy's methods wait for an answer to every point; a point still running elsewhere gets a provisional one."""
    space = PruneSpace(SHAPE, keep=3, groups=2)
    study = optuna.create_study(sampler=NevergradSampler(space, "Cobyla", seed=0, redraw=2))
    trials = [study.ask() for _ in range(5)]
    for trial in trials:
        study.tell(trial, float(space.vector(trial).sum()))
    evaluate(study, space, 2)
    assert len(study.trials) == 7


@pytest.mark.slow
def test_two_processes_agree_and_end() -> None:
    code = (
        "import hashlib, numpy as np, optuna\n"
        "from moeopt.trials import genome\n"
        "from moeopt.plan import ModelShape\n"
        "from moeopt.samplers import NevergradSampler\n"
        "from moeopt.spaces import PruneSpace\n"
        "space = PruneSpace(ModelShape(2, 6, 2), keep=3)\n"
        "digest = hashlib.sha256()\n"
        "for name in ('DE', 'OnePlusOne', 'PSO', 'OldCMA', 'NelderMead', 'CmaFmin2', 'Portfolio',\n"
        "             'LognormalDiscreteOnePlusOne'):\n"
        "    study = optuna.create_study(sampler=NevergradSampler(space, name, seed=4))\n"
        "    study.optimize(lambda trial: float(np.square(space.vector(trial) - 0.3).sum()), n_trials=20)\n"
        "    for trial in study.trials:\n"
        "        digest.update(genome.read(trial).tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True).stdout
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].strip()) == 64


def test_what_fails_inside_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import nevergrad as ng

    class Broken(ng.optimizers.base.Optimizer):  # type: ignore[misc]
        def _internal_ask(self) -> Any:
            if self.num_ask == 1:
                raise ImportError("needs a package")
            return self._rng.normal(0, 1, self.dimension)

    monkeypatch.setitem(ng.optimizers.registry, "Broken", Broken)
    space = PruneSpace(SHAPE, keep=3, groups=2)
    study = optuna.create_study(sampler=NevergradSampler(space, "Broken", seed=0))
    evaluate(study, space, 2)
    for _ in range(2):
        message = "Nevergrad's Broken failed after 2 trials on 12 numbers: ImportError: needs a package"
        with pytest.raises(SamplerError, match=message):
            study.ask()


@pytest.mark.parametrize("optimizer", ["OldCMA", "DiagonalCMA", "DE", "PSO", "NGOpt"])
def test_one_number_and_fixed_numbers(optimizer: str) -> None:
    """CMA of Nevergrad wants two numbers or more; a range of one value is no range."""
    single = PruneSpace(ModelShape(layers=2, experts=8, k=2), keep=4, groups=1, encoding="subset")
    study = optuna.create_study(sampler=NevergradSampler(single, optimizer, seed=0))
    evaluate(study, single, 12)
    assert len(set(genotypes(study))) > 5
    everything = PruneSpace(ModelShape(layers=2, experts=4, k=2), keep=4, encoding="subset")
    study = optuna.create_study(sampler=NevergradSampler(everything, optimizer, seed=0, redraw=2))
    evaluate(study, everything, 4)
    assert len(set(genotypes(study))) == 1
