"""A study goes on with its own optimiser, or says why it does not; it never becomes another one in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

import moeopt
from moeopt import samplers
from moeopt.cli import main
from moeopt.errors import StudyError
from moeopt.results import optimiser_comparison as benchmarking
from moeopt.samplers import GenomeSampler, Proposal, get
from moeopt.study import finished, foreign_trials, reclaim
from moeopt.tasks import TextTask
from moeopt.trials import genome

optuna.logging.set_verbosity(optuna.logging.ERROR)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Heartbeat of storage", "ignore:.* trials of EEP", "ignore:EEP merges", "ignore:study 's' cannot"
)
TEXTS = [f"the {a} {b} sat on the {c}" for a in ("red", "old", "big") for b in ("cat", "dog") for c in ("mat", "log")]
TASK = TextTask("toy", search=TEXTS[:6], dev=TEXTS[6:8], test=TEXTS[8:], window=32)
Objective, Make = moeopt.Objective, Callable[..., moeopt.Objective]


@pytest.fixture(scope="module")
def make(make_mixtral: Any, tiny_tokenizer: Any) -> Make:
    model = make_mixtral(layers=3, experts=6, hidden=16, intermediate=16)
    space = moeopt.EEPSpace.of(model, keep=3)
    return lambda space=space, **options: moeopt.Objective(
        model, tiny_tokenizer, TASK, space, reference=False, **options
    )


@pytest.fixture
def objective(make: Make) -> Objective:
    return make()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db"


def by_slot(study: optuna.Study) -> dict[int, Any]:
    trials = study.get_trials()
    return {genome.slot(t, trials): (t.value, genome.origin(t).get("operator")) for t in trials if t.value is not None}


class Steps(GenomeSampler):
    """Code of a user's own."""

    def propose(self, history: list[Any], slot: int, attempt: int) -> Proposal:
        return Proposal(self.space.sample(self.rng(slot, attempt)), "step")

    def settings(self) -> dict[str, Any]:
        return {"name": "steps", "seed": self.seed}


EEP: dict[str, Any] = {"sampler": "eep", "initial": 2, "prune_until": 4}


def opened(name: str, url: str, **options: Any) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=url, **options)


WAYS: dict[str, tuple[Callable[[str, str, Objective], optuna.Study], str]] = {
    "Optuna's default": (lambda name, url, o: opened(name, url), "sampler.name: study has 'eep', now 'TPESampler'"),
    "made again": (
        lambda name, url, o: optuna.create_study(study_name=name, storage=url, load_if_exists=True),
        "sampler.name: study has 'eep', now 'TPESampler'",
    ),
    "an object of Optuna's": (lambda name, url, o: opened(name, url, sampler=RandomSampler()), "now 'RandomSampler'"),
    "a wrapper": (
        lambda name, url, o: opened(name, url, sampler=optuna.samplers.PartialFixedSampler({}, RandomSampler())),
        "now 'PartialFixedSampler'",
    ),
    "another sampler": (lambda name, url, o: opened(name, url, sampler=get("random", o.space)), "now 'random'"),
    "another seed": (
        lambda name, url, o: opened(name, url, sampler=get("eep", o.space, seed=4, initial=2, prune_until=4)),
        "sampler.seed: study has 3, now 4",
    ),
    "other options": (
        lambda name, url, o: opened(name, url, sampler=get("eep", o.space, seed=3, initial=3, prune_until=4)),
        "sampler.initial: study has 2, now 3",
    ),
    "another pruner": (
        lambda name, url, o: opened(name, url, sampler=get("eep", o.space, seed=3, initial=2, prune_until=4)),
        "pruner.class: study has .*RacingPruner.*MedianPruner",
    ),
}


@pytest.fixture(scope="module")
def uninterrupted(make: Make) -> Callable[[str | None], dict[int, Any]]:
    """The trials of a search that no one came between, by its pruner."""

    @cache
    def trials_of(pruner: str | None) -> dict[int, Any]:
        objective = make(rungs=1 if pruner is None else 2)
        study = moeopt.create_study("whole", objective=objective, storage=None, seed=3, pruner=pruner, **EEP)
        moeopt.optimize(study, objective, n_trials=6)
        return by_slot(study)

    return trials_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "jobs"), [*((way, 1) for way in WAYS), ("Optuna's default", 2), ("other options", 2), ("another pruner", 2)]
)
def test_another_optimiser_is_refused_and_leaves_no_trace_in_the_search(
    way: str, jobs: int, make: Make, url: str, uninterrupted: Callable[[str | None], dict[int, Any]]
) -> None:
    open_it, named = WAYS[way]
    objective = make(rungs=2 if way == "another pruner" else 1)
    pruner = "racing" if way == "another pruner" else None
    options: dict[str, Any] = {"objective": objective, "seed": 3, "pruner": pruner, **EEP}
    whole = uninterrupted(pruner)
    moeopt.optimize(moeopt.create_study("s", storage=url, **options), objective, n_trials=2)
    with pytest.raises(StudyError, match=named) as refusal:
        open_it("s", url, objective).optimize(objective, n_trials=6, n_jobs=jobs)  # Optuna loses the last errors
    assert "moeopt.load_study('s', storage)" in str(refusal.value)
    with pytest.raises(StudyError, match=named):
        moeopt.optimize(open_it("s", url, objective), objective, n_trials=6)
    study = moeopt.load_study("s", url)
    refused = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert 1 <= len(refused) <= (1 if jobs == 1 else 6)
    assert all("cannot be resumed with something else" in trial.user_attrs["failure"] for trial in refused)
    assert foreign_trials(study) == []
    moeopt.optimize(study, objective, n_trials=6)
    if way == "another pruner" and jobs == 2:  # the study's own sampler proposed two trials at once
        assert by_slot(study).keys() == whole.keys()
    else:
        assert by_slot(study) == whole
    assert finished(study) == 6


def test_another_objective_is_refused(make: Make, url: str) -> None:
    objective = make()
    moeopt.create_study("s", objective=objective, storage=url, sampler="random")
    study = moeopt.load_study("s", url)
    for other, named in ((make(limit=2), "task.limit"), (make(active_weight=0.5), "active_weight")):
        with pytest.raises(StudyError, match=named):
            study.optimize(other, n_trials=1)
        with pytest.raises(StudyError, match=named):
            moeopt.optimize(study, other, n_trials=1)
    assert all(trial.state == TrialState.FAIL for trial in study.trials)
    moeopt.optimize(study, objective, n_trials=2)
    assert len(by_slot(study)) == 2


def test_the_same_optimiser_goes_on_under_plain_optuna(objective: Objective, url: str) -> None:
    made: dict[str, Any] = {"seed": 3, **EEP}
    moeopt.optimize(moeopt.create_study("whole", objective=objective, storage=url, **made), objective, n_trials=6)
    moeopt.optimize(moeopt.create_study("s", objective=objective, storage=url, **made), objective, n_trials=2)
    opened("s", url, sampler=get(space=objective.space, **made)).optimize(objective, n_trials=2)
    again = optuna.create_study(
        study_name="s", storage=url, load_if_exists=True, sampler=get(space=objective.space, **made)
    )
    again.optimize(objective, n_trials=2)
    assert by_slot(again) == by_slot(opened("whole", url))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["object", "code", "pruner"])
def test_what_cannot_be_rebuilt_is_read_and_starts_nothing(kind: str, make: Make, url: str) -> None:
    class Never(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return False

    objective = make(rungs=2 if kind == "pruner" else 1)
    made: dict[str, Any] = {
        "object": {"sampler": TPESampler(n_startup_trials=2), "seed": 3},
        "code": {"sampler": Steps(objective.space, seed=3)},
        "pruner": {"sampler": "random", "seed": 3, "pruner": Never()},
    }[kind]
    whole = moeopt.create_study("whole", objective=objective, storage=url, **made)
    moeopt.optimize(whole, objective, n_trials=6)
    moeopt.optimize(moeopt.create_study("s", objective=objective, storage=url, **made), objective, n_trials=2)
    study = moeopt.load_study("s", url)
    assert study.best_trial.value == min(value for value, _ in by_slot(study).values())
    assert main(["show", "s", "--storage", url]) == 0
    for call in (
        lambda: study.optimize(objective, n_trials=1),
        lambda: study.optimize(lambda trial: 0.0, n_trials=1),
        lambda: moeopt.optimize(study, objective, n_trials=3),
        lambda: moeopt.optimize(study, lambda trial: 0.0, n_trials=3),
        lambda: study.ask(),
    ):
        with pytest.raises(StudyError, match=r"cannot be rebuilt .*moeopt\.create_study\('s', .*load_if_exists=True"):
            call()
    assert len(by_slot(study)) == 2
    study = moeopt.create_study("s", objective=objective, storage=url, load_if_exists=True, **made)
    moeopt.optimize(study, objective, n_trials=6)
    assert by_slot(study) == by_slot(whole)
    if kind == "object":  # driven by a ShadowSampler, which plain optuna may be given, too
        opened("s", url, sampler=get(space=objective.space, **made)).optimize(objective, n_trials=1)
        assert len(by_slot(study)) == 7


def test_what_was_enqueued_survives_a_refusal(objective: Objective, url: str) -> None:
    study = moeopt.create_study("s", objective=objective, storage=url, sampler="random")
    plan = moeopt.Plan.one_hot([[1, 3, 5]] * 3, experts=6, k=2)
    moeopt.enqueue(study, objective.space, plan, method="mine")
    for other in (None, get("local", objective.space)):
        with pytest.raises(StudyError, match=r"sampler\.name"):
            opened("s", url, sampler=other).optimize(objective, n_trials=1)
        reclaim(study)
    moeopt.optimize(moeopt.load_study("s", url), objective, n_trials=2)
    first = next(trial for trial in study.trials if trial.value is not None)
    assert objective.space.plan(first) == plan
    assert first.user_attrs["method"] == "mine"
    assert foreign_trials(study) == []


# Studies of plain optuna --------------------------------------------------------------------------------------------


def test_a_plain_study_notes_its_sampler_at_its_first_trial(objective: Objective, url: str) -> None:
    space, small = objective.space, {"initial": 2, "prune_until": 4}

    def study(sampler: Any) -> optuna.Study:
        return optuna.create_study(study_name="s", storage=url, load_if_exists=True, sampler=sampler)

    study(samplers.EEPSampler(space, **small)).optimize(objective, n_trials=2)
    for other, named in {
        None: "study has 'eep', now 'TPESampler'",
        samplers.EEPSampler(space, seed=1, **small): "sampler.seed",
        samplers.EEPSampler(space, initial=3): "sampler.initial: study has 2, now 3",
    }.items():
        with pytest.raises(StudyError, match=f"{named}.*optuna.load_study"):
            study(other).optimize(objective, n_trials=1)
    again = samplers.EEPSampler(space, **small)  # without a seed, as it was made: it takes up the one that was drawn
    study(again).optimize(objective, n_trials=1)
    assert genome.origin(opened("s", url).trials[-1])["operator"] == "prune"
    other = optuna.create_study(sampler=samplers.EEPSampler(space, seed=again.seed, **small))
    other.optimize(objective, n_trials=2)
    assert [trial.value for trial in other.trials] == [trial.value for trial in opened("s", url).trials[:2]]


def test_a_plain_study_of_a_sampler_of_optuna_keeps_it(make: Make, url: str) -> None:
    objective = make(space=moeopt.PruneSpace(make().space.shape, keep=3, encoding="subset"))
    optuna.create_study(study_name="s", storage=url, sampler=RandomSampler(seed=0)).optimize(objective, n_trials=2)
    with pytest.raises(StudyError, match="study has 'RandomSampler', now 'TPESampler'"):
        opened("s", url).optimize(objective, n_trials=1)
    opened("s", url, sampler=RandomSampler(seed=1)).optimize(objective, n_trials=1)
    with pytest.raises(StudyError, match="not made by moeopt"):
        moeopt.create_study("s", objective=objective, storage=url, load_if_exists=True)


# Studies that became something else before this ---------------------------------------------------------------------


@pytest.mark.slow
def test_compare_leaves_out_what_another_sampler_made(
    make: Make, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = make().space.shape
    objective = make(space=moeopt.PruneSpace(shape, keep=3, encoding="subset"))
    for sampler in ("random", "local"):
        for seed in range(2):
            name = f"{sampler}-{seed}"
            study = moeopt.create_study(name, objective=objective, storage=url, sampler=sampler, seed=seed)
            moeopt.optimize(study, objective, n_trials=3)
    turned = opened("random-1", url)  # as optuna.load_study gave it, and whose objective did not ask
    turned.optimize(lambda trial: objective._evaluate(trial, turned), n_trials=2)
    study = opened("local-1", url)
    moved = {genome.ORIGIN: {"operator": "crossover+merge", "slot": 3, "plan": "x"}}  # EEP's, by an older moeopt
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"layer_tokens": 1}, system_attrs=moved))
    added = opened("local-0", url)
    moeopt.enqueue(added, objective.space, moeopt.Plan.one_hot([[1, 3, 5]] * 3, experts=6, k=2))
    moeopt.optimize(moeopt.load_study("local-0", url), objective, n_trials=4)
    assert {name: foreign_trials(opened(name, url)) for name in ("random-0", "random-1", "local-0", "local-1")} == {
        "random-0": [], "random-1": [3, 4], "local-0": [], "local-1": [3],
    }  # fmt: skip
    capsys.readouterr()
    assert main(["compare", "--study-prefix", "", "--storage", url, "--out", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Left out, with trials that another sampler than their own made: random-1 and local-1." in said
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["foreign"] == ["random-1", "local-1"]
    compared = benchmarking.compare([opened(name, url) for name in ("random-0", "local-0")])
    assert {optimiser.name for optimiser in compared.optimisers} >= {"random"}
    # what was enqueued is told
    assert any(optimiser.name.startswith("local from plan ") for optimiser in compared.optimisers)
    with pytest.raises(StudyError, match=r"'random-1', as all that were given, .* the first is 3"):
        benchmarking.compare([turned])
    assert main(["show", "random-1", "--storage", url]) == 0
    assert "another sampler than the study's made trials 3, 4" in capsys.readouterr().out
    assert main(["show", "random-1", "--storage", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["foreign"] == [3, 4]
