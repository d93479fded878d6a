"""Optuna's samplers by name, over a genotype of any size, with the hyperparameters that a study keeps of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import optuna
from optuna.samplers import BaseSampler

from moeopt.errors import SamplerError
from moeopt.plan import Plan
from moeopt.samplers.base import StartingSampler
from moeopt.samplers.shadow import ShadowSampler
from moeopt.spaces.base import Space

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

TPE_SLOW, TPE_AT_MOST = 2_048, 50_000
"""Numbers beyond which `tpe` is warned of, and refused."""
GP_AT_MOST = 256
"""Numbers beyond which `gp` is refused."""


class _Named(ShadowSampler):
    """Drives an Optuna sampler whose hyperparameters are among the settings.

    Args:
        space, sampler, seed, redraw, start: as for `ShadowSampler`.
        hyperparameters: what the sampler was made with, JSON.
    """

    def __init__(
        self,
        space: Space,
        sampler: BaseSampler,
        hyperparameters: Mapping[str, Any],
        *,
        seed: int | None,
        redraw: int,
        start: Plan | ArrayLike | None,
    ) -> None:
        super().__init__(space, sampler, seed=seed, redraw=redraw, start=start)
        self.hyperparameters = dict(hyperparameters)

    def settings(self) -> dict[str, Any]:
        return StartingSampler.settings(self) | self.hyperparameters


class TPESampler(_Named):
    """Optuna's tree-structured Parzen estimator (Bergstra et al., 2011).

    It walks all trials once a number: about a millisecond a number and proposal, growing with trials.

    Args:
        space, seed, redraw, start: as for `ShadowSampler`.
        n_startup_trials: random trials before the estimator is used.
        n_ei_candidates: candidates drawn per proposal.
        multivariate, group, constant_liar: as for `optuna.samplers.TPESampler`.

    Raises:
        SamplerError: for a space of more than `TPE_AT_MOST` numbers.
    """

    name = "tpe"

    def __init__(
        self,
        space: Space,
        *,
        seed: int | None = None,
        redraw: int = 20,
        start: Plan | ArrayLike | None = None,
        n_startup_trials: int = 10,
        n_ei_candidates: int = 24,
        multivariate: bool = False,
        group: bool = False,
        constant_liar: bool = True,
    ) -> None:
        if space.size > TPE_AT_MOST:
            raise SamplerError(
                f"tpe would take minutes a trial for {space.size:,} numbers, the most is {TPE_AT_MOST:,}: use 'eep', "
                "'local', 'guided' or 'sepcmaes', or a PruneSpace, which has a number an expert"
            )
        if space.size > TPE_SLOW:
            warnings.warn(
                f"tpe takes about {space.size / 1000:.0f} s a trial for {space.size:,} numbers, more with every "
                "hundred trials; 'eep', 'local', 'guided' and 'sepcmaes' take a fraction of a second",
                stacklevel=2,
            )
        estimator = {
            "n_startup_trials": n_startup_trials, "n_ei_candidates": n_ei_candidates,
            "multivariate": multivariate, "group": group, "constant_liar": constant_liar,
        }  # fmt: skip
        sampler = _made(self.name, optuna.samplers.TPESampler, estimator)
        alone = _made(self.name, optuna.samplers.TPESampler, estimator | {"constant_liar": False})
        super().__init__(space, sampler, estimator, seed=seed, redraw=redraw, start=start)
        self._alone = alone  # the same proposals in less time: no lie is told when no other trial runs


class NSGASampler(_Named):
    """NSGA-II (Deb et al., 2002) for several objectives: Optuna's, with its hyperparameters.

    Args:
        space, seed, redraw, start: as for `ShadowSampler`.
        population_size: of a generation; the published 50 need some hundreds of trials.
        crossover_prob, swapping_prob, mutation_prob: as for `optuna.samplers.NSGAIISampler`.

    Raises:
        SamplerError: when an argument does not fit.
    """

    name = "nsgaii"
    kind: type[BaseSampler] = optuna.samplers.NSGAIISampler

    def __init__(
        self,
        space: Space,
        *,
        seed: int | None = None,
        redraw: int = 20,
        start: Plan | ArrayLike | None = None,
        population_size: int = 50,
        crossover_prob: float = 0.9,
        swapping_prob: float = 0.5,
        mutation_prob: float | None = None,
    ) -> None:
        genetic = {
            "population_size": population_size, "crossover_prob": crossover_prob, "swapping_prob": swapping_prob,
            "mutation_prob": mutation_prob,
        }  # fmt: skip
        sampler = _made(self.name, self.kind, genetic)
        super().__init__(space, sampler, genetic, seed=seed, redraw=redraw, start=start)


class NSGAIIISampler(NSGASampler):
    """NSGA-III (Deb & Jain, 2014), for three objectives and more; as `NSGASampler`."""

    name = "nsgaiii"
    kind = optuna.samplers.NSGAIIISampler


class GPSampler(_Named):
    """Optuna's Gaussian process with expected improvement, of the hypervolume where there are several objectives.

    Args:
        space, seed, redraw, start: as for `ShadowSampler`.
        n_startup_trials: random trials before the process is used.
        deterministic_objective: whether losses have no noise, as those of one set of examples have none.

    Raises:
        SamplerError: for a space of more than `GP_AT_MOST` numbers.
    """

    name = "gp"

    def __init__(
        self,
        space: Space,
        *,
        seed: int | None = None,
        redraw: int = 20,
        start: Plan | ArrayLike | None = None,
        n_startup_trials: int = 10,
        deterministic_objective: bool = True,
    ) -> None:
        if space.size > GP_AT_MOST:
            raise SamplerError(
                f"gp fits a length scale a number, and would take minutes a trial for {space.size:,} of them; the most "
                f"is {GP_AT_MOST:,}: use 'tpe', 'nsgaii' or fewer groups of layers"
            )
        process = {"n_startup_trials": n_startup_trials, "deterministic_objective": deterministic_objective}
        sampler = _made(self.name, optuna.samplers.GPSampler, process)
        super().__init__(space, sampler, process, seed=seed, redraw=redraw, start=start)


def _made(name: str, kind: Any, options: Mapping[str, Any]) -> BaseSampler:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler: BaseSampler = kind(**options)
    except (TypeError, ValueError) as error:
        raise SamplerError(f"{name}: {error}") from None
    return sampler
