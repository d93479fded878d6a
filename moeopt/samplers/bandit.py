"""A bandit over cheap and dear changes: Thompson sampling of gain per layer-token (Chapelle & Li 2011).

A play has a reward, mostly 0, and a cost, and rewards dry up where they were found. In units of the mean positive one,
rewards are taken for events of a Poisson process that runs while layer-tokens are spent: after plays whose rewards sum
to s and whose costs sum to t, an arm's rate has the posterior Gamma(c m + s, c + t), m being the rate over all arms and
c the weight of that mean, worth `prior` plays of mean cost. Every later play takes a factor exp(-1 / memory) off a
play's weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from moeopt.samplers.history import Observation
from moeopt.spaces.base import Space

A = TypeVar("A", bound=Hashable)


def choose(
    rng: np.random.Generator, arms: Sequence[A], plays: Sequence[tuple[A, float, float]], *, prior: float, memory: float
) -> A:
    """The arm whose drawn gain per unit of cost is largest.

    Args:
        arms: to choose from.
        plays: (arm, gain >= 0, cost > 0), oldest first; those of other arms are passed over.
        prior: weight of the mean over all arms, in plays of mean cost.
        memory: plays after which one counts 1 / e.
    """
    weights = np.exp((np.arange(len(plays)) - len(plays) + 1) / memory)
    gain_unit = np.mean([gain for _, gain, _ in plays if gain > 0] or [1.0])
    cost_unit = np.mean([cost for _, _, cost in plays] or [1.0])
    gained, spent = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0.0)
    for (arm, gain, cost), weight in zip(plays, weights):
        if arm in gained:
            gained[arm] += weight * gain / gain_unit
            spent[arm] += weight * cost / cost_unit
    mean = (1 + sum(gained.values())) / (1 + sum(spent.values()))
    drawn = [rng.gamma(prior * mean + gained[arm]) / (prior + spent[arm]) for arm in arms]
    return arms[int(np.argmax(drawn))]


def gain(obs: Observation, parent: Observation | None) -> float:
    """How much a trial's loss is below its parent's; 0 where it is not, or one of them is not known."""
    if parent is None or parent.loss is None or obs.loss is None:
        return 0.0
    return max(0.0, parent.loss - obs.loss)


def most_tokens(history: Iterable[Observation]) -> float:
    """Tokens of a trial that ran all examples; 0 where none says."""
    return max((float(obs.attrs.get("tokens") or 0.0) for obs in history), default=0.0)


def layers_run(obs: Observation, space: Space, first: int, whole: float) -> float:
    """What a trial cost, in layers over all examples: those from layer `first` on, over the tokens that it ran.

    Not by its own account (`layer_tokens`): what could be reused of earlier trials depends on the process that it ran
    in, and what a sampler proposes must not.

    Args:
        whole: `most_tokens`.
    """
    tokens = float(obs.attrs.get("tokens") or 0.0)
    return (space.shape.layers - first) * (tokens / whole if tokens and whole else 1.0)
