"""Names of the one-shot methods, to be checked before anything heavy is imported."""

from __future__ import annotations

from moeopt.errors import MethodError, nearest
from moeopt.plan import Router

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
    "output_fit": "prob",
    "loss_aware": "rows",
    "loss_aware_rounds": "rows",
}
"""For every method, where the W_RM of its plans acts; "rows" for prunings."""


PROGRESSIVE = ("reap_progressive", "naee_progressive")
"""Methods that go layer by layer, so that layers cannot share a choice."""


def check(name: str) -> None:
    """Raise MethodError, suggesting the nearest name, when there is no such method."""
    if name not in ROUTERS:
        raise MethodError(f"unknown method {name!r}{nearest(name, list(ROUTERS))} (there are {', '.join(ROUTERS)})")
