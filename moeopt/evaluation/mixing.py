"""Mixtures by their tasks' metrics, where some are answered by generating: every member has an evaluator of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeopt.evaluation.evaluation import Evaluation

if TYPE_CHECKING:
    from moeopt.evaluation.evaluator import Evaluator
    from moeopt.plan import Plan


@dataclass(frozen=True, eq=False)
class Member:
    """A task of a mixture.

    Args:
        evaluator: of its examples in use, by its metric, with a rung wherever the mixture has one.
        at: where they stand in the mixture, int64 (examples,), rising.
        scale: their weight in the mixture over that in their own task, float64 (examples,).
    """

    evaluator: Evaluator
    at: NDArray[np.int64]
    scale: NDArray[np.float64]

    def known(self, of: Evaluation | None) -> Evaluation | None:
        """What is known of its own examples, from what is known of the mixture's."""
        if of is None:
            return None
        n = int(np.searchsorted(self.at, len(of.losses)))
        losses, weights, correct = of.scores[:, self.at[:n]]
        return Evaluation(losses, (weights / self.scale[:n]).astype(np.float32), correct, 0, 0, 0.0, of.active)


def race(
    members: Mapping[str, Member], rungs: Sequence[int], plan: Plan | None, known: Evaluation | None
) -> Iterator[Evaluation]:
    """As `Evaluator.race`, from the races of the members."""
    races = {name: member.evaluator.race(plan, member.known(known)) for name, member in members.items()}
    latest: dict[str, Evaluation] = {}
    for size in rungs:
        found = np.zeros((3, size), np.float32)
        for name, member in members.items():
            n = int(np.searchsorted(member.at, size))
            if n > (len(latest[name].losses) if name in latest else 0):
                latest[name] = next(races[name])
            if n:
                scores = latest[name].scores
                scores[1] *= member.scale[:n]
                found[:, member.at[:n]] = scores
        if known is not None:
            covered = min(size, len(known.losses))
            found[:, :covered] = known.scores[:, :covered]
        of = latest.values()
        costs = sum(e.tokens for e in of), sum(e.layer_tokens for e in of), sum(e.seconds for e in of)
        active = float(np.average([e.active for e in of], weights=[len(e.losses) for e in of]))
        metrics: dict[str, float] = {}
        if known is None:
            metrics["score"] = float(np.average(found[2].astype(np.float64), weights=found[1]))
            metrics |= {f"{name}/{key}": value for name, e in latest.items() for key, value in e.metrics.items()}
        yield Evaluation(found[0], found[1], found[2], *costs, active, metrics)
