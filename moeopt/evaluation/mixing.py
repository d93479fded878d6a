"""Mixtures by their tasks' metrics, where some are answered by generating: every member has an evaluator of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeopt.evaluation.evaluation import Evaluation

if TYPE_CHECKING:
    from moeopt.evaluation.evaluator import Evaluator
    from moeopt.plan import Plan
    from moeopt.tasks import Request


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

    def race(self, plan: Plan | None, earlier: Evaluation | None) -> Iterator[Evaluation]:
        """The race of its examples, given what is known of the mixture's."""
        if earlier is not None:
            n = int(np.searchsorted(self.at, len(earlier.losses)))
            losses, weights, correct = earlier.scores[:, self.at[:n]]
            weights = (weights / self.scale[:n]).astype(np.float32)
            earlier = Evaluation(losses, weights, correct, 0, 0, 0.0, earlier.active)
        return self.evaluator.race(plan, earlier)


class Members:
    """The scorer of a mixture, from those of its members.

    Args:
        task: a `MixtureTask`.
        requests: its own.
        rungs: rising numbers of its examples.
        make: gives an evaluator of a task, `requests`, `limit` and `rungs`.
    """

    def __init__(
        self, task: Any, requests: Sequence[Request], rungs: Sequence[int], make: Callable[..., Evaluator]
    ) -> None:
        self.members: dict[str, Member] = {}
        self.rungs, requests_of = rungs, task.by_member(requests)
        for name, (at, scale) in task.places(requests).items():
            # A member pauses where the mixture does, unless it has no example yet.
            sizes = sorted({int(n) for n in np.searchsorted(at, rungs) if n})
            evaluator = make(task.members[name], requests=requests_of[name], limit=len(at), rungs=sizes)
            self.members[name] = Member(evaluator, at, scale)

    def race(self, plan: Plan | None, earlier: Evaluation | None) -> Iterator[Evaluation]:
        """As `Evaluator.race`, from the races of the members."""
        races = {name: member.race(plan, earlier) for name, member in self.members.items()}
        latest: dict[str, Evaluation] = {}
        for size in self.rungs:
            columns = np.zeros((3, size), np.float32)
            for name, member in self.members.items():
                n = int(np.searchsorted(member.at, size))
                if n > (len(latest[name].losses) if name in latest else 0):
                    latest[name] = next(races[name])
                if n:
                    scores = latest[name].scores
                    scores[1] *= member.scale[:n]
                    columns[:, member.at[:n]] = scores
            parts = latest.values()
            costs = sum(e.tokens for e in parts), sum(e.layer_tokens for e in parts), sum(e.seconds for e in parts)
            active = float(np.average([e.active for e in parts], weights=[len(e.losses) for e in parts]))
            metrics = {"score": float(np.average(columns[2].astype(np.float64), weights=columns[1]))}
            metrics |= {f"{name}/{key}": value for name, e in latest.items() for key, value in e.metrics.items()}
            yield Evaluation(columns[0], columns[1], columns[2], *costs, active, metrics).with_earlier(earlier)

    def clear(self) -> None:
        for member in self.members.values():
            member.evaluator.clear()

    def identity(self) -> Iterator[object]:
        return ((name, member.evaluator.fingerprint) for name, member in self.members.items())
