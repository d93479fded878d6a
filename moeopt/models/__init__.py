"""Models: find MoE layers, apply a plan reversibly, load checkpoints. The only room that knows transformers."""

from moeopt.models.identity import describe, fingerprint
from moeopt.models.layers import MoELayer, materialised, moe_layers, shape_of
from moeopt.models.layerwise import Layerwise, layerwise
from moeopt.models.loading import check_checkpoint, load, load_tokenizer
from moeopt.models.merging import MergedCache, merge
from moeopt.models.patching import (
    Patched,
    Storage,
    experts_run_by,
    patched,
    plan_in_force,
    routing_rules,
    without_plan,
)
from moeopt.models.routing import RoutingRule

__all__ = [
    "Layerwise",
    "MergedCache",
    "MoELayer",
    "Patched",
    "RoutingRule",
    "Storage",
    "check_checkpoint",
    "describe",
    "experts_run_by",
    "fingerprint",
    "layerwise",
    "load",
    "load_tokenizer",
    "materialised",
    "merge",
    "moe_layers",
    "patched",
    "plan_in_force",
    "routing_rules",
    "shape_of",
    "without_plan",
]
