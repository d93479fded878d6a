"""The plan of a model: one of every MoE layer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, cast

from moeopt.errors import PlanError
from moeopt.plan import eep_files, saving
from moeopt.plan.checks import integer
from moeopt.plan.layer import LayerPlan, Negative, Router
from moeopt.showing import Shown


@dataclass(frozen=True)
class Plan(Shown):
    """One `LayerPlan` for every MoE layer of a model, first layer first.

    Plans compare equal and hash by their matrices. Two plans whose experts merely stand in another order are not equal,
    but share a `fingerprint`.
    """

    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise PlanError("a plan needs at least one layer")
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, LayerPlan):
                raise PlanError(f"layer {i} of a plan must be a LayerPlan, got {type(layer).__name__}")

    @classmethod
    def identity(cls, n_layers: int, experts: int, k: int) -> Plan:
        """The plan that keeps every expert of every layer."""
        layer = LayerPlan(experts=experts, k=k, kept=tuple(range(experts)))
        return cls((layer,) * integer("n_layers", n_layers, low=1))

    @classmethod
    def one_hot(
        cls,
        kept: Sequence[Iterable[int]],
        *,
        experts: int,
        k: int,
        router: Router = "rows",
        negative: Negative = "clamp",
    ) -> Plan:
        """A pruning: for each layer, the indices of the experts it keeps.

        >>> Plan.one_hot([[0, 2], [1, 3]], experts=4, k=2).layers[1].kept
        (1, 3)
        """
        return cls(tuple(LayerPlan(experts, k, kept=tuple(rows), router=router, negative=negative) for rows in kept))

    @property
    def fingerprint(self) -> str:
        """32 hex digits that name what the plan computes: equal for plans whose experts are merely reordered."""
        digest = hashlib.sha256()
        for layer in self.layers:
            digest.update(layer._key(ordered=False))
        return digest.hexdigest()[:32]

    def prefixes(self) -> list[bytes]:
        """Digests of the first 0, 1, ..., L layers: equal where two plans compute the same bits up to there."""
        digest = hashlib.sha256()
        prefixes = [digest.digest()]
        for layer in self.layers:
            digest.update(layer._key(ordered=True))
            prefixes.append(digest.digest())
        return prefixes

    @property
    def is_one_hot(self) -> bool:
        """Whether every layer is a plain pruning: kept experts as they are with their own router rows, none skipped."""
        plain = all(not x.skip and x.down is None for x in self.layers)
        return plain and all(x.kept is not None and x.router_rows == x.kept for x in self.layers)

    def first_difference(self, other: Plan) -> int | None:
        """Index of the first layer in which `other` differs, or None when the plans are equal.

        Raises:
            PlanError: when the plans have different numbers of layers.
        """
        if len(self.layers) != len(other.layers):
            raise PlanError(
                f"plans of {len(self.layers)} and {len(other.layers)} layers cannot be compared layer by layer"
            )
        return next((i for i, (a, b) in enumerate(zip(self.layers, other.layers)) if a != b), None)

    def save(self, path: str | os.PathLike[str], *, about: Mapping[str, Any] | None = None) -> None:
        """Write the plan as one safetensors file with JSON metadata; a file of that name is replaced whole.

        Args:
            path: of the file.
            about: JSON to keep beside the plan, such as how it came about.
        """
        saving.write(self.layers, path, about)

    @staticmethod
    def about(path: str | os.PathLike[str]) -> dict[str, Any]:
        """What a file says about its plan; empty where `save` was told nothing.

        Raises:
            PlanError: when the file cannot be read.
        """
        return saving.about(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by `save`.

        Raises:
            PlanError: when the file is missing, is not a plan, or is written by a newer moeopt.
        """
        layers = saving.read(path)
        try:
            return cls(layers)
        except PlanError as error:
            raise PlanError(f"{str(path)!r}: {error}") from None

    @classmethod
    def from_eep(cls, path: str | os.PathLike[str], n_layers: int, *, k: int | None = None) -> Plan:
        """Read a solution file released with EEP (arXiv 2407.00945), a `.pth` dictionary of (r, n) tensors.

        `layers.N` and `layers.[a-b]` (both ends included) hold W_EM, `transfer.N` and `transfer.[a-b]` hold W_RM;
        `others` and `others_transfer` serve the layers that no such key names. The mapping acts on probabilities and
        keeps negative weights exactly as EEP's code does.

        Args:
            path: the `.pth` file, read with `weights_only=True`.
            n_layers: MoE layers of the model the solution is for (32 for Mixtral 8x7B).
            k: experts activated per token; by default 2, or r where r is smaller.

        Raises:
            PlanError: when the file cannot be read, a key cannot be placed, or a layer has no matrix.
        """
        return cls(tuple(eep_files.read(path, integer("n_layers", n_layers, low=1), k)))

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices, novices and down projections of its own."""
        downs = [array for layer in self.layers if layer.down is not None for array in layer.down.arrays.values()]
        names = ("expert_matrix", "w_rm", "neurons", "novices")
        matrices = [getattr(layer, name) for layer in self.layers for name in names]
        return sum(array.nbytes for array in (*downs, *matrices) if array is not None)

    @property
    def is_refitted(self) -> bool:
        """Whether some layer has down projections of its own."""
        return any(layer.down is not None for layer in self.layers)

    def with_k(self, k: int) -> Plan:
        """The same plan with k experts activated per token in every layer."""
        return Plan(tuple(replace(layer, k=k) for layer in self.layers))

    def with_skip(self, skip: float | Sequence[float]) -> Plan:
        """The same plan with dynamic skipping: one beta for all layers, or one for each.

        Raises:
            PlanError: when there are not as many as layers, or one is out of [0, 1].
        """
        betas = [float(skip)] * len(self.layers) if isinstance(skip, Real) else list(cast(Sequence[float], skip))
        if len(betas) != len(self.layers):
            raise PlanError(
                f"skip must be one number or one for each of the {len(self.layers)} layers, got {len(betas)}"
            )
        return Plan(tuple(replace(layer, skip=float(beta)) for layer, beta in zip(self.layers, betas)))
