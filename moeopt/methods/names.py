"""Names of the one-shot methods, to be checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from moeopt.errors import MethodError, nearest
from moeopt.plan import Merge, Router

ROUTERS: dict[str, Router] = {
    "random": "rows",
    "frequency": "rows",
    "soft_activation": "rows",
    "soft_activation_all": "rows",
    "ean": "rows",
    "ean_mean": "rows",
    "reap": "rows",
    "reap_progressive": "rows",
    "msan": "rows",
    "easy_ep": "rows",
    "aimer": "rows",
    "mone": "whole",
    "naee": "rows",
    "naee_progressive": "rows",
    "hc_smoe": "alias",
    "hc_smoe_summed": "prob",
    "m_smoe": "alias",
    "m_smoe_summed": "prob",
    "ream": "rows",
    "output_fit": "prob",
    "loss_aware": "rows",
    "loss_aware_rounds": "rows",
    "loss_aware_budgets": "rows",
}
"""For every method, where the W_RM of its plans acts."""
PROGRESSIVE = ("reap_progressive", "naee_progressive", "ream")
"""Methods that go layer by layer, so that layers cannot share a choice."""
MERGING = ("hc_smoe", "hc_smoe_summed", "m_smoe", "m_smoe_summed", "ream")
"""Methods whose plans merge experts."""
ALIGNING = ("ream",)
"""Those of them that put neurons in order in any case."""
BUDGETED = ("loss_aware_budgets",)
"""Methods whose plans keep of each layer a number of its own, so many in the mean as are asked for."""
ALIGNED = "aligned"
UNRANKED = (*MERGING, *PROGRESSIVE, "naee", "output_fit", "loss_aware_rounds", *BUDGETED)
"""Methods that do not say which expert is better than which, whatever number is kept: they choose whole sets."""


@dataclass(frozen=True)
class Name:
    """A method and how it merges, written ``method``, ``method:aligned``, ``method:ties`` or ``method:aligned+ties``.

    Args:
        method: of `ROUTERS`.
        aligned: whether neurons are put in order first, by their weights.
        merge: the mean that is taken, as `LayerPlan.merge`.
    """

    method: str
    aligned: bool = False
    merge: Merge = "linear"

    @property
    def router(self) -> Router:
        """Where the W_RM of its plans acts."""
        return ROUTERS[self.method]

    @property
    def sums_experts(self) -> bool:
        """Whether its plans are, as those of a search, of experts kept or summed as they are."""
        return not self.aligned and self.merge == "linear" and self.method not in ALIGNING

    @property
    def prunes(self) -> bool:
        """Whether its plans keep experts and their router's rows, and do nothing else."""
        return self.router == "rows" and self.method not in MERGING


def parsed(name: str) -> Name:
    """A method's name with its options.

    Raises:
        MethodError: when there is no such method, the nearest name being suggested, or no such option of it.
    """
    if not isinstance(name, str):
        raise MethodError(f"a method is a name, such as 'naee', got {name!r}")
    method, colon, text = name.partition(":")
    if method not in ROUTERS:
        raise MethodError(f"unknown method {name!r}{nearest(method, list(ROUTERS))} (there are {', '.join(ROUTERS)})")
    if not colon:
        return Name(method)
    if method not in MERGING:
        raise MethodError(f"{name!r}: only methods that merge take options, which are {', '.join(MERGING)}")
    options, merges = text.split("+"), [merge for merge in get_args(Merge) if merge != "linear"]
    means = [option for option in options if option in merges]
    # in one order, so that a method has one name
    if options != [ALIGNED] * (ALIGNED in options) + means or len(means) > 1:
        hint = nearest(text, [ALIGNED, *merges, *(f"{ALIGNED}+{merge}" for merge in merges)])
        raise MethodError(f"{name!r}: options are {ALIGNED}, one of {', '.join(merges)}, or as {ALIGNED}+ties{hint}")
    if ALIGNED in options and method in ALIGNING:
        raise MethodError(f"{name!r}: {method} aligns neurons in any case; leave out {ALIGNED!r}")
    return Name(method, ALIGNED in options, means[0] if means else "linear")  # type: ignore[arg-type]


def check(name: str) -> None:
    """Raise MethodError, as `parsed`, when there is no such method."""
    parsed(name)


def check_ranks(name: str) -> None:
    """Raise MethodError when there is no such method, or it ranks no experts (`moeopt.methods.ranking`)."""
    if parsed(name).method in UNRANKED:
        ranked = ", ".join(method for method in ROUTERS if method not in UNRANKED)
        raise MethodError(f"{name} chooses whole sets of experts, or merges them, and ranks none; {ranked} do")
