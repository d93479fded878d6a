"""Search spaces: a flat vector of numbers on one side, a `Plan` on the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

from moeopt.errors import SpaceError
from moeopt.plan import LayerPlan, Matrix, ModelShape, Negative, Plan, one_hot, why_unequal
from moeopt.plan.matrices import one_hot_rows
from moeopt.showing import shown
from moeopt.study.storage.attributes import frozen_trial
from moeopt.trials import genome
from moeopt.trials.genome import Vector

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

Groups: TypeAlias = int | Sequence[tuple[int, int]]
MapAt = Literal["prob", "logit", "rows"]
Phase = Literal["prune", "merge", "active"]

NAMED_AT_MOST = 48
"""Spaces of at most so many numbers appear as ordinary named Optuna parameters as well."""


class Space(ABC):
    """What may vary: the numbers a sampler chooses, and the plans they stand for.

    All layers of a group share one pair of matrices. Vectors are float32 of shape ``(size,)``; matrices of all groups
    are float32 of shape ``(groups, 2, r, n)``, `[:, 0]` being W_EM and `[:, 1]` W_RM. The numbers of the matrices come
    first, group by group; `extras`, the numbers beyond them, are an `ActiveSpace`'s alone.

    Args:
        shape: layers, experts and k of the model (`of` reads it off a model).
        keep: r, experts kept per layer, k <= r <= n.
        groups: a number of layer groups of equal size (remainder layers go to the last one, as in EEP), or inclusive
            layer ranges ``[(0, 7), (8, 31)]`` that cover every layer once, in order. None: each layer is its own.
        k: experts activated per token in the planned model; by default the model's.
        router: where W_RM acts: ``"prob"``, as in EEP, on probabilities; ``"logit"``, on logits, which stock
            checkpoints express; or ``"rows"``, where it is no choice of its own: every new expert has the router's row
            of the expert that weighs most in it (`router_rows`), which stock checkpoints express, too. None: as the
            shape has it, "prob" unless the model's routers correct their choice by a bias or choose groups of experts
            first, or its family has no custom form.
        negative: what becomes of negative mapped probabilities: ``"clamp"``, or ``"eep"`` (see `LayerPlan`).

    Raises:
        SpaceError: naming the argument that does not fit.
    """

    phases: tuple[Phase, ...]
    """Which of EEP's two phases has something to change here; ``("active",)`` where there are only extras."""
    names: tuple[str, ...]
    low: Vector
    high: Vector
    step: Vector
    """A natural first step of each number, for samplers that want a standard deviation."""
    integer: bool = False
    extra_groups: tuple[tuple[int, int], ...] = ()
    """Layer ranges that the extras are of; `x[space.extras]` is (kinds of extras, these ranges), flattened."""

    def __init__(
        self,
        shape: ModelShape,
        *,
        keep: int,
        groups: Groups | None = None,
        k: int | None = None,
        router: MapAt | None = None,
        negative: Negative = "clamp",
    ) -> None:
        self.shape = shape
        self.keep = _checked_int("keep", keep)
        self.k = shape.k if k is None else _checked_int("k", k)
        self.router: MapAt = shape.router if router is None else router
        self.negative: Negative = negative
        if self.k < 1:
            raise SpaceError(f"k must be at least 1, got {self.k}")
        if self.keep > shape.experts:
            raise SpaceError(f"keep={self.keep} asks for more experts than the {shape.experts} each layer has")
        if self.keep < self.k:
            raise SpaceError(f"keep={self.keep} is fewer than the k={self.k} experts each token activates")
        if self.router not in get_args(MapAt):
            raise SpaceError(f"router must be 'prob', 'logit' or 'rows', got {router!r}")
        if negative not in ("clamp", "eep"):
            raise SpaceError(f"negative must be 'clamp' or 'eep', got {negative!r}")
        self.groups = layer_groups(shape.layers if groups is None else groups, shape.layers)

    @classmethod
    def of(cls, model: Any, **arguments: Any) -> Any:
        """The space for a loaded model (or a `ModelShape`); other arguments as for the class."""
        if not isinstance(model, ModelShape):
            from moeopt.models import shape_of

            model = shape_of(model)
        return cls(model, **arguments)

    @property
    def size(self) -> int:
        """How many numbers a genotype has."""
        return len(self.names)

    @abstractmethod
    def matrices(self, x: Vector) -> Matrix:
        """W_EM and W_RM of every group, float32 (groups, 2, r, n)."""

    @abstractmethod
    def from_matrices(self, matrices: Matrix) -> Vector:
        """The numbers that stand for these matrices, as near as this space has them."""

    @property
    def extras(self) -> slice:
        """The numbers beyond those of the matrices; an empty slice where there are none."""
        return slice(self.size, self.size)

    @property
    def whole(self) -> NDArray[np.bool_]:
        """Which numbers are integers, (size,)."""
        return np.full(self.size, self.integer)

    def with_matrices(self, x: Vector, matrices: Matrix) -> Vector:
        """`x` with these matrices, (groups, 2, r, n), in place of its own; its extras stay."""
        return self.from_matrices(matrices)

    @abstractmethod
    def start(self) -> Vector:
        """Where a search begins when nothing is known."""

    def extremes(self) -> list[Plan]:
        """Its start, and, as far as it has them, a plan that merges in every layer, and one with all extras largest.

        A model that takes these takes every plan of the space, as far as can be told without running them.
        """
        start, matrices = self.start(), slice(0, self.extras.start)
        merging, active = start.copy(), start.copy()
        merging[matrices] += self.step[matrices] / 4
        active[self.extras] = self.high[self.extras]
        return [
            self.decode(start),
            *([self.decode(merging)] if "merge" in self.phases else []),
            *([self.decode(active)] if active.size > self.extras.start else []),
        ]

    @abstractmethod
    def sample(self, rng: np.random.Generator) -> Vector:
        """A random point, as random search and EEP's initial population draw it."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """A JSON description; a study is resumed only with an equal one."""

    def decode(self, x: ArrayLike) -> Plan:
        """The plan that `size` numbers stand for. Numbers out of bounds are clipped, integers rounded, as by `snap`."""
        return self.decode_matrices(self.matrices(self.snap(x)))

    def _layer(self, w_em: Matrix, w_rm: Matrix) -> LayerPlan:
        n, groups = self.shape.experts, self.shape.router_groups
        if groups > 1 and one_hot_rows(w_em) is not None and (self.router == "rows" or np.array_equal(w_em, w_rm)):
            w_em = w_rm = one_hot(router_rows(w_em, groups), n)  # it may keep more of one group than of another
        elif self.router == "rows":
            w_rm = one_hot(router_rows(w_em, groups), n)
        elif any(row * groups // n != i * groups // self.keep for i, row in enumerate(one_hot_rows(w_rm) or ())):
            w_rm = one_hot(router_rows(w_rm, groups), n)
        plain = LayerPlan(self.shape.experts, self.k, w_em=w_em, w_rm=w_rm, router=self.router, negative=self.negative)
        if plain.kept is not None and plain.router_rows == plain.kept:
            return LayerPlan(self.shape.experts, self.k, kept=tuple(sorted(plain.kept)))
        return plain

    def encode(self, plan: Plan) -> Vector:
        """The numbers of a plan, the inverse of `decode` (up to the order of kept experts).

        Raises:
            SpaceError: when the plan is not one of this space: another shape, r, k or routing, layers of one group
                that differ, or matrices the space cannot express.
        """
        shape = self.shape
        if len(plan.layers) != shape.layers:
            raise SpaceError(f"the plan has {len(plan.layers)} layers, the space {shape.layers}")
        stacked = []
        for first, last in self.groups:
            layer = plan.layers[first]
            if any(other != layer for other in plan.layers[first : last + 1]):
                raise SpaceError(f"layers {first}-{last} share one choice in this space, but differ in the plan")
            sizes, wanted = (layer.experts, layer.kept_experts, layer.k), (shape.experts, self.keep, self.k)
            if sizes != wanted:
                raise SpaceError(f"layer {first} of the plan has (n, r, k) = {sizes}, the space {wanted}")
            if layer.skip:
                raise SpaceError(f"layer {first} of the plan skips experts (skip={layer.skip:g}), this space does not")
            if layer.beyond_matrices is not None:
                raise SpaceError(f"layer {first} of the plan has {layer.beyond_matrices}, which no space searches")
            if layer.router_rows is None and layer.router != self.router:
                raise SpaceError(f"the plan maps {layer.router!r}, the space {self.router!r}")
            if layer.router_rows is None and layer.router == "prob" and layer.negative != self.negative:
                raise SpaceError(
                    f"the plan treats negative mapped probabilities by {layer.negative!r}, the space by "
                    f"{self.negative!r}; build the space with negative={layer.negative!r}"
                )
            stacked.append(np.stack([layer.expert_matrix, layer.router_matrix]))
        # A space may only come near these matrices, without an error: what it makes of them is held against the plan.
        x = self.snap(self.from_matrices(np.stack(stacked)))
        if self.decode(x).fingerprint != self.decode_matrices(np.stack(stacked)).fingerprint:
            raise SpaceError(f"the plan lies outside what {type(self).__name__} can express: {self._limits()}")
        return x

    def decode_matrices(self, matrices: Matrix) -> Plan:
        """The plan of given group matrices, (groups, 2, r, n), whether or not the space can reach them."""
        layers: list[LayerPlan] = []
        for (first, last), (w_em, w_rm) in zip(self.groups, matrices):
            layers += [self._layer(w_em, w_rm)] * (last - first + 1)
        return Plan(tuple(layers))

    def _limits(self) -> str:
        equal = ", as many of each group that routers choose first" if self.shape.router_groups > 1 else ""
        if self.phases == ("prune",):
            return f"one-hot rows with the router following{equal}"
        follow = ", router rows of the experts that weigh most" if self.router == "rows" else ""
        return f"entries within its bounds{follow}{equal}"

    def snap(self, x: ArrayLike) -> Vector:
        """The float32 vector that is stored for `x`: clipped to the bounds, integers rounded, -0 made 0.

        Raises:
            SpaceError: when `x` has the wrong size, or holds NaN or something else than numbers.
        """
        try:
            vector = np.array(x, dtype=np.float64).reshape(-1)
        except (TypeError, ValueError, OverflowError) as error:
            raise SpaceError(f"{type(self).__name__} has numbers, got {shown(x)}: {error}") from None
        if vector.size != self.size:
            raise SpaceError(f"{type(self).__name__} has {self.size} numbers, got {vector.size}")
        if np.isnan(vector).any():
            raise SpaceError(f"number {self.names[int(np.isnan(vector).argmax())]!r} is NaN")
        vector = np.clip(vector, self.low, self.high)
        return np.where(self.whole, np.rint(vector), vector).astype(np.float32) + np.float32(0)

    def check_range(self, numbers: Mapping[str, float]) -> None:
        """Raise SpaceError, naming number and range, unless all that are of this space, by name, lie in their bounds.

        `snap` would clip them in silence, where they are a person's.
        """
        if not numbers:
            return
        for name, low, high in zip(self.names, self.low.tolist(), self.high.tolist()):
            if name in numbers and not low <= numbers[name] <= high:
                raise SpaceError(
                    f"{name} must be from {low:g} to {high:g}, and was enqueued as {shown(numbers[name], 40)}"
                )

    def values(self, x: Vector) -> list[float]:
        """A genotype as parameters of `distributions`: Python floats, and ints where a number is an integer."""
        if self.integer:
            return x.astype(int).tolist()  # type: ignore[no-any-return]
        values = x.tolist()
        for i in np.flatnonzero(self.whole):
            values[i] = int(values[i])
        return values  # type: ignore[no-any-return]

    def distributions(self) -> dict[str, BaseDistribution]:
        """The numbers as Optuna distributions, by name, in order."""
        from optuna.distributions import FloatDistribution, IntDistribution

        return {
            name: IntDistribution(int(a), int(b)) if whole else FloatDistribution(float(a), float(b))
            for name, a, b, whole in zip(self.names, self.low, self.high, self.whole)
        }

    def plan(self, trial: optuna.trial.BaseTrial) -> Plan:
        """The plan of a trial, live or finished, however its numbers are stored.

        A space of at most 48 numbers suggests them under their names, so that any Optuna sampler drives it and
        importances work. A larger one records a single parameter ``drift``, the mean distance from the start.

        Raises:
            SpaceError: when the space has more than 48 numbers and the study's sampler is a plain Optuna one.
        """
        return self.decode(self.vector(trial))

    def vector(self, trial: optuna.trial.BaseTrial) -> Vector:
        """The numbers of a trial, as `plan` decodes them."""
        x = genome.read(frozen_trial(trial))
        if x is not None and x.size != self.size:
            raise SpaceError(f"trial {trial.number} holds {x.size} numbers, this space has {self.size}")  # type: ignore[attr-defined]
        frozen = hasattr(trial, "state")
        if self.size <= NAMED_AT_MOST:
            if frozen and x is None:
                missing = [name for name in self.names if name not in trial.params]
                if missing:
                    raise SpaceError(f"the trial has no genotype of this space: parameter {missing[0]!r} is missing")
                return self.snap([trial.params[name] for name in self.names])
            if not frozen:
                suggested = [self._suggest(trial, name) for name in self.distributions().items()]
                if x is not None:
                    return x
                self.check_range(dict(zip(self.names, suggested)))
                return self.snap(suggested)
        if x is None:
            raise SpaceError(
                f"a space of {self.size} numbers needs a sampler that knows it: create the study with one of moeopt's "
                "samplers, or wrap an Optuna sampler as moeopt.samplers.ShadowSampler(space, sampler)"
            )
        if not frozen:
            trial.suggest_float("drift", 0.0, self.drift_limit)
        return x

    @staticmethod
    def _suggest(trial: optuna.trial.BaseTrial, item: tuple[str, BaseDistribution]) -> float:
        name, distribution = item
        suggest = trial.suggest_int if type(distribution).__name__ == "IntDistribution" else trial.suggest_float
        return suggest(name, distribution.low, distribution.high)  # type: ignore[attr-defined,no-any-return]

    @property
    def drift_limit(self) -> float:
        """The largest value of `drift`."""
        return float(np.ceil(np.abs(self.high - self.low).mean() * 1000) / 1000)

    def drift(self, x: Vector) -> float:
        """Mean absolute distance of a genotype from the start."""
        return float(np.abs(x - self.start()).mean())

    def _description(self, kind: str, **more: Any) -> dict[str, Any]:
        groups = [[first, last] for first, last in self.groups]
        given = {name: getattr(self, name) for name in ("keep", "k", "router", "negative")}
        return {"kind": kind, "shape": self.shape.describe(), "groups": groups, **given, **more}

    def _check_equal_groups(self) -> None:
        """Raise SpaceError unless as many experts of each group can be kept that routers choose first."""
        why = why_unequal(self.keep, self.shape.router_groups)
        if why is not None:
            raise SpaceError(why)

    def group_names(self) -> list[str]:
        """`L00-07`, `L08-15`, ...: the layers of each group."""
        return range_names(self.groups)


class EntrySpace(Space):
    """A space whose numbers are all entries of the matrices, (groups, 2, r, n) flattened; of W_EM alone where W_RM
    follows (``router="rows"``)."""

    def matrices(self, x: Vector) -> Matrix:
        n = self.shape.experts
        entries = x.reshape(len(self.groups), -1, self.keep, n)
        if self.router != "rows":
            return entries
        return np.stack([[w_em, one_hot(router_rows(w_em, self.shape.router_groups), n)] for (w_em,) in entries])

    def from_matrices(self, matrices: Matrix) -> Vector:
        entries = matrices[:, :1] if self.router == "rows" else matrices
        return np.asarray(entries, dtype=np.float32).reshape(-1)

    def entry_names(self) -> tuple[str, ...]:
        """`W_EM.L00-07.0.E3` and so on: one name per entry."""
        return tuple(
            f"{matrix}.{group}.{i}.E{e}"
            for group in self.group_names()
            for matrix in (("W_EM",) if self.router == "rows" else ("W_EM", "W_RM"))
            for i in range(self.keep)
            for e in range(self.shape.experts)
        )


def range_names(ranges: Sequence[tuple[int, int]]) -> list[str]:
    """The names of layer ranges that cover all layers.

    >>> range_names([(0, 7), (8, 8), (9, 31)])
    ['L00-07', 'L08', 'L09-31']
    """
    width = len(str(ranges[-1][1]))
    return [f"L{a:0{width}}" if a == b else f"L{a:0{width}}-{b:0{width}}" for a, b in ranges]


def layer_groups(groups: Groups, layers: int) -> tuple[tuple[int, int], ...]:
    """Inclusive layer ranges from a number of groups or explicit ranges.

    >>> layer_groups(3, 8)
    ((0, 1), (2, 3), (4, 7))
    """
    if isinstance(groups, (int, np.integer)) and not isinstance(groups, bool):
        if not 1 <= groups <= layers:
            raise SpaceError(f"groups must be between 1 and the model's {layers} MoE layers, got {groups}")
        size = layers // int(groups)
        firsts = [g * size for g in range(int(groups))]
        return tuple(zip(firsts, [first - 1 for first in firsts[1:]] + [layers - 1]))
    try:
        ranges = tuple((int(first), int(last)) for first, last in cast(Iterable[tuple[int, int]], groups))
    except (TypeError, ValueError):
        raise SpaceError(f"groups must be an integer or (first, last) layer ranges, got {groups!r}") from None
    expected = 0
    for first, last in ranges:
        if last < first:
            raise SpaceError(f"layer range {first}-{last} ends before it begins")
        if first != expected:
            wrong = "overlaps the one before" if first < expected else f"leaves out layer {expected}"
            raise SpaceError(
                f"layer range {first}-{last} {wrong}; ranges must cover layers 0-{layers - 1} once, in order"
            )
        expected = last + 1
    if expected != layers:
        wrong = f"leave out layers from {expected}" if expected < layers else f"go beyond layer {layers - 1}"
        raise SpaceError(f"layer ranges {list(ranges)} {wrong}; they must cover layers 0-{layers - 1} once, in order")
    return ranges


def one_hot_pair(rows: NDArray[np.integer[Any]], n: int) -> Matrix:
    """(groups, 2, r, n) from expert indices (groups, r): W_EM one-hot, and W_RM the same."""
    return np.stack([np.stack([one_hot(kept, n)] * 2) for kept in rows]).astype(np.float32)


def random_rows(rng: np.random.Generator, groups: int, r: int, n: int, router_groups: int = 1) -> NDArray[np.int64]:
    """r distinct experts out of n for each group, as many of each router group, sorted: int64 (groups, r)."""
    drawn = np.argsort(rng.random((groups * router_groups, n // router_groups)), axis=1)[:, : r // router_groups]
    return experts_of(np.sort(drawn, axis=1), n, router_groups)


def first_rows(groups: int, r: int, shape: ModelShape) -> NDArray[np.int64]:
    """The first experts of each router group, as many of each, for every group: int64 (groups, r)."""
    within = np.arange(r // shape.router_groups)
    return experts_of(np.tile(within, (groups * shape.router_groups, 1)), shape.experts, shape.router_groups)


def experts_of(within: NDArray[np.integer[Any]], n: int, router_groups: int) -> NDArray[np.int64]:
    """Numbers of experts within their router groups, (groups * router_groups, r / router_groups), as numbers among all
    n: int64 (groups, r)."""
    first = np.arange(len(within))[:, None] % router_groups * (n // router_groups)
    return (within + first).reshape(len(within) // router_groups, -1).astype(np.int64)


def router_rows(w_em: Matrix, router_groups: int = 1) -> list[int]:
    """The router row that each new expert of W_EM, (r, n), gets where W_RM is no choice of its own.

    They are distinct, each of the router group that the new expert is in, and have the largest sum of absolute weights
    |w_em[i, row i]|: each new expert has that of the expert which weighs most in it, but where two would have one row.
    """
    r, n = len(w_em) // router_groups, w_em.shape[1] // router_groups
    blocks = (np.abs(w_em[g * r : (g + 1) * r, g * n : (g + 1) * n]) for g in range(router_groups))
    return [g * n + int(j) for g, block in enumerate(blocks) for j in linear_sum_assignment(-block)[1]]


def kept_rows(matrices: Matrix) -> NDArray[np.int64]:
    """Expert indices (groups, r) of one-hot pairs; SpaceError when a group is no plain pruning."""
    w_em, w_rm = matrices[:, 0], matrices[:, 1]
    rows: NDArray[np.int64] = w_em.argmax(axis=2).astype(np.int64)
    plain = np.array_equal(one_hot_pair(rows, matrices.shape[3]), np.stack([w_em, w_rm], axis=1))
    if not plain or any(len(set(kept)) < len(kept) for kept in rows.tolist()):
        raise SpaceError("a pruning space holds only distinct one-hot rows with the router following; this plan merges")
    return rows


def _checked_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise SpaceError(f"{name} must be an integer, got {value!r}")
    return int(value)
