"""Recipes: what a study holds gives back its task, sampler, pruner and objective; anything else is one clear error."""

from __future__ import annotations

import base64
import json
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

import moeopt
from moeopt import samplers
from moeopt.errors import StudyError
from moeopt.samplers.shadow import describe
from moeopt.study import recipe
from moeopt.study.recipe import RECIPE, Recipe
from moeopt.study.storage import attributes
from moeopt.tasks import Example, MultipleChoiceTask
from moeopt.trials import genome

optuna.logging.set_verbosity(optuna.logging.WARNING)


def task(name: str = "toy", kind: type[MultipleChoiceTask] = MultipleChoiceTask, n: int = 12) -> MultipleChoiceTask:
    return kind(name, [Example(str(i), f"{i} and 1 make", (f" {i + 1}", f" {i + 2}"), i % 2) for i in range(n)])


@pytest.fixture(scope="module")
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=2, experts=4, hidden=16, intermediate=16)


@pytest.fixture(scope="module")
def objective(model: Any, tiny_tokenizer: Any) -> moeopt.Objective:
    return moeopt.Objective(model, tiny_tokenizer, task(), moeopt.EEPSpace.of(model, keep=2), limit=8, rungs=2)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def create(objective: moeopt.Objective, url: str, **options: Any) -> optuna.Study:
    return moeopt.create_study(uuid.uuid4().hex, objective=objective, storage=url, **options)


def told(study: optuna.Study, space: moeopt.EEPSpace) -> list[Any]:
    """The genotypes that a study's sampler proposes for its first trials."""
    genotypes = []
    for i in range(6):
        trial = study.ask()
        space.vector(trial)
        genotypes.append(genome.read(attributes.frozen_trial(trial)))
        study.tell(trial, float(i % 3))
    return genotypes


OPTIONS: dict[str, dict[str, Any]] = {
    "eep": {"initial": 2, "prune_until": 4, "band": 0.2},
    "local": {"widths": [1, 2], "moves": ["swap", "route"]},
    "cmaes": {"sigma": 0.5},
    "tpe": {"n_startup_trials": 2},
    "nevergrad:DE": {"budget": 20},
}


NAMES = [*(n for n in samplers.SAMPLERS if n != "nevergrad"), "nevergrad:DE"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "started"),
    [*((name, False) for name in NAMES), *((name, True) for name in NAMES if name not in ("eep", "random"))],
)
def test_the_sampler_of_a_recipe_proposes_the_same(
    name: str, started: bool, objective: moeopt.Objective, url: str
) -> None:
    options, space = dict(OPTIONS.get(name, {})), objective.space
    if started:
        options["start"] = space.snap(np.random.default_rng(0).uniform(space.low, space.high))
    study = create(objective, url, sampler=name, seed=3, **options)
    rebuilt = recipe.sampler_of(recipe.read(study), moeopt.study.space_of(study))
    assert rebuilt.settings() == study.sampler.settings()
    assert isinstance(rebuilt, type(study.sampler))
    other = optuna.create_study(sampler=rebuilt)
    for ours, theirs in zip(told(study, space), told(other, space)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pruner",
    [
        None,
        "racing",
        moeopt.RacingPruner(error=0.1, noise_floor=0.01),
        optuna.pruners.MedianPruner(n_startup_trials=2, n_min_trials=3),
        optuna.pruners.PatientPruner(optuna.pruners.SuccessiveHalvingPruner(reduction_factor=3), patience=2),
        optuna.pruners.HyperbandPruner(max_resource=8),
        optuna.pruners.WilcoxonPruner(p_threshold=0.2),
        optuna.pruners.ThresholdPruner(lower=0.0, upper=9.0),
    ],
    ids=lambda pruner: type(pruner).__name__,
)
def test_the_pruner_of_a_recipe_is_the_study_s(pruner: Any, objective: moeopt.Objective, url: str) -> None:
    study = create(objective, url, pruner=pruner)
    rebuilt = recipe.pruner_of(recipe.read(study))
    assert describe(rebuilt) == describe(study.pruner)
    assert type(rebuilt) is type(study.pruner)


def test_an_objective_from_a_recipe_gives_the_same_losses(model: Any, tiny_tokenizer: Any, url: str) -> None:
    space = moeopt.EEPSpace.of(model, keep=2)
    for options in (
        {"score": "metric", "active_weight": 0.1},
        {"score": "choice"},
        {"score": "kl", "compression": moeopt.evaluation.Compression(top_p=0.9)},
        {"rungs": 3, "report": "block", "max_length": 64, "batch_tokens": 64, "prefix_memory": 0},
    ):
        objective = moeopt.Objective(model, tiny_tokenizer, task(), space, limit=8, **options)
        held = recipe.read(create(objective, url))
        other = moeopt.Objective(model, tiny_tokenizer, recipe.task_of(held), space, **recipe.arguments(held))
        assert other.describe() == objective.describe()
        assert other.settings == objective.settings
        assert other.evaluator.fingerprint == objective.evaluator.fingerprint == held.scored
        plan = space.decode(space.start())
        assert other.evaluator.evaluate(plan).loss == objective.evaluator.evaluate(plan).loss


class Mine(MultipleChoiceTask):
    """Code of the user's."""


class OwnSampler(samplers.EEPSampler):
    """Code of the user's, with the settings of another."""


def test_code_of_the_user_s_is_missing_with_a_reason(model: Any, tiny_tokenizer: Any, url: str) -> None:
    space = moeopt.EEPSpace.of(model, keep=2)
    objective = moeopt.Objective(model, tiny_tokenizer, task("mine", Mine), space, rungs=2)
    for sampler in (OwnSampler(space, seed=0), optuna.samplers.TPESampler(seed=0)):
        held = recipe.read(create(objective, url, sampler=sampler))
        with pytest.raises(StudyError, match=r"does not hold its sampler .*sampler"):
            recipe.sampler_of(held, space)
    with pytest.raises(StudyError, match=r"does not hold its task .*'mine' is code of its own, Mine"):
        recipe.task_of(held)
    racing = moeopt.RacingPruner()
    pruner = type("OwnRacing", (moeopt.RacingPruner,), {})()
    assert recipe.made(objective, samplers.get("eep", space), racing).pruner is not None
    assert "OwnRacing" in recipe.made(objective, samplers.get("eep", space), pruner).missing["pruner"]


def test_a_task_that_is_too_large_is_missing_with_a_reason(
    objective: moeopt.Objective, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "LARGEST", 700)
    with pytest.raises(StudyError, match="set a limit"):
        recipe.task_of(recipe.read(create(objective, url)))


def test_a_recipe_is_small_and_in_pieces_that_every_database_holds(model: Any, tiny_tokenizer: Any, url: str) -> None:
    noise = np.random.default_rng(0).integers(0, 1 << 30, (400, 40))
    examples = [Example(str(i), " ".join(map(hex, row)), (" a", " b"), 0) for i, row in enumerate(noise)]
    objective = moeopt.Objective(
        model, tiny_tokenizer, MultipleChoiceTask("n", examples), moeopt.EEPSpace.of(model, keep=2), max_length=16
    )
    study = create(objective, url)
    attrs = attributes.study_attributes(study)
    pieces = [key for key in attrs if key.startswith(RECIPE)]
    assert len(pieces) > 1
    assert all(len(json.dumps(attrs[key])) < 65_535 for key in pieces)
    assert recipe.task_of(recipe.read(study)).examples("search") == objective.task.examples("search")


def test_a_model_that_lies_in_a_folder_is_never_named(
    objective: moeopt.Objective, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, recorded in ((str(tmp_path), None), ("../up", None), ("org/name", "org/name"), ("a/b/c", None)):
        monkeypatch.setattr(objective.model.config, "_name_or_path", name)
        assert recipe.read(create(objective, url)).model == recorded


def test_the_number_of_trials_wanted_is_what_was_last_said(objective: moeopt.Objective, url: str) -> None:
    study = create(objective, url)
    assert recipe.wanted(study) is None
    moeopt.optimize(study, objective, n_trials=2)
    assert recipe.wanted(study) == 2
    recipe.want(study, 5)
    assert recipe.wanted(moeopt.load_study(study.study_name, url)) == 5
    for strange in ("5", -1, True, 2.5, [5]):
        attributes.write_study(study, {recipe.WANTED: strange})
        assert recipe.wanted(study) is None


def packed(body: Any, **head: Any) -> dict[str, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    text = base64.b64encode(zlib.compress(data)).decode()
    return {"v": 1, "bytes": len(data), "chunks": 1, "z": text} | head


def body_of(held: Recipe, **changes: Any) -> dict[str, Any]:
    return {**vars(held), **changes}


DAMAGE: dict[str, Any] = {
    "nothing": lambda held: None,
    "a number": lambda held: 7,
    "a list": lambda held: [1, 2],
    "a newer version": lambda held: packed(body_of(held), v=2),
    "no text": lambda held: packed(body_of(held), z=5),
    "no base64": lambda held: packed(body_of(held), z="<script>"),
    "no zlib": lambda held: packed(body_of(held), z="AAAA"),
    "too few pieces": lambda held: packed(body_of(held), chunks=2),
    "pieces without end": lambda held: packed(body_of(held), chunks=10**9),
    "pieces of a strange type": lambda held: packed(body_of(held), chunks=True),
    "a bomb": lambda held: packed(b"0" * 10_000_000, bytes=100),
    "a bomb that says so": lambda held: packed(b"0" * 100, bytes=1 << 40),
    "fewer bytes": lambda held: packed(body_of(held), bytes=1 << 20),
    "no JSON": lambda held: packed(b"\xff\xfe{"),
    "a deep list": lambda held: packed(b"[" * 100_000),
    "not a number": lambda held: packed(b'{"model": NaN}'),
    "a list of JSON": lambda held: packed([1, 2]),
    "other fields": lambda held: packed({**body_of(held), "code": "import os"}),
    "a path as model": lambda held: packed(body_of(held, model="/etc/passwd")),
    "a path upwards": lambda held: packed(body_of(held, model="../../etc")),
    "settings of another kind": lambda held: packed(body_of(held, objective={"limit": "5"})),
    "settings that are not": lambda held: packed(body_of(held, objective={"storage": "disk"})),
    "giant settings": lambda held: packed(body_of(held, objective={"batch_tokens": 1 << 60})),
    "reasons that are none": lambda held: packed(body_of(held, missing={"task": [1]})),
}


@pytest.fixture(scope="module")
def whole(objective: moeopt.Objective, tmp_path_factory: pytest.TempPathFactory) -> tuple[optuna.Study, Recipe]:
    """A study and its recipe."""
    study = create(objective, f"sqlite:///{tmp_path_factory.mktemp('whole')}/study.db")
    return study, recipe.read(study)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_recipe_is_one_clear_error(damage: str, whole: tuple[optuna.Study, Recipe]) -> None:
    study, held = whole
    attributes.write_study(study, {RECIPE: packed(body_of(held))})
    assert recipe.read(study) == held
    attributes.write_study(study, {RECIPE: DAMAGE[damage](held)})
    with pytest.raises(StudyError) as caught:
        recipe.read(study)
    message = str(caught.value)
    assert "recipe" in message or "older moeopt" in message
    assert len(message) < 600
    assert "\n" not in message


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"name": 3},
        {"name": "eep"},
        {"name": "os.system"},
        {"name": "eep", "seed": 0, "initial": "many"},
        {"name": "cmaes", "seed": 0, "population_size": 1 << 40},
        {"name": "cmaes:eep"},
        {"name": "random", "seed": [], "redraw": {}},
        {"name": "random", "space": 1},
    ],
)
def test_hostile_settings_of_a_sampler_are_one_clear_error(
    settings: dict[str, Any], objective: moeopt.Objective, whole: tuple[optuna.Study, Recipe]
) -> None:
    held = whole[1]
    hostile = Recipe(**body_of(held, sampler={"settings": settings}))
    with pytest.raises(StudyError, match="sampler"):
        recipe.sampler_of(hostile, objective.space)
    named = Recipe(**body_of(held, pruner={"class": "os.system", "command": "true"}))
    with pytest.raises(StudyError, match="pruner"):
        recipe.pruner_of(named)
