from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from moeopt.errors import SamplerError
from moeopt.plan import ModelShape
from moeopt.samplers import ShadowSampler, TPESampler
from moeopt.spaces import EEPSpace, PruneSpace, Space
from moeopt.trials import genome

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SHAPE = ModelShape(layers=2, experts=4, k=1)
SMALL = PruneSpace(SHAPE, keep=2)
LARGE = EEPSpace(ModelShape(layers=4, experts=4, k=1), keep=2)


class Spy(BaseSampler):
    """Random draws; remembers the trials it was shown."""

    def __init__(self, seen: list[list[FrozenTrial]], attrs: dict[str, Any] | None = None) -> None:
        self.seen, self.attrs = seen, attrs or {}
        self._rng = np.random.RandomState(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> Spy:
        return Spy(self.seen, self.attrs)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.seen.append(study.get_trials(deepcopy=False))
        for key, value in self.attrs.items():
            study._storage.set_trial_system_attr(trial._trial_id, key, value)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        return self._rng.uniform(distribution.low, distribution.high)


def evaluate(study: optuna.Study, space: Space, n: int) -> None:
    for _ in range(n):
        trial = study.ask()
        study.tell(trial, float(np.square(space.vector(trial) - 0.3).sum()))


@pytest.mark.parametrize("space", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("fresh", [False, True])
def test_the_sampler_sees_the_decoded_trials(space: Space, fresh: bool) -> None:
    seen: list[list[FrozenTrial]] = []
    study = optuna.create_study(direction="maximize", sampler=ShadowSampler(space, Spy(seen), seed=0))
    evaluate(study, space, 3)
    study.tell(study.ask(), state=TrialState.FAIL)
    running = study.ask()
    space.plan(running)
    study.enqueue_trial(dict.fromkeys(space.names, 0.0))
    evaluate(study, space, 1)
    if fresh:
        study.sampler = ShadowSampler(space, Spy(seen), seed=0)
    evaluate(study, space, 1)
    shown, real = seen[-1], study.get_trials()
    assert [trial.number for trial in shown] == list(range(7))
    states = [TrialState.COMPLETE] * 3 + [TrialState.FAIL, TrialState.RUNNING, TrialState.COMPLETE, TrialState.RUNNING]
    assert [trial.state for trial in shown] == states
    for mine, theirs in zip(shown[:6], real):
        assert list(mine.params.values()) == space.vector(theirs).tolist()
        assert list(mine.params) == list(space.names)
        assert theirs.value is None or mine.value == -theirs.value
    assert shown[6].params == {}


def test_in_process_the_shadow_is_appended_to() -> None:
    sampler = ShadowSampler(LARGE, RandomSampler(), seed=0)
    study = optuna.create_study(sampler=sampler)
    evaluate(study, LARGE, 3)
    shadow = sampler._shadow
    evaluate(study, LARGE, 5)
    pending = study.ask()
    evaluate(study, LARGE, 2)
    study.tell(pending, 1.0)
    evaluate(study, LARGE, 2)
    assert sampler._shadow is shadow
    dead = study.ask()
    study.tell(dead.number, state=TrialState.FAIL)
    study.add_trial(genome.retry(study.trials[dead.number]))
    evaluate(study, LARGE, 2)
    assert [genome.slot(trial, study.trials) for trial in study.trials[-3:]] == [13, 13, 14]


def test_small_attributes_come_back_and_large_ones_are_refused() -> None:
    seen: list[list[FrozenTrial]] = []
    study = optuna.create_study(sampler=ShadowSampler(SMALL, Spy(seen, {"generation": 4}), seed=0))
    evaluate(study, SMALL, 3)
    study.sampler = ShadowSampler(SMALL, Spy(seen, {"generation": 5}), seed=0)
    evaluate(study, SMALL, 1)
    assert [trial.system_attrs for trial in seen[-1]] == [{}, {"generation": 4}, {"generation": 4}, {}]
    study.sampler = ShadowSampler(SMALL, Spy(seen, {"state": "x" * 20_000}), seed=0)
    with pytest.raises(SamplerError, match=r"Spy keeps 200\d\d characters of its own state per trial, at most 16000"):
        study.ask()


def test_cmaes_of_optuna_is_refused() -> None:
    with pytest.raises(SamplerError, match="use sampler='cmaes'"):
        ShadowSampler(SMALL, optuna.samplers.CmaEsSampler())
    nested = optuna.samplers.PartialFixedSampler({}, optuna.samplers.CmaEsSampler())
    with pytest.raises(SamplerError, match="use sampler='cmaes'"):
        ShadowSampler(SMALL, nested)
    with pytest.raises(SamplerError, match="knows the space already"):
        ShadowSampler(SMALL, TPESampler(SMALL))
    with pytest.raises(SamplerError, match="expected an Optuna sampler object, got 'tpe'"):
        ShadowSampler(SMALL, "tpe")  # type: ignore[arg-type]


def test_users_sampler_is_left_as_it_was() -> None:
    mine = RandomSampler(seed=3)
    evaluate(optuna.create_study(sampler=ShadowSampler(SMALL, mine, seed=0)), SMALL, 4)
    draws = [
        sampler.sample_independent(None, None, "x", SMALL.distributions()[SMALL.names[0]])
        for sampler in (mine, RandomSampler(seed=3))
    ]  # type: ignore[arg-type]
    assert draws[0] == draws[1]


def test_partially_fixed_and_grid() -> None:
    fixed = {SMALL.names[0]: 0.125}
    study = optuna.create_study(
        sampler=ShadowSampler(SMALL, optuna.samplers.PartialFixedSampler(fixed, RandomSampler()), seed=0)
    )
    evaluate(study, SMALL, 4)
    assert [trial.params[SMALL.names[0]] for trial in study.trials] == [0.5, 0.125, 0.125, 0.125]
    space = PruneSpace(SHAPE, keep=2, encoding="subset")
    grid = optuna.samplers.GridSampler({name: range(6) for name in space.names}, seed=0)
    study = optuna.create_study(sampler=ShadowSampler(space, grid, seed=0))
    evaluate(study, space, 36)
    assert len({tuple(trial.params.values()) for trial in study.trials}) > 30


def test_gaussian_processes() -> None:
    def run(study: optuna.Study, n: int) -> None:
        study.sampler = ShadowSampler(SMALL, optuna.samplers.GPSampler(n_startup_trials=3), seed=2)
        evaluate(study, SMALL, n)

    whole, parts = optuna.create_study(), optuna.create_study()
    run(whole, 6)
    run(parts, 4)
    run(parts, 2)
    assert [trial.params for trial in whole.trials] == [trial.params for trial in parts.trials]
