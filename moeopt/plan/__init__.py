"""Plans: what a pruned and merged Mixture-of-Experts model *is*, layer by layer, apart from any model or optimiser.

A Mixtral layer has n experts E_1..E_n and a router g, and activates k of them per token:

    p = softmax(g(x)),   T = top-k(p),   y = sum over i in T of (p_i / sum_T p) E_i(x).

A `LayerPlan` keeps r <= n experts by two matrices (EEP, arXiv 2407.00945, section 3.2):

* ``w_em`` (r, n), expert merging: every weight tensor of new expert i is ``sum_j w_em[i, j] * (that tensor of E_j)``;
* ``w_rm`` (r, n), router mapping: ``p' = w_rm @ p``, before top-k and renormalisation.

Dynamic skipping (NAEE, arXiv 2402.14800, section 3.3) also leaves out, token by token, experts of little weight.

Arrays here are numpy float32; nothing in this room needs torch, except reading EEP's own `.pth` files.
It imports no other room.
"""

from moeopt.plan.down import DownProjections
from moeopt.plan.layer import AMONG_ALL, LayerPlan, Merge, Negative, Router
from moeopt.plan.matrices import Matrix, Orders, one_hot
from moeopt.plan.plan import Plan
from moeopt.plan.shape import ModelShape, why_unequal

__all__ = [
    "AMONG_ALL",
    "DownProjections",
    "LayerPlan",
    "Matrix",
    "Merge",
    "ModelShape",
    "Negative",
    "Orders",
    "Plan",
    "Router",
    "one_hot",
    "why_unequal",
]
