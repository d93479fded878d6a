"""Search spaces: a flat vector of numbers on one side, a `Plan` on the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import SpaceError
from moeopt.plan import LayerPlan, Matrix, ModelShape, Negative, Plan, one_hot, why_unequal
from moeopt.plan.matrices import one_hot_rows
from moeopt.showing import shown
from moeopt.spaces.keep_range import KeepRange, keep_range
from moeopt.spaces.rows import Groups, kept_rows, layer_groups, range_names, router_rows, with_spare_rows
from moeopt.study.storage.attributes import frozen_trial
from moeopt.trials import genome
from moeopt.trials.genome import Vector

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

MapAt = Literal["prob", "logit", "rows"]
Phase = Literal["prune", "merge", "active"]

NAMED_AT_MOST = 48
"""Spaces of at most so many numbers appear as ordinary named Optuna parameters as well."""


class Space(ABC):
    """What may vary: the numbers a sampler chooses, and the plans they stand for.

    All layers of a group share one pair of matrices. Vectors are float32 of shape ``(size,)``; matrices of all groups
    are float32 of shape ``(groups, 2, r, n)``, `[:, 0]` being W_EM and `[:, 1]` W_RM. The numbers of the matrices come
    first, group by group; `extras`, the numbers beyond them, are how many experts each group keeps, where `keep` is a
    range, and what an `ActiveSpace` has.

    Where `keep` is a range, matrices have `high` rows; in force are the first `counts` of them (of each of the groups
    that routers choose first, its share of these). The others are spare: an expert that comes back is as it was.

    Args:
        shape: layers, experts and k of the model (`of` reads it off a model).
        keep: r, experts kept per layer, k <= r <= n; or (low, high): every group of layers keeps a number of its own
            between these, which is searched, too.
        total: with such a range, the most experts that all layers together keep.
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
        keep: int | tuple[int, int],
        total: int | None = None,
        groups: Groups | None = None,
        k: int | None = None,
        router: MapAt | None = None,
        negative: Negative = "clamp",
    ) -> None:
        self.shape = shape
        self.groups = layer_groups(shape.layers if groups is None else groups, shape.layers)
        self.keep_range: KeepRange | None = keep_range(keep, total, self.groups, shape)
        """How many experts groups keep, where that is searched."""
        self.keep = _checked_int("keep", keep) if self.keep_range is None else self.keep_range.high
        self.fixed_counts = np.full(len(self.groups), self.keep, dtype=np.int64)
        """How many experts each group keeps where that is not searched."""
        least = self.keep if self.keep_range is None else self.keep_range.low
        self.k = shape.k if k is None else _checked_int("k", k)
        self.router: MapAt = shape.router if router is None else router
        self.negative: Negative = negative
        if self.k < 1:
            raise SpaceError(f"k must be at least 1, got {self.k}")
        if self.keep > shape.experts:
            raise SpaceError(f"keep={self.keep} asks for more experts than the {shape.experts} each layer has")
        if least < self.k:
            raise SpaceError(f"keep={least} is fewer than the k={self.k} experts each token activates")
        if self.router not in get_args(MapAt):
            raise SpaceError(f"router must be 'prob', 'logit' or 'rows', got {router!r}")
        if negative not in ("clamp", "eep"):
            raise SpaceError(f"negative must be 'clamp' or 'eep', got {negative!r}")

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
        """The numbers that stand for these matrices, as near as this space has them; with the start's extras."""

    def _set_numbers(self, names: Sequence[str], low: ArrayLike, high: ArrayLike, step: ArrayLike) -> None:
        """Set the numbers of the matrices, and behind them those of the counts, where these vary.

        Args:
            names: of the matrices' numbers.
            low, high, step: of each, or of all.
        """
        ends = [np.broadcast_to(np.asarray(each, np.float32), len(names)).copy() for each in (low, high, step)]
        self.names, self._whole = tuple(names), np.full(len(names), self.integer)
        if (keep := self.keep_range) is not None:
            self.extra_groups, count = self.groups, len(self.groups)
            self.names += tuple(f"keep.{name}" for name in self.group_names())
            self._whole = np.append(self._whole, np.full(count, True))
            more = (keep.low, keep.high, max(keep.unit, (keep.high - keep.low) / 4))
            ends = [np.append(each, np.full(count, end, np.float32)) for each, end in zip(ends, more)]
        self.low, self.high, self.step = ends
        self.integer = bool(self._whole.all()) and bool(self.names)

    @property
    def extras(self) -> slice:
        """The numbers beyond those of the matrices; an empty slice where there are none."""
        return slice(self.size - (len(self.groups) if self.keep_range else 0), self.size)

    @property
    def whole(self) -> NDArray[np.bool_]:
        """Which numbers are integers, (size,)."""
        return self._whole

    def counts(self, x: Vector) -> NDArray[np.int64]:
        """How many experts each group keeps, int64 (groups,)."""
        if self.keep_range is None:
            return self.fixed_counts
        first = self.extras.start
        return self.keep_range.cap(x[first : first + len(self.groups)])

    def with_counts(self, x: Vector, counts: ArrayLike) -> Vector:
        """`x` with these numbers of experts, (groups,), in place of its own."""
        child, first = x.copy(), self.extras.start
        child[first : first + len(self.groups)] = counts
        return child

    def with_matrices(self, x: Vector, matrices: Matrix) -> Vector:
        """`x` with these matrices, (groups, 2, r, n), in place of its own; its extras stay."""
        return np.concatenate([self.from_matrices(matrices)[: self.extras.start], x[self.extras]])

    def in_force(self, count: int) -> NDArray[np.int64]:
        """Which of the rows of a group that keeps so many experts are not spare, int64 (count,)."""
        blocks = self.shape.router_groups
        share = np.arange(count // blocks)
        return (np.arange(blocks)[:, None] * (self.keep // blocks) + share).reshape(-1)

    def matrices_in_force(self, x: Vector) -> Matrix:
        """`matrices`, the spare rows 0."""
        matrices = self.matrices(x)
        if self.keep_range is not None or (self.fixed_counts < self.keep).any():
            matrices = matrices.copy()
            for pair, count in zip(matrices, self.counts(x).tolist()):
                pair[:, np.setdiff1d(np.arange(self.keep), self.in_force(count))] = 0
        return matrices

    def with_kept(self, x: Vector, kept: NDArray[np.bool_], groups: Iterable[int]) -> Vector:
        """`x` with these experts kept, bool (groups, n), in these of its groups, the router following."""
        matrices, counts, n = self.matrices(x).copy(), self.counts(x).copy(), self.shape.experts
        for group in groups:
            rows = one_hot(np.flatnonzero(kept[group]).tolist(), n)
            matrices[group] = with_spare_rows(rows, rows, self.keep, self.shape.router_groups)
            counts[group] = len(rows)
        child = self.with_matrices(x, matrices)
        return child if self.keep_range is None else self.with_counts(child, counts)

    def kept(self, x: Vector) -> NDArray[np.bool_]:
        """Which experts each group keeps, bool (groups, n).

        Raises:
            SpaceError: when a group does not keep experts as they are.
        """
        matrices, n = self.matrices(x), self.shape.experts
        rows = [kept_rows(pair[None, :, self.in_force(count)])[0] for pair, count in zip(matrices, self.counts(x))]
        return np.stack([np.isin(np.arange(n), kept) for kept in rows])

    @abstractmethod
    def start(self) -> Vector:
        """Where a search begins when nothing is known."""

    def extremes(self) -> list[Plan]:
        """Its start, and, as far as it has them, a plan that merges in every layer, and one with all extras largest.

        A model that takes these takes every plan of the space, as far as can be told without running them.
        """
        start, matrices = self.start(), slice(0, self.extras.start)
        fewest = None if self.keep_range is None else self.with_counts(start, self.keep_range.low)
        merging, active = start.copy(), start.copy()
        merging[matrices] += self.step[matrices] / 4
        active[self.extras] = self.high[self.extras]
        return [
            self.decode(start),
            *([] if fewest is None else [self.decode(fewest)]),
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
        snapped = self.snap(x)
        return self.decode_matrices(self.matrices(snapped), self.counts(snapped))

    def _layer(self, w_em: Matrix, w_rm: Matrix) -> LayerPlan:
        n, groups = self.shape.experts, self.shape.router_groups
        if groups > 1 and one_hot_rows(w_em) is not None and (self.router == "rows" or np.array_equal(w_em, w_rm)):
            w_em = w_rm = one_hot(router_rows(w_em, groups), n)  # it may keep more of one group than of another
        elif self.router == "rows":
            w_rm = one_hot(router_rows(w_em, groups), n)
        elif any(row * groups // n != i * groups // len(w_rm) for i, row in enumerate(one_hot_rows(w_rm) or ())):
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
        for (first, last), count in zip(self.groups, self.fixed_counts.tolist()):
            layer = plan.layers[first]
            if any(other != layer for other in plan.layers[first : last + 1]):
                raise SpaceError(f"layers {first}-{last} share one choice in this space, but differ in the plan")
            r = layer.kept_experts
            fits = r == count if self.keep_range is None else r in self.keep_range
            if (layer.experts, layer.k) != (shape.experts, self.k) or not fits:
                wanted = (shape.experts, count if self.keep_range is None else str(self.keep_range), self.k)
                raise SpaceError(
                    f"layer {first} of the plan has (n, r, k) = {(layer.experts, r, layer.k)}, the space {wanted}"
                )
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
            stacked.append(with_spare_rows(layer.expert_matrix, layer.router_matrix, self.keep, shape.router_groups))
        counts = np.array([plan.layers[first].kept_experts for first, _ in self.groups])
        # A space may only come near these matrices, without an error: what it makes of them is held against the plan.
        x = self.snap(self.from_matrices(np.stack(stacked)))
        x = x if self.keep_range is None else self.with_counts(x, counts)
        if self.decode(x).fingerprint != self.decode_matrices(np.stack(stacked), counts).fingerprint:
            raise SpaceError(f"the plan lies outside what {type(self).__name__} can express: {self._limits()}")
        return x

    def decode_matrices(self, matrices: Matrix, counts: NDArray[np.int64] | None = None) -> Plan:
        """The plan of given group matrices, (groups, 2, r, n), whether or not the space can reach them.

        Args:
            matrices: of the groups.
            counts: how many rows of each are in force, (groups,); None: all.
        """
        layers: list[LayerPlan] = []
        for g, ((first, last), pair) in enumerate(zip(self.groups, matrices)):
            w_em, w_rm = pair if counts is None else pair[:, self.in_force(int(counts[g]))]
            layers += [self._layer(w_em, w_rm)] * (last - first + 1)
        return Plan(tuple(layers))

    def _limits(self) -> str:
        equal = ", as many of each group that routers choose first" if self.shape.router_groups > 1 else ""
        if (keep := self.keep_range) is not None and keep.total is not None:
            equal += f", {keep.total} experts at most"
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
        if self.keep_range is not None:
            given["range"] = {"low": self.keep_range.low, "total": self.keep_range.total}
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
        entries = x[: self.extras.start].reshape(len(self.groups), -1, self.keep, n)
        if self.router != "rows":
            return entries
        return np.stack([[w_em, one_hot(router_rows(w_em, self.shape.router_groups), n)] for (w_em,) in entries])

    def from_matrices(self, matrices: Matrix) -> Vector:
        entries = matrices[:, :1] if self.router == "rows" else matrices
        counts = () if self.keep_range is None else self.keep_range.start
        return np.append(np.asarray(entries, dtype=np.float32).reshape(-1), np.asarray(counts, dtype=np.float32))

    def entry_names(self) -> tuple[str, ...]:
        """`W_EM.L00-07.0.E3` and so on: one name per entry."""
        return tuple(
            f"{matrix}.{group}.{i}.E{e}"
            for group in self.group_names()
            for matrix in (("W_EM",) if self.router == "rows" else ("W_EM", "W_RM"))
            for i in range(self.keep)
            for e in range(self.shape.experts)
        )


def _checked_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise SpaceError(f"{name} must be an integer, got {value!r}")
    return int(value)
