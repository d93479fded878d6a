"""The plan of one MoE layer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Literal, cast, get_args

import numpy as np

from moeopt.errors import PlanError
from moeopt.plan.checks import MOST_EXPERTS, integer
from moeopt.plan.down import DownProjections
from moeopt.plan.matrices import (
    Matrix,
    Orders,
    checked_matrix,
    checked_novices,
    checked_orders,
    frozen,
    one_hot,
    one_hot_rows,
)
from moeopt.showing import Shown

Router = Literal["rows", "prob", "logit", "alias", "whole"]
"""Where a plan's router acts, see `LayerPlan`."""
AMONG_ALL: tuple[Router, ...] = ("alias", "whole")
"""Where the router itself stays as it is, and picks among all n experts."""
Negative = Literal["clamp", "eep"]
"""What becomes of mapped probabilities below 0, see `LayerPlan`."""
Merge = Literal["linear", "ties", "slerp", "karcher"]
"""How the experts of a row of W_EM become a single one, see `LayerPlan`."""


@dataclass(frozen=True, eq=False)
class LayerPlan(Shown):
    """What one MoE layer becomes.

    Exactly one of `kept` and `w_em` is given; a `w_em` whose rows are distinct unit vectors is stored as `kept`.

    Args:
        experts: n, the layer's number of experts in the full model.
        k: experts activated per token in the planned layer, 1 <= k <= r (1 <= k <= n where the router picks among all
            n: ``router="alias"`` and ``"whole"``).
        kept: indices of the r experts kept, distinct, in the order of the new experts (a pruning).
        w_em: (r, n) float32, the expert merging matrix.
        w_rm: (r, n) float32, the router mapping. None means the one-hot rows of `kept`.
        router: where `w_rm` acts. ``"rows"``: it is one-hot and selects rows of the router's weight, so that the
            softmax runs over the r selected logits (a stock checkpoint expresses it). ``"prob"``: on the probabilities,
            after softmax and before top-k, as in the EEP paper. ``"logit"``: on the router's weight, before softmax.
            Where the router corrects its choice by a bias b, that is then corrected by w_rm @ b; of ``"prob"``, weights
            are made of w_rm @ p alone (`moeopt.models.RoutingRule`).
            ``"alias"``: after top-k; the router picks k of the n experts as ever, and new expert i, where w_rm[i, j] is
            1, answers for expert j (HC-SMoE, arXiv 2410.08589). Every column then has one 1.
            ``"whole"``: nowhere; the router picks k of the n experts as ever, and what it picks of those that are not
            kept gives its row of `novices`.
        negative: what happens to negative entries of ``w_rm @ p`` under ``router="prob"``. ``"clamp"`` sets them to 0
            (a token whose whole top-k is 0 gets a zero MoE output); ``"eep"`` keeps them, as EEP's code does.
        skip: beta of dynamic skipping, between 0 (no skipping) and 1: of the k experts of a token those whose weight is
            less than beta times the largest are left out, and the weights of the others renormalised.
        down: down projections of the r experts in place of those that `kept` or `w_em` gives, as `moeopt.refit` fits
            them.
        neurons: (n, inner) int32, an order of each expert's neurons, in which `w_em` mixes them: place a of new expert
            i mixes neuron ``neurons[j, a]`` of every expert j. None: as they are.
        merge: how the experts of a row of `w_em` are mixed: ``"linear"``, their weighted sum, or another mean of
            `moeopt.models.mixing`, for which weights are 0 or above and count by their share of the row's sum.
        novices: (n - r, hidden) float32, the outputs of the experts that are not kept, in order of their number, the
            same for all tokens (MoNE, Mixture of Novices and Experts). Only of a pruning (`kept`) with
            ``router="whole"``. Where all experts are kept they have no rows, and the layer is stored as without.

    Raises:
        PlanError: naming the value that does not fit and the shape or range that would.
    """

    experts: int
    k: int
    kept: tuple[int, ...] | None = None
    w_em: Matrix | None = None
    w_rm: Matrix | None = None
    router: Router = "rows"
    negative: Negative = "clamp"
    skip: float = 0.0
    down: DownProjections | None = None
    neurons: Orders | None = None
    merge: Merge = "linear"
    novices: Matrix | None = None

    def __post_init__(self) -> None:
        n = integer("experts", self.experts, low=1, high=MOST_EXPERTS)
        if (self.kept is None) == (self.w_em is None):
            raise PlanError("a layer plan needs exactly one of kept (expert indices) and w_em (an (r, n) matrix)")
        for name, choices in (("router", Router), ("negative", Negative), ("merge", Merge)):
            if getattr(self, name) not in get_args(choices):
                raise PlanError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if isinstance(self.skip, bool) or not isinstance(self.skip, Real) or not 0 <= self.skip <= 1:
            raise PlanError(f"skip must be a number between 0 and 1, got {self.skip!r}")
        if self.w_em is not None:
            w_em = checked_matrix("w_em", self.w_em, n)
            rows = one_hot_rows(w_em)
            if rows is not None and len(set(rows)) == len(rows):
                self._set("w_em", None)
                self._set("kept", rows)
            else:
                self._set("w_em", w_em)
        if self.kept is not None:
            kept = tuple(integer("an entry of kept", e, low=0, high=n - 1) for e in self.kept)
            if not kept or len(set(kept)) != len(kept):
                raise PlanError(f"kept must name at least one expert, and each only once, got {list(kept)}")
            self._set("kept", kept)
        self._check_mixing(n)
        r = self.kept_experts
        self._check_novices()
        if self.w_rm is not None:
            w_rm = checked_matrix("w_rm", self.w_rm, n, rows=r)
            if self.router == "rows" and one_hot_rows(w_rm) is None:
                raise PlanError('router="rows" needs a one-hot w_rm; a dense one needs router="prob" or "logit"')
            if self.router == "alias" and one_hot_rows(w_rm.T) is None:
                raise PlanError(
                    'router="alias" needs a w_rm whose columns have one 1 each: who answers for that expert'
                )
            redundant = self.router == "rows" and one_hot_rows(w_rm) == self.kept
            self._set("w_rm", None if redundant else w_rm)
        elif self.kept is None:
            raise PlanError(
                "a merged layer needs w_rm, the (r, n) router mapping: with merged experts it is not implied"
            )
        elif self.router == "alias":
            raise PlanError('router="alias" needs w_rm: which of the experts kept answers for each of the others')
        elif self.router not in ("rows", "whole"):
            self._set("w_rm", frozen(one_hot(self.kept, n)))
        if self.picks_among_all:
            integer("k", self.k, low=1, high=n, what=f"k must be between 1 and the {n} experts that the router ranks")
        else:
            integer("k", self.k, low=1, high=r, what=f"k must be between 1 and the {r} experts kept")
        # of a single expert nothing can be skipped
        self._set("skip", float(np.float32(self.skip)) if self.k > 1 else 0.0)
        if self.down is not None and self.down.shape[0] != r:
            raise PlanError(f"down must hold the projections of the {r} experts kept, got {self.down.shape[0]}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for everyone else

    def _check_mixing(self, n: int) -> None:
        """Orders of experts that nothing is made of are of no account, nor is how experts are mixed that are not."""
        if self.neurons is not None:
            orders = checked_orders("neurons", self.neurons, n)
            as_they_are = np.arange(orders.shape[1], dtype=np.int32)
            if self.w_em is not None:
                orders = np.where((self.w_em != 0).any(0)[:, None], orders, as_they_are)
            plain = self.w_em is None or bool((orders == as_they_are).all())
            self._set("neurons", None if plain else frozen(orders))
        if self.w_em is None:
            self._set("merge", "linear")
        elif self.merge != "linear" and ((self.w_em < 0).any() or not self.w_em.any(1).all()):
            raise PlanError(f"merge={self.merge!r} needs rows of w_em without a negative weight and not all 0")

    def _check_novices(self) -> None:
        """Novices come with a router that stays whole, and it with them; those of no expert are none."""
        if self.novices is None and self.router != "whole":
            return
        if self.novices is None:
            raise PlanError('router="whole" needs novices: what its picks of experts that are not kept give')
        if self.router != "whole":
            raise PlanError(f'novices need router="whole", which picks among all {self.experts} experts')
        if self.kept is None:
            raise PlanError('router="whole" needs kept: novices stand in for experts of a pruning, not of a merging')
        if self.w_rm is not None:
            raise PlanError('router="whole" takes no w_rm: all n rows of the router stay as they are')
        novices = checked_novices(self.novices, self.experts - self.kept_experts)
        self._set("novices", novices if len(novices) else None)
        if not len(novices):
            self._set("router", "rows")

    @property
    def kept_experts(self) -> int:
        """r, the number of experts the planned layer has."""
        return len(self.kept) if self.kept is not None else int(cast(Matrix, self.w_em).shape[0])

    @property
    def expert_matrix(self) -> Matrix:
        """W_EM as an (r, n) float32 matrix, whichever way it is stored."""
        return one_hot(self.kept, self.experts) if self.kept is not None else cast(Matrix, self.w_em)

    @property
    def router_matrix(self) -> Matrix:
        """W_RM as an (r, n) float32 matrix, whichever way it is stored; the rows of `kept` for ``router="whole"``."""
        return self.w_rm if self.w_rm is not None else self.expert_matrix

    @property
    def router_rows(self) -> tuple[int, ...] | None:
        """The router rows that `w_rm` selects before top-k when it is one-hot, else None."""
        if self.picks_among_all:
            return None
        return self.kept if self.w_rm is None else one_hot_rows(self.w_rm)

    @property
    def aliases(self) -> tuple[int, ...] | None:
        """For ``router="alias"``, the new expert that answers for each of the n experts; else None."""
        return one_hot_rows(cast(Matrix, self.w_rm).T) if self.router == "alias" else None

    @property
    def picks_among_all(self) -> bool:
        """Whether the router stays as it is, and picks among all n experts."""
        return self.router in AMONG_ALL

    @property
    def places(self) -> tuple[int, ...] | None:
        """Of a pruning, where each of the n experts is: i for ``kept[i]``, r + i for the others, row i of `novices`."""
        if self.kept is None:
            return None
        order = (*self.kept, *sorted(set(range(self.experts)) - set(self.kept)))
        return tuple(int(place) for place in np.argsort(order))

    @property
    def makes_experts(self) -> bool:
        """Whether the layer's experts are not among the full model's: merged, or with down projections of their own.

        They are then numbered 0 to r - 1.
        """
        return self.kept is None or self.down is not None

    @property
    def sums_experts(self) -> bool:
        """Whether every new expert is a weighted sum of the full model's as they are, tensor by tensor."""
        return self.neurons is None and self.merge == "linear"

    @property
    def beyond_matrices(self) -> str | None:
        """In words, the numbers of its own that W_EM and W_RM do not hold; None where there are none."""
        beyond = {
            "down projections of its own": self.down is not None,
            "novices": self.novices is not None,
            "an order of neurons": self.neurons is not None,
            f"experts merged by {self.merge}": self.merge != "linear",
        }
        return " and ".join(name for name, there in beyond.items() if there) or None

    @property
    def is_identity(self) -> bool:
        """Whether the layer keeps all n experts as they are, in order, router too, none skipped (k may differ)."""
        everything = tuple(range(self.experts))
        plain = self.skip == 0 and self.down is None
        return plain and self.kept == everything and self.router_rows == everything

    def _key(self, *, ordered: bool) -> bytes:
        matrix = np.concatenate([self.expert_matrix, self.router_matrix], axis=1) + np.float32(0.0)  # -0.0 becomes 0.0
        order = range(len(matrix)) if ordered else np.lexsort(matrix.T[::-1])  # rows by their first columns first
        matrix = matrix[order]
        head = f"{self.experts},{self.k},{self.router},{self.negative if self.router == 'prob' else ''}"
        head += f",{self.skip!r};" if self.skip else ";"
        weights = b"" if self.down is None else b"".join(self.down.digests[i] for i in order)
        mixing = b"" if self.merge == "linear" else f"merge={self.merge};".encode()
        matrices = np.ascontiguousarray(matrix, dtype="<f4").tobytes()
        return head.encode() + matrices + weights + mixing + self.neurons_digest + self._novices_digest

    @cached_property
    def neurons_digest(self) -> bytes:
        """32 bytes that tell its orders of neurons from others; none where there are none."""
        return b"" if self.neurons is None else hashlib.sha256(self.neurons.astype("<i4").tobytes()).digest()

    @cached_property
    def _novices_digest(self) -> bytes:
        if self.novices is None:
            return b""
        numbers = (self.novices + np.float32(0.0)).astype("<f4")  # -0.0 becomes 0.0
        return hashlib.sha256(f"{self.novices.shape};".encode() + numbers.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerPlan) and self._key(ordered=True) == other._key(ordered=True)

    def __hash__(self) -> int:
        return hash(self._key(ordered=True))
