"""How many experts a token runs: k, and the beta of dynamic skipping, on top of another space or of one plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeopt.errors import SpaceError
from moeopt.plan import LayerPlan, Matrix, ModelShape, Plan
from moeopt.spaces.base import Phase, Space
from moeopt.spaces.rows import Groups, layer_groups, range_names
from moeopt.trials import genome
from moeopt.trials.genome import Vector


class ActiveSpace(Space):
    """The plans of another space, or one plan, with fewer or more experts active per token.

    The numbers are those of the inner space, then one k for each group of layers, an integer, then one beta for each
    group (see `LayerPlan.skip`); k or beta only where it is searched. A beta means nothing where k is 1. The search
    starts with the inner space's start and its k, as near as the range has it, and without skipping.

    A task loss alone asks for as many active experts as there may be: `Objective(active_weight=...)` says what one
    is worth.

    Args:
        inner: a `PruneSpace`, `EEPSpace` or `MergeSpace`; or a model's shape, for a space of k and beta alone.
        around: with a shape, the plan whose k and betas are searched; by default the full model.
        k: (low, high), both included, 1 <= low < high <= r; None leaves k as it is.
        skip: True for betas from 0 to 1, or (low, high); False leaves skipping as it is.
        groups: as for `Space`, whatever the groups of the inner space; 1 is one choice for the whole model. Where the
            inner space searches how many experts groups keep, theirs.

    Raises:
        SpaceError: naming the argument that does not fit.
    """

    def __init__(
        self,
        inner: Space | ModelShape,
        *,
        around: Plan | None = None,
        k: tuple[int, int] | None = None,
        skip: bool | tuple[float, float] = False,
        groups: Groups | None = None,
    ) -> None:
        shape = inner if isinstance(inner, ModelShape) else inner.shape
        varies = not isinstance(inner, ModelShape) and inner.keep_range is not None
        if varies and groups is None:
            groups = inner.groups  # type: ignore[union-attr]
        self.extra_groups = layer_groups(shape.layers if groups is None else groups, shape.layers)
        if varies and self.extra_groups != inner.groups:  # type: ignore[union-attr]
            raise SpaceError(
                "where keep is a range, k and skip are of the groups of layers that keep is: leave groups out"
            )
        if isinstance(inner, ModelShape):
            around = around or Plan.identity(shape.layers, shape.experts, shape.k)
            inner = _OnePlan(shape, around, self.extra_groups)
        elif isinstance(inner, ActiveSpace) or around is not None:
            what = "another ActiveSpace" if around is None else "both a space and a plan to be around"
            raise SpaceError(f"an active space is built on a pruning or merging space or on one plan, got {what}")
        searched = inner.keep_range
        super().__init__(
            shape, keep=inner.keep if searched is None else (searched.low, searched.high),
            total=None if searched is None else searched.total, groups=inner.groups, k=inner.k, router=inner.router,
            negative=inner.negative,
        )  # fmt: skip
        self.inner, self.phases, self.fixed_counts = inner, inner.phases, inner.fixed_counts
        self.k_range, self.skip_range = _k_range(k), _skip_range(skip)
        layers = inner.decode(
            inner.start() if searched is None else inner.with_counts(inner.start(), searched.low)
        ).layers
        most = min(_most_active(layer) for layer in layers)
        if self.k_range is None and self.skip_range is None:
            raise SpaceError("an active space searches k, a range such as (1, 2), or skip, or both; neither was given")
        if self.k_range is not None and self.k_range[1] > most:
            raise SpaceError(f"k={self.k_range} asks for {self.k_range[1]} active experts of the {most} that are kept")
        if self.k_range is None and max(layer.k for layer in layers) == 1:
            raise SpaceError("skip needs at least 2 active experts per token, the plans of this space have k=1")
        count = len(self.extra_groups)
        names, low, high, step, whole = [*inner.names], [*inner.low], [*inner.high], [*inner.step], [*inner.whole]
        for kind, ends, least in (("k", self.k_range, 0.5), ("skip", self.skip_range, 0.0)):
            if ends is not None:
                names += [f"{kind}.{name}" for name in range_names(self.extra_groups)]
                low, high = [*low, *[ends[0]] * count], [*high, *[ends[1]] * count]
                step += [max(least, (ends[1] - ends[0]) / 4)] * count
                whole += [kind == "k"] * count
        self.names, self._whole, self.integer = tuple(names), np.array(whole), all(whole)
        self.low, self.high, self.step = (np.array(ends, dtype=np.float32) for ends in (low, high, step))

    @property
    def extras(self) -> slice:
        return slice(self.inner.extras.start, self.size)

    @property
    def _active(self) -> slice:
        """The numbers that are not the inner space's."""
        return slice(self.inner.size, self.size)

    @property
    def whole(self) -> NDArray[np.bool_]:
        return self._whole

    def matrices(self, x: Vector) -> Matrix:
        """As the inner space's; those of one plan have no rows, (groups, 2, 0, n), as nothing of them varies."""
        return self.inner.matrices(x[: self.inner.size])

    def from_matrices(self, matrices: Matrix) -> Vector:
        return self.with_matrices(self.start(), matrices)

    def with_matrices(self, x: Vector, matrices: Matrix) -> Vector:
        return np.concatenate([self.inner.with_matrices(x[: self.inner.size], matrices), x[self._active]])

    def start(self) -> Vector:
        inner = self.inner.start()
        return self._joined(inner, *self._start_of(self.inner.decode(inner)))

    def sample(self, rng: np.random.Generator) -> Vector:
        """A random point of the inner space, with k and betas drawn uniformly."""
        inner, count = self.inner.sample(rng), len(self.extra_groups)
        low, high = self.k_range or (1, 1)
        k = rng.integers(low, high + 1, count) if self.k_range is not None else np.ones(count)
        return self._joined(inner, k, rng.uniform(*self.skip_range, count) if self.skip_range else np.zeros(count))

    def decode(self, x: ArrayLike) -> Plan:
        snapped = self.snap(x)
        layers = list(self.inner.decode(snapped[: self.inner.size]).layers)
        rest = iter(snapped[self._active].reshape(-1, len(self.extra_groups)).tolist())
        changes: list[dict[str, Any]] = [{} for _ in self.extra_groups]
        if self.k_range is not None:
            changes = [{"k": int(k)} for k in next(rest)]
        if self.skip_range is not None:
            changes = [{**change, "skip": beta} for change, beta in zip(changes, next(rest))]
        for (first, last), change in zip(self.extra_groups, changes):
            layers[first : last + 1] = [replace(layer, **change) for layer in layers[first : last + 1]]
        return Plan(tuple(layers))

    def encode(self, plan: Plan) -> Vector:
        if len(plan.layers) != self.shape.layers:
            raise SpaceError(f"the plan has {len(plan.layers)} layers, the space {self.shape.layers}")
        k, skip = self._start_of(plan)
        for g, (first, last) in enumerate(self.extra_groups):
            layers = plan.layers[first : last + 1]
            skipping = [layer.skip for layer in layers if layer.k > 1]
            for name, values, ends, chosen in (
                ("k", [layer.k for layer in layers], self.k_range, k),
                ("skip", skipping, self.skip_range, skip),
            ):
                if ends is None or not values:
                    continue
                if len(set(values)) > 1:
                    raise SpaceError(f"layers {first}-{last} share one {name} in this space, but differ in the plan")
                if not np.float32(ends[0]) <= np.float32(values[0]) <= np.float32(ends[1]):
                    raise SpaceError(
                        f"layer {first} of the plan has {name}={values[0]:g}, the space {ends[0]:g} to {ends[1]:g}"
                    )
                chosen[g] = values[0]
        x = self._joined(self.inner.encode(Plan(tuple(self._without(layer) for layer in plan.layers))), k, skip)
        if self.decode(x).fingerprint != plan.fingerprint:
            at = self.decode(x).first_difference(plan)
            raise SpaceError(f"layer {at} of the plan has another k or skip than the plan that this space is around")
        return x

    def decode_matrices(self, matrices: Matrix, counts: NDArray[np.int64] | None = None) -> Plan:
        return self.inner.decode_matrices(matrices, counts)

    def describe(self) -> dict[str, Any]:
        return self._description(
            "active",
            inner=self.inner.describe(),
            k_range=self.k_range and list(self.k_range),
            skip_range=self.skip_range and list(self.skip_range),
            active_groups=[[first, last] for first, last in self.extra_groups],
        )

    def _joined(self, inner: Vector, k: NDArray[Any], skip: NDArray[Any]) -> Vector:
        parts = [inner, *([k] if self.k_range is not None else []), *([skip] if self.skip_range is not None else [])]
        return self.snap(np.concatenate(parts))

    def _start_of(self, plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each group, the largest k of the plan's layers, and no skipping; `snap` puts both within their ranges."""
        k = [max(layer.k for layer in plan.layers[first : last + 1]) for first, last in self.extra_groups]
        return np.array(k, dtype=np.float64), np.zeros(len(k))

    def _without(self, layer: LayerPlan) -> LayerPlan:
        """The layer with the inner space's k and skipping where these are searched."""
        k = layer.k if self.k_range is None else min(self.inner.k, _most_active(layer))
        return replace(layer, k=k, skip=layer.skip if self.skip_range is None else 0.0)


class _OnePlan(Space):
    """A single plan, and no number: what an `ActiveSpace` without an inner space varies k and betas of."""

    phases: tuple[Phase, ...] = ("active",)
    names: tuple[str, ...] = ()
    low = high = step = np.zeros(0, dtype=np.float32)
    integer = True
    _whole = np.zeros(0, dtype=bool)

    def __init__(self, shape: ModelShape, plan: Plan, groups: Groups) -> None:
        if len(plan.layers) != shape.layers:
            raise SpaceError(f"the plan has {len(plan.layers)} layers, the model {shape.layers}")
        for i, layer in enumerate(plan.layers):
            if layer.experts != shape.experts:
                raise SpaceError(f"layer {i} of the plan is for {layer.experts} experts, the model has {shape.experts}")
            if (beyond := layer.beyond_matrices) is not None:
                then = "; search k and skipping first, then refit" if beyond.startswith("down") else ""
                raise SpaceError(f"layer {i} of the plan has {beyond}, which no study keeps{then}")
        keep = min(layer.kept_experts for layer in plan.layers)
        super().__init__(
            shape, keep=keep, groups=groups, k=min(keep, *(layer.k for layer in plan.layers)), router="prob"
        )
        self._plan = plan

    def matrices(self, x: Vector) -> Matrix:
        return np.zeros((len(self.groups), 2, 0, self.shape.experts), dtype=np.float32)

    def from_matrices(self, matrices: Matrix) -> Vector:
        return self.start()

    def start(self) -> Vector:
        return np.zeros(0, dtype=np.float32)

    def sample(self, rng: np.random.Generator) -> Vector:
        return self.start()

    def decode(self, x: ArrayLike) -> Plan:
        return self._plan

    def decode_matrices(self, matrices: Matrix, counts: NDArray[np.int64] | None = None) -> Plan:
        return self._plan

    def encode(self, plan: Plan) -> Vector:
        """No number; SpaceError unless the plan is this one, whatever its k and skip."""
        for i, (layer, ours) in enumerate(zip(plan.layers, self._plan.layers)):
            if replace(layer, k=1) != replace(ours, k=1):
                raise SpaceError(f"layer {i} of the plan is another than that of the plan this space is around")
        return self.start()

    def describe(self) -> dict[str, Any]:
        shape = self.shape
        identity = self._plan == Plan.identity(shape.layers, shape.experts, shape.k)
        return self._description("plan", plan=None if identity else _described(self._plan))


def plan_described(description: Mapping[str, Any] | None, shape: ModelShape) -> Plan | None:
    """The plan that `describe` of a space around a plan holds; None, for the full model, where it holds none.

    Raises:
        KeyError, TypeError, ValueError: when it is no such description.
    """
    if description is None:
        return None
    numbers = genome.unpack("matrices", description)
    if numbers is None:
        raise KeyError("matrices")
    layers, at = [], 0
    for record in description["layers"]:
        fields = dict(record)
        for name, rows in fields.pop("rows").items():
            size = rows if name == "kept" else rows * shape.experts
            part, at = numbers[at : at + size], at + size
            fields[name] = tuple(part.astype(int).tolist()) if name == "kept" else part.reshape(rows, shape.experts)
        layers.append(LayerPlan(shape.experts, **fields))
    return Plan(tuple(layers))


def _described(plan: Plan) -> dict[str, Any]:
    records, numbers = [], []
    for layer in plan.layers:
        parts = {name: getattr(layer, name) for name in ("kept", "w_em", "w_rm")}
        held = {name: np.asarray(part, dtype=np.float32) for name, part in parts.items() if part is not None}
        numbers += [part.reshape(-1) for part in held.values()]
        facts = {"k": layer.k, "router": layer.router, "negative": layer.negative, "skip": layer.skip}
        records.append({**facts, "rows": {name: len(part) for name, part in held.items()}})
    return {"layers": records, **genome.pack("matrices", np.concatenate(numbers))}


def _most_active(layer: LayerPlan) -> int:
    return layer.experts if layer.picks_among_all else layer.kept_experts


def _k_range(k: Any) -> tuple[int, int] | None:
    if k is None:
        return None
    low, high = _ends(k, (int, np.integer))
    if not 1 <= low < high:
        raise SpaceError(f"k must be a range (low, high) of integers with 1 <= low < high, such as (1, 2), got {k!r}")
    return int(low), int(high)


def _skip_range(skip: Any) -> tuple[float, float] | None:
    if isinstance(skip, bool):
        return (0.0, 1.0) if skip else None
    low, high = _ends(skip, (int, float))
    if not 0 <= low < high <= 1:
        raise SpaceError(f"skip must be True or a range (low, high) with 0 <= low < high <= 1, got {skip!r}")
    return float(low), float(high)


def _ends(given: Any, kinds: tuple[type, ...]) -> tuple[float, float]:
    """Both ends of a range; NaN, which lies in no order, where they are not two numbers of these kinds."""
    ends = tuple(given) if isinstance(given, (tuple, list)) else ()
    fine = len(ends) == 2 and all(isinstance(end, kinds) and not isinstance(end, bool) for end in ends)
    return (ends[0], ends[1]) if fine else (float("nan"), float("nan"))
