"""Models: find MoE layers, apply a plan reversibly, load checkpoints. The only room that knows transformers."""

from moeopt.models.identity import describe, fingerprint
from moeopt.models.layers import MoELayer, materialised, moe_layers, shape_of
from moeopt.models.loading import check_checkpoint, load
from moeopt.models.merging import MergedCache, merge
from moeopt.models.patching import Patched, patched, routing_rules
from moeopt.models.routing import RoutingRule

__all__ = [
    "MergedCache",
    "MoELayer",
    "Patched",
    "RoutingRule",
    "check_checkpoint",
    "describe",
    "fingerprint",
    "load",
    "materialised",
    "merge",
    "moe_layers",
    "patched",
    "routing_rules",
    "shape_of",
]
