from __future__ import annotations

import subprocess
import sys

import optuna
import pytest

from moeopt.errors import SamplerError
from moeopt.plan import ModelShape
from moeopt.samplers import (
    SAMPLERS,
    CMAESSampler,
    EEPSampler,
    NevergradSampler,
    ShadowSampler,
    TPESampler,
    get,
    operators,
)
from moeopt.spaces import PruneSpace

SPACE = PruneSpace(ModelShape(layers=4, experts=6, k=2), keep=3, groups=2)


def test_names_and_options() -> None:
    assert isinstance(get("eep", SPACE, initial=5), EEPSampler)
    assert get("cmaes", SPACE).settings() | {"separable": True} == get("sepcmaes", SPACE).settings()
    assert isinstance(get("tpe", SPACE, n_startup_trials=3), TPESampler)
    short = get("nevergrad:DE", SPACE, budget=50)
    assert isinstance(short, NevergradSampler)
    assert short.settings() == get("nevergrad", SPACE, optimizer="DE", budget=50).settings()
    assert get("random", SPACE, seed=7).seed == 7
    assert get("random", SPACE, seed=None).seed != get("random", SPACE, seed=None).seed


def test_objects() -> None:
    mine = CMAESSampler(SPACE, seed=3)
    assert get(mine, SPACE) is mine
    wrapped = get(optuna.samplers.TPESampler(n_startup_trials=4), SPACE, seed=5)
    assert isinstance(wrapped, ShadowSampler)
    assert wrapped.settings()["sampler"]["class"].endswith("TPESampler")
    assert wrapped.settings()["sampler"]["n_startup_trials"] == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "cmaess",
            {},
            r"unknown sampler 'cmaess'; did you mean 'cmaes'\?; there are eep, cmaes, sepcmaes, nevergrad, tpe, random",
        ),
        ("cmaes:DE", {}, "unknown sampler 'cmaes:DE'"),
        ("nevergrad", {}, "needs an optimiser's name"),
        ("nevergrad:OnePlusTwo", {}, r"no optimiser 'OnePlusTwo'; did you mean 'OnePlusOne'\?"),
        ("nevergrad:", {}, "no optimiser ''"),
        ("eep", {"pchange": 0.5}, r"eep has no option 'pchange'; did you mean 'p_change'\?; it accepts band, "),
        ("nevergrad:DE", {"popsize": 3}, "nevergrad:DE has no option 'popsize'"),
        ("sepcmaes", {"sigma": 0.0}, "sigma must be a positive number, got 0.0"),
        ("cmaes", {"population_size": 2}, "population_size must be an integer of at least 3, got 2"),
        ("nevergrad:DE", {"budget": 0}, "budget must be an integer of at least 1, got 0"),
        ("tpe", {"multivariate": False, "group": True}, "tpe: "),
        ("eep", {"p_row": 1.5}, "p_row is a probability between 0 and 1, got 1.5"),
        ("eep", {"score": "f1"}, "score must be 'loss' or 'accuracy', got 'f1'"),
        ("random", {"redraw": -1}, "redraw must be an integer of at least 0, got -1"),
        ("random", {"seed": -1}, "seed must be at least 0, got -1"),
        (3, {}, "a sampler is a name or an Optuna sampler object, got 3"),
    ],
)
def test_bad_arguments(name: str, options: dict, message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        get(name, SPACE, **options)


def test_a_sampler_of_another_space_is_refused() -> None:
    other = PruneSpace(ModelShape(layers=4, experts=6, k=2), keep=3, groups=4)
    with pytest.raises(SamplerError, match="made for another space"):
        get(CMAESSampler(other), SPACE)
    with pytest.raises(SamplerError, match=r"options \['sigma'\] come too late"):
        get(CMAESSampler(SPACE), SPACE, sigma=2.0)
    with pytest.raises(SamplerError, match="needs one of moeopt's spaces, got int"):
        CMAESSampler(3)  # type: ignore[arg-type]


def test_optional_packages_are_imported_when_used() -> None:
    code = (
        "import sys, moeopt.samplers; print({'cmaes', 'nevergrad', 'cma', 'torch', 'transformers'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


def test_every_name_is_documented_by_its_class() -> None:
    assert all(getattr(make, "func", make).__doc__ for make in SAMPLERS.values())


def test_code_of_a_users_own_makes_anything() -> None:
    assert operators({"name": "steps"}) is None
