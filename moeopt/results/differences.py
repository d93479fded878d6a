"""Paired differences between evaluations of the same examples, and what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moeopt.evaluation import Evaluation, Interval

Judgement = Literal["better", "worse", "no difference"]


def difference(a: Evaluation, b: Evaluation, *, of: Literal["loss", "accuracy"] = "loss") -> Interval:
    """a minus b with its 95% interval, a paired bootstrap over the examples."""
    from moeopt.evaluation import paired_bootstrap

    return paired_bootstrap(a, b, of=of)


def reversed_difference(interval: Interval) -> Interval:
    """b minus a, of a minus b; of a loss: what was gained."""
    return type(interval)(-interval.mean, -interval.high, -interval.low)


def judged(interval: Interval) -> Judgement:
    """What a difference of losses says of the first: one that does not exclude 0 says nothing."""
    return "better" if interval.high < 0 else "worse" if interval.low > 0 else "no difference"


def signed(interval: Interval) -> str:
    """A difference as everything moeopt shows and keeps writes it: ``+0.1000 [+0.0500, +0.1500]``."""
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
