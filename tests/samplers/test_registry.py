from __future__ import annotations

import inspect
import subprocess
import sys

import optuna
import pytest

from moeopt.errors import MoeoptError, SamplerError
from moeopt.plan import ModelShape, Plan
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
from moeopt.spaces import EEPSpace, PruneSpace

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


def test_sizes_that_a_sampler_is_not_for() -> None:
    """48 layers of 128 experts: numbers an expert are many, numbers an entry of W_EM and W_RM too many for some."""
    shape = ModelShape(layers=48, experts=128, k=8)
    scores, entries = PruneSpace(shape, keep=64), EEPSpace(shape, keep=64)
    with pytest.warns(UserWarning, match=r"diagonal of the covariance alone .* 6,144 numbers, more than 1,000"):
        assert get("cmaes", scores).settings()["separable"]
    assert not get("cmaes", scores, separable=False).settings()["separable"]
    with pytest.warns(UserWarning, match="about 6 s a trial for 6,144 numbers"):
        get("tpe", scores)
    refused: list[tuple[str, dict[str, bool]]] = [("tpe", {}), ("cmaes", {"separable": False})]
    for name, options in refused:
        with pytest.raises(SamplerError, match=r"786,432 numbers.*the most is .* PruneSpace"):
            get(name, entries, **options)


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
        ("blockcmaes", {"prior": -1}, "prior must be a positive number, got -1"),
        ("blockcmaes", {"memory": float("nan")}, "memory must be a positive number, got nan"),
        ("blockcmaes", {"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ("blockcmaes", {"generations": 1.5}, "generations must be an integer of at least 1, got 1.5"),
        ("blockcmaes", {"population_size": 3}, "population_size must be an integer of at least 4, got 3"),
        ("blockcmaes", {"start": [1.0, 2.0]}, "PruneSpace has 12 numbers, got 2"),
        ("local", {"population": 0}, "population must be an integer of at least 1, got 0"),
        ("local", {"bands": 2.0}, "bands must be an integer of at least 1, got 2.0"),
        ("local", {"widths": [1, 0]}, r"widths\[1\] must be an integer of at least 1, got 0"),
        ("local", {"widths": []}, "widths must name at least one width"),
        ("local", {"fade": -0.1}, "fade must be a number of at least 0, got -0.1"),
        ("local", {"memory": float("inf")}, "memory must be a positive number, got inf"),
        ("local", {"p_entry": 1.5}, "p_entry is a probability above 0 and at most 1, got 1.5"),
        ("local", {"moves": ["swop"]}, "moves must be some of swap for this space, got"),
        ("local", {"moves": []}, "moves must be some of"),
        ("local", {"start": Plan.one_hot([[0, 1]] * 4, experts=6, k=2)}, "the space"),
        ("guided", {"radius": 0}, "radius must be an integer"),
        ("guided", {"patience": 1.5}, "patience must be"),
        (3, {}, "a sampler is a name or an Optuna sampler object, got 3"),
    ],
)
def test_bad_arguments(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        get(name, SPACE, **options)
    assert isinstance(error.value, MoeoptError)


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


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"nevergrad"}))
def test_every_name_is_documented_and_its_settings_are_all_arguments(name: str) -> None:
    kind = getattr(SAMPLERS[name], "func", SAMPLERS[name])
    assert kind.__doc__
    assert set(get(name, SPACE).settings()) == set(inspect.signature(kind).parameters) - {"space"} | {"name"}


def test_code_of_a_users_own_makes_anything() -> None:
    assert operators({"name": "steps"}) is None
