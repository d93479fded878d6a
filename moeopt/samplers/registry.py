"""Samplers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from optuna.samplers import BaseSampler

from moeopt.errors import SamplerError, nearest
from moeopt.samplers.base import START, GenomeSampler
from moeopt.samplers.blockcmaes import BlockCMAESSampler
from moeopt.samplers.cmaes import CMAESSampler
from moeopt.samplers.eep import EEPSampler
from moeopt.samplers.evoesap import EvoESAPSampler
from moeopt.samplers.guided import GUIDED, GuidedSampler
from moeopt.samplers.local import LocalSampler
from moeopt.samplers.nevergrad import NevergradSampler
from moeopt.samplers.optunas import GPSampler, NSGAIIISampler, NSGASampler, TPESampler
from moeopt.samplers.random import RandomSampler
from moeopt.samplers.shadow import ShadowSampler
from moeopt.spaces.base import Space
from moeopt.trials.description import ENQUEUED

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

MOST = 1e9
"""The largest number in a sampler's settings, its seed aside, that `from_settings` believes."""
SAMPLERS: dict[str, Callable[..., GenomeSampler]] = {
    "eep": EEPSampler,
    "cmaes": CMAESSampler,
    "sepcmaes": partial(CMAESSampler, separable=True),
    "nevergrad": NevergradSampler,
    "tpe": TPESampler,
    "random": RandomSampler,
    "local": LocalSampler,
    GUIDED: GuidedSampler,
    "blockcmaes": BlockCMAESSampler,
    "evoesap": EvoESAPSampler,
    "nsgaii": NSGASampler,
    "nsgaiii": NSGAIIISampler,
    "gp": GPSampler,
}
"""Every sampler that `get` knows by name. ``"nevergrad:DE"`` is short for ``"nevergrad"`` with ``optimizer="DE"``."""


def get(sampler: str | BaseSampler, space: Space, *, seed: int | None = 0, **options: Any) -> GenomeSampler:
    """A sampler over `space`.

    Args:
        sampler: a name of `SAMPLERS`, ``"nevergrad:<any optimiser of its registry>"``, one of moeopt's samplers
            (returned as it is), or any other Optuna or OptunaHub sampler object (driven by a `ShadowSampler`).
        space: what to search.
        seed: of all random draws; not used for one of moeopt's samplers, which has its own.
        options: further arguments of the sampler's class.

    Raises:
        SamplerError: when the name or an option is unknown, or the sampler is for another space.
    """
    if isinstance(sampler, GenomeSampler):
        if options:
            raise SamplerError(f"{type(sampler).__name__} is made already; options {sorted(options)} come too late")
        if sampler.space.describe() != space.describe():
            raise SamplerError(f"the {type(sampler).__name__} was made for another space than this study's")
        return sampler
    if isinstance(sampler, BaseSampler):
        return _make("ShadowSampler", ShadowSampler, space, options, sampler=sampler, seed=seed)
    if not isinstance(sampler, str):
        raise SamplerError(f"a sampler is a name or an Optuna sampler object, got {sampler!r}")
    name, colon, optimizer = sampler.partition(":")
    if name not in SAMPLERS or (colon and name != "nevergrad"):
        names = [*SAMPLERS, "nevergrad:DE", "nevergrad:OnePlusOne", "nevergrad:PSO", "nevergrad:NGOpt"]
        hint = nearest(sampler, names)
        raise SamplerError(f"unknown sampler {sampler!r}{hint}; there are {', '.join(SAMPLERS)} and any nevergrad:NAME")
    if colon:
        options["optimizer"] = optimizer
    if name == "nevergrad" and "optimizer" not in options:
        raise SamplerError(
            "nevergrad needs an optimiser's name: nevergrad:DE, nevergrad:OnePlusOne, nevergrad:PSO, ..."
        )
    return _make(sampler, SAMPLERS[name], space, options, seed=seed)


def from_settings(settings: dict[str, Any], space: Space, start: ArrayLike | None = None) -> GenomeSampler:
    """The sampler of `SAMPLERS` whose `settings()` these are.

    Args:
        settings: JSON.
        space: what it searches.
        start: the vector (size,) that it starts at, where that is not the space's own start.

    Raises:
        SamplerError: when they are not those of a sampler that is known by name.
    """
    name, *_ = parts = str(settings.get("name")).split(":")
    inner = settings.get("sampler")
    if isinstance(inner, dict):
        raise SamplerError(f"it is an object of class {inner.get('class')!r:.120}")
    if name not in SAMPLERS or len(parts) > 2:
        raise SamplerError(f"sampler {settings.get('name')!r:.80} is not one of moeopt's")
    for option, value in settings.items():
        if option != "seed" and isinstance(value, (int, float)) and not -MOST <= value <= MOST:
            raise SamplerError(f"{option!r:.40} of {name} is {value!r:.40}, which is not believed")
    options = {key: value for key, value in settings.items() if key not in ("name", "start")}
    attempts: list[dict[str, Any]] = [{}] if start is None or settings.get("start") is None else [{"start": start}, {}]
    for more in attempts if "start" in settings else [{}]:
        sampler = get(settings["name"], space, **options, **more)
        if sampler.settings() == settings:
            return sampler
    raise SamplerError(f"{name} cannot be made with the settings {settings!r:.300}")


def operators(settings: Mapping[str, Any]) -> frozenset[str] | None:
    """What may have made a trial, as it says itself, in a study whose sampler has these settings.

    None where the sampler does not say, or is code of its own.
    """
    name, _, optimizer = str(settings.get("name")).partition(":")
    make = {ShadowSampler.name: ShadowSampler, **SAMPLERS}.get(name)
    made = (optimizer,) if optimizer else getattr(getattr(make, "func", make), "operators", ())
    return frozenset({START, ENQUEUED, *made}) if made else None


def _make(
    name: str, make: Callable[..., GenomeSampler], space: Space, options: dict[str, Any], **arguments: Any
) -> GenomeSampler:
    accepted = [p for p in inspect.signature(make).parameters if p != "space" and p not in arguments]
    for option in options:
        if option not in accepted:
            hint = nearest(option, accepted)
            raise SamplerError(f"{name} has no option {option!r}{hint}; it accepts {', '.join(sorted(accepted))}")
    try:
        return make(space, **arguments, **options)
    except TypeError as error:
        raise SamplerError(f"{name} cannot be made with {options}: {error}") from error
