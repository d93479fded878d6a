"""Models: find MoE layers, learn how they route, apply a plan reversibly, load checkpoints.

It imports `plan` alone, and is where what depends on transformers' classes belongs.
"""

from moeopt.models.devices import check_device, check_device_map, check_dtype
from moeopt.models.gate import Admitted, admit
from moeopt.models.identity import describe, fingerprint
from moeopt.models.layers import MoELayer, check_model, is_dense, materialised, moe_layers, routing_tensor, shape_of
from moeopt.models.layerwise import Layerwise, layerwise
from moeopt.models.loading import check_checkpoint, empty_model, load, load_model, load_tokenizer
from moeopt.models.merging import MergedCache, merge
from moeopt.models.names import Placed, lacking, placed
from moeopt.models.patching import (
    MergedWeights,
    Patched,
    check_makes,
    check_merged_weights,
    check_takes,
    experts_run_by,
    patched,
    plan_in_force,
    routing_rules,
    without_plan,
)
from moeopt.models.rounding import is_exact
from moeopt.models.routing import RoutingRule
from moeopt.models.sizes import Size, Sizes
from moeopt.models.use import evaluation_mode, lock_of

__all__ = [
    "Admitted",
    "Layerwise",
    "MergedCache",
    "MergedWeights",
    "MoELayer",
    "Patched",
    "Placed",
    "RoutingRule",
    "Size",
    "Sizes",
    "admit",
    "check_checkpoint",
    "check_device",
    "check_device_map",
    "check_dtype",
    "check_makes",
    "check_merged_weights",
    "check_model",
    "check_takes",
    "describe",
    "empty_model",
    "evaluation_mode",
    "experts_run_by",
    "fingerprint",
    "is_dense",
    "is_exact",
    "lacking",
    "layerwise",
    "load",
    "load_model",
    "load_tokenizer",
    "lock_of",
    "materialised",
    "merge",
    "moe_layers",
    "patched",
    "placed",
    "plan_in_force",
    "routing_rules",
    "routing_tensor",
    "shape_of",
    "without_plan",
]
