"""Mixtures of tasks with weights.

    MixtureTask({"boolq": (tasks.get("boolq", num_fewshot=2), 2.0), "notes": (tasks.get("text", "notes/"), 1.0)})

Member m has the share s_m of the mixture: its weight over the sum of all weights. The mixture's loss is the sum of
s_m L_m, where L_m is the member's own mean loss over its U_m examples in use; correctness likewise. So the weight of
example i of member m, with w_mi its weight in its own task, is

    v_mi = s_m * U * w_mi / sum_(j < U_m) w_mj          U = sum of all U_m,

which has nothing to do with how many examples or tokens the member has. The sum runs over all of the split that is in
use, whatever the limit: v_mi is fixed, and what a prefix of the examples got can be told from their scores alone, as
racing and known scores need it. Example i of a member stands at (i + 1/2) / U_m of the way, so the first n examples
hold n U_m / U of each, but for rounding, which is the one rate at which the weighted mean of every prefix estimates the
loss of all. Larger limits hold the examples of smaller ones, in front, with the same weights.

What is in use is told by `use`:

- "share": s_m of the examples are the member's, so that all weigh about the same, and a limit of n costs n examples'
  worth of information. The mixture ends where the first member runs out; what others have beyond is left out.
- "all": every example of every member. The loss is that of the whole splits, but under a limit a small member of large
  weight is known from few examples, of large weight each.

A member counts examples as its requests do: windows, for text.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal, get_args

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks.base import SPLITS, Example, Float32, Float64, Int64, Request, Scores, Task
from moeopt.tasks.splits import check_apart, checked_limit

Use = Literal["share", "all"]


@dataclass(frozen=True)
class _Source:
    """The member that a request is of, the request as the member made it, its weight there, and v / w."""

    member: int
    request: Request
    weight: float
    scale: float


class MixtureTask(Task):
    """Several tasks as one; its splits are those that all members have.

    `examples` gives the members' examples in the mixture's order, ids prefixed by the member's name; for a text member
    these are documents, where requests count windows. Metrics are the "score", the mixture's mean correctness, and
    those of every member as "name/metric", where it has an example so far. Members share no example nor group across
    splits, as far as their texts tell: one question in two templates is of one group where it has a passage; otherwise
    such members need data with splits of their own.

    Args:
        members: task and weight by name; or a sequence of them, which take the tasks' names.
        use: which examples are in use; see the top of this file.
        name: what studies record.

    Raises:
        TaskError: if there is no member or no common split, two members have one name, a weight is not above 0, or an
            example is in one split of one member and in another of another.
    """

    metric = "score"

    def __init__(
        self,
        members: Mapping[str, tuple[Task, float]] | Sequence[tuple[Task, float]],
        *,
        use: Use = "share",
        name: str = "mixture",
    ) -> None:
        listed = list(members.items()) if isinstance(members, Mapping) else [(pair[0].name, pair) for pair in members]
        if not listed:
            raise TaskError("a mixture needs at least one task")
        if use not in get_args(Use):
            raise TaskError(f"use must be one of {', '.join(get_args(Use))}, got {use!r}")
        names = [key for key, _ in listed]
        for key, (_, weight) in listed:
            if names.count(key) > 1:
                raise TaskError(f"two tasks of the mixture are called {key!r}: give them names of their own")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise TaskError(f"the weight of {key!r} must be a number above 0, got {weight!r}")
        total = math.fsum(weight for _, (_, weight) in listed)
        self.name, self.use = name, use
        self._members = {key: task for key, (task, _) in listed}
        self.shares = {key: weight / total for key, (_, weight) in listed}
        self._splits = tuple(s for s in SPLITS if all(s in task.splits for task in self.members.values()))
        if not self._splits:
            have = "; ".join(f"{key} has {', '.join(task.splits)}" for key, task in self.members.items())
            raise TaskError(f"the tasks of the mixture have no split in common: {have}")
        check_apart(
            {
                (split, name): [*task.examples(split), *(task.shown() if split == "search" else ())]
                for split in self._splits
                for name, task in self.members.items()
            }
        )
        self.unit = " and ".join(sorted({task.unit for task in self.members.values()}, reverse=True))
        self.origin = "; ".join(f"{key}: {task.summary}" for key, task in self.members.items())

    @property
    def members(self) -> Mapping[str, Task]:
        return self._members

    @property
    def splits(self) -> tuple[str, ...]:
        return self._splits

    def examples(self, split: str) -> tuple[Example, ...]:
        pools = [(name, task.examples(self._checked(split))) for name, task in self.members.items()]
        order = _order(self._in_use([len(pool) for _, pool in pools]))
        return tuple(
            replace(pools[m][1][i], id=f"{pools[m][0]}/{pools[m][1][i].id}") for m, i in zip(order, _ranks(order))
        )

    def requests(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> list[Request]:
        """The members' requests for the first `limit` examples in the mixture's order.

        Warns of what is left out when there is no limit, and of members that a small limit leaves out.
        """
        weights, scales, order = self._laid_out(split, tokenizer, max_length)
        used = order[: checked_limit(limit)]
        self._warn(limit, order, used, [len(w) for w in weights])
        requests: list[Request] = []
        for m, task in enumerate(self.members.values()):
            at = [position for position, member in enumerate(used) if member == m]
            for request in task.requests(split, tokenizer, len(at), max_length) if at else ():
                i = request.example
                source = _Source(m, request, float(weights[m][i]), float(scales[m][i]))
                requests.append(replace(request, example=at[i], source=source))
        return sorted(requests, key=lambda request: request.example)

    def counts(
        self, split: str, tokenizer: Any, limit: int | None = None, max_length: int | None = None
    ) -> dict[str, int]:
        """How many examples of each member are among the first `limit`."""
        used = self._laid_out(split, tokenizer, max_length)[2][: checked_limit(limit)]
        return {name: used.count(m) for m, name in enumerate(self.members)}

    def reduce(self, split: str, requests: Sequence[Request], log_likelihood: Float64, greedy: Int64) -> Scores:
        positions = {example: i for i, example in enumerate(sorted({request.example for request in requests}))}
        columns = np.zeros((4, len(positions)), np.float32)
        chosen = np.full(len(positions), -1, np.int64)
        members: dict[str, Scores] = {}
        for m, (name, task) in enumerate(self.members.items()):
            mine = [i for i, request in enumerate(requests) if request.source.member == m]
            if not mine:
                continue
            requested = [requests[i].source.request for i in mine]
            scores = members[name] = task.reduce(split, requested, log_likelihood[mine], greedy[mine])
            source = {positions[requests[i].example]: requests[i].source for i in mine}
            expected = np.asarray([item.weight for item in source.values()], np.float32)
            if not np.array_equal(scores.weights, expected):
                raise TaskError(f"task {name!r}: `reduce` gives other weights than `weights`, which a mixture needs")
            at = list(source)
            scaled = scores.weights * np.asarray([item.scale for item in source.values()])
            choice = scores.losses if scores.choice is None else scores.choice
            columns[:, at] = scores.losses, scaled, scores.correct, choice
            if scores.chosen is not None:
                chosen[at] = scores.chosen
        return Scores(columns[0], columns[1], columns[2], chosen, columns[3] if self.chooses else None, members)

    @property
    def chooses(self) -> bool:
        """Whether a member does; what the others contribute to ``score="choice"`` is their likelihood."""
        return any(task.chooses for task in self.members.values())

    @property
    def generates(self) -> bool:
        """Whether a member's metric is that of generated text."""
        return any(task.generates for task in self.members.values())

    def places(self, requests: Sequence[Request]) -> dict[str, tuple[Int64, Float64]]:
        """Of every member with an example among the requests: where its examples stand, and v / w of each."""
        places: dict[str, tuple[Int64, Float64]] = {}
        for m, name in enumerate(self.members):
            scales = {request.example: request.source.scale for request in requests if request.source.member == m}
            if scales:
                places[name] = np.array(sorted(scales)), np.array([scales[i] for i in sorted(scales)])
        return places

    def by_member(self, requests: Sequence[Request]) -> dict[str, list[Request]]:
        """Of every member with an example among the requests: its requests, as it made them."""
        names = list(self.members)
        requested: dict[str, list[Request]] = {}
        for request in requests:
            requested.setdefault(names[request.source.member], []).append(request.source.request)
        return requested

    def chance(self, split: str, requests: Sequence[Request]) -> Float64:
        """As the members say of their own examples."""
        chances = np.full(len({request.example for request in requests}), np.nan)
        places = self.places(requests)
        for name, requested in self.by_member(requests).items():
            chances[places[name][0]] = self.members[name].chance(split, requested)
        return chances

    def metrics(self, split: str, scores: Scores) -> dict[str, float]:
        values = super().metrics(split, scores)
        for name, member_scores in (scores.members or {}).items():
            values |= {
                f"{name}/{key}": value for key, value in self.members[name].metrics(split, member_scores).items()
            }
        return values

    def weights(self, split: str, tokenizer: Any, max_length: int | None = None) -> Float32:
        weights, scales, order = self._laid_out(split, tokenizer, max_length)
        return np.asarray([weights[m][i] * scales[m][i] for m, i in zip(order, _ranks(order))], np.float32)

    def solutions(self, split: str, requests: Sequence[Request]) -> list[Request]:
        chosen: list[Request] = []
        for m, task in enumerate(self.members.values()):
            mine = {id(request.source.request): request for request in requests if request.source.member == m}
            requested = [request.source.request for request in mine.values()]
            chosen += [mine[id(request)] for request in task.solutions(split, requested)]
        return sorted(chosen, key=lambda request: request.example)

    def prompted(self, **options: Any) -> Task:
        raise TaskError(f"task {self.name!r} has no prompts of its own: give shots and chat to its tasks")

    def check(self, tokenizer: Any) -> None:
        for task in self.members.values():
            task.check(tokenizer)

    def fingerprint(self, split: str | None = None) -> str:
        parts = [[name, self.shares[name], task.fingerprint(split)] for name, task in self.members.items()]
        return hashlib.sha256(json.dumps([self.use, parts]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "mixture",
            "fingerprint": self.fingerprint(),
            "examples": {split: len(self.examples(split)) for split in self.splits},
            "use": self.use,
            "members": {name: {"share": self.shares[name], **task.describe()} for name, task in self.members.items()},
        }

    def _checked(self, split: str) -> str:
        if split not in SPLITS:
            raise TaskError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
        if split not in self._splits:
            lacks = next(name for name, task in self.members.items() if split not in task.splits)
            raise TaskError(f"task {self.name!r} has no split {split!r}: {lacks!r} lacks it")
        return split

    def _in_use(self, counts: Sequence[int]) -> list[int]:
        """U_m of every member, from how many examples it has."""
        if self.use == "all":
            return list(counts)
        shares = list(self.shares.values())
        most = min(n / share for n, share in zip(counts, shares))
        return [min(n, max(1, math.floor(share * most + 1e-9))) for n, share in zip(counts, shares)]

    def _laid_out(
        self, split: str, tokenizer: Any, max_length: int | None
    ) -> tuple[list[Float32], list[Float64], list[int]]:
        """By member all weights, and v / w of every example in use; and the member at every position."""
        weights = [task.weights(self._checked(split), tokenizer, max_length) for task in self.members.values()]
        used = self._in_use([len(w) for w in weights])
        sums = [float(w[:n].sum(dtype=np.float64)) for w, n in zip(weights, used)]
        scales = [np.full(n, s * sum(used) / w) for n, s, w in zip(used, self.shares.values(), sums)]
        return weights, scales, _order(used)

    def _warn(self, limit: int | None, order: Sequence[int], used: Sequence[int], counts: Sequence[int]) -> None:
        for m, (name, total) in enumerate(zip(self.members, counts)):
            if m not in used:
                warnings.warn(
                    f"task {self.name!r}: none of the first {len(used)} examples is of {name!r}, whose first is number"
                    f" {order.index(m) + 1}",
                    stacklevel=3,
                )
            elif limit is None and order.count(m) < 0.9 * total:
                warnings.warn(
                    f"task {self.name!r}: {order.count(m)} of {total} examples of {name!r} are in use, as its share"
                    " says where another task has no more; use='all' takes all",
                    stacklevel=3,
                )


def _order(counts: Sequence[int]) -> list[int]:
    """The member at every position: its i-th of n examples stands at (i + 1/2) / n of the way.

    >>> _order([4, 2])
    [0, 1, 0, 0, 1, 0]
    """
    places = sorted(((i + 0.5) / n, m) for m, n in enumerate(counts) for i in range(n))
    return [m for _, m in places]


def _ranks(order: Sequence[int]) -> list[int]:
    """How many positions before each are of the same member."""
    counts: defaultdict[int, Iterator[int]] = defaultdict(count)
    return [next(counts[member]) for member in order]
