"""Whether a plan is one that a checkpoint of the model's own class holds."""

from __future__ import annotations

from moeopt.plan.plan import Plan


def why_not_stock(plan: Plan) -> str | None:
    """Why no stock checkpoint expresses the plan, and the nearest thing that would; None when one does."""
    first = plan.layers[0]
    for i, layer in enumerate(plan.layers):
        if (layer.kept_experts, layer.k) != (first.kept_experts, first.k):
            return (
                f"layer {i} has (r, k) = {(layer.kept_experts, layer.k)}, layer 0 {(first.kept_experts, first.k)}: "
                "a stock checkpoint has one r and one k for all layers; search with one keep= and one k="
            )
        if layer.novices is not None:
            return (
                f"layer {i} has constants (novices) in place of {len(layer.novices)} experts, which a stock checkpoint "
                "has no place for; moeopt export --project stock leaves them out"
            )
        if layer.skip:
            return (
                f"layer {i} skips experts token by token (skip={layer.skip:g}), which a stock checkpoint has no place "
                "for; export the same plan without skipping: plan.with_skip(0)"
            )
        if layer.router == "alias":
            return (
                f"layer {i} lets its router choose among all {layer.experts} experts and aliases its picks, which a "
                'stock checkpoint has no place for; a pruning exports, and a merging with router="logit", which moeopt '
                "export --project stock fits"
            )
        if layer.router == "prob" and layer.router_rows is None:
            return (
                f"layer {i} maps router probabilities by a dense W_RM, which a stock checkpoint has no place for; "
                'search with router="logit", or export the best pruning of the study'
            )
    return None
