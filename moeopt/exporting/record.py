"""The plan of an exported checkpoint as moeopt.json tells it."""

from __future__ import annotations

from typing import Any

from moeopt.plan import Plan


def plan_record(plan: Plan) -> dict[str, Any]:
    """The plan for people: what all layers share, and each layer apart from that; matrices only where they are small.

    `plan.safetensors` holds it exactly.
    """
    shared: dict[str, Any] = {"experts": plan.layers[0].experts}
    values: dict[str, list[Any]] = {
        "r": [p.kept_experts for p in plan.layers],
        "k": [p.k for p in plan.layers],
        "router": [p.router for p in plan.layers],
        "skip": [p.skip for p in plan.layers],
    }
    layers: list[dict[str, Any]] = [
        {"kept": list(p.kept)} if p.kept is not None else {"w_em": p.expert_matrix.tolist()} for p in plan.layers
    ]
    for name, of_layers in values.items():
        if len(set(of_layers)) == 1:
            shared |= {name: of_layers[0]} if of_layers[0] else {}
        else:
            for entry, value in zip(layers, of_layers):
                entry[name] = value
    for p, entry in zip(plan.layers, layers):
        if p.aliases is not None:
            entry["aliases"] = list(p.aliases)
        elif p.novices is not None:
            entry["novices"] = {"shape": list(p.novices.shape)}
        elif p.router_rows != p.kept:
            entry["w_rm"] = p.router_matrix.tolist()
        if p.router == "prob":
            entry["negative"] = p.negative
        if p.down is not None:
            entry["down"] = {"shape": list(p.down.shape), "rank": p.down.rank}
        if not p.sums_experts:
            entry |= {"merge": p.merge, "aligned": p.neurons is not None}
    return {**shared, "layers": layers}
