"""What an exported checkpoint says of itself: moeopt.json and a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeopt.plan import LayerPlan, Plan
from moeopt.showing import line


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


def card(
    source: Path,
    plan: Plan,
    record: dict[str, Any],
    total: int,
    original: int,
    remarks: Sequence[str] = (),
    auto_class: str = "AutoModelForCausalLM",
) -> str:
    """The model card; `total` and `original` are bytes of weights, `remarks` what is said of tensors that no class
    reads, `auto_class` transformers' class that loads the checkpoint."""
    layers = plan.layers
    n, name = layers[0].experts, _code(source.name)
    r, k = (_range([getattr(p, field) for p in layers]) for field in ("kept_experts", "k"))
    pruned = all(p.kept is not None for p in layers)
    active = "active" if all(p.novices is None for p in layers) else "picked, novices among them,"
    custom, remote = record["form"] == "custom", record.get("trust_remote_code", False)
    form = "An ordinary checkpoint: it loads with plain transformers."
    if custom:
        form = (
            "A custom checkpoint: it needs transformers 5 and the class that it brings with it, `modeling_moeopt.py`."
        )
    elif remote:
        form = f"It loads with the code that `{name}` brings, which was copied as it is."
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [mixture-of-experts, moeopt, pruning{', custom_code' if custom or remote else ''}]",
        "---",
        f"# `{name}`, {n} to {r} experts",
        "",
        f"Each of the {len(layers)} MoE layers of `{name}` {'keeps' if pruned else 'merges its experts into'} "
        f"{r} of {n} experts, {k} {active} per token: {total / 2**20:.1f} MiB of weights, from {original / 2**20:.1f} "
        f"MiB. {form}",
    ]
    if custom:
        lines += ["", f"Why not an ordinary one: {record['why_custom']}."]
    if custom or remote:
        lines += [
            "",
            "```python",
            f"from transformers import {auto_class}",
            "",
            f"model = {auto_class}.from_pretrained(folder, trust_remote_code=True)",
            "```",
        ]
    for remark in remarks:
        lines += ["", f"{_code(remark[0].upper() + remark[1:])}."]
    mixed = [p for p in layers if not p.sums_experts]
    if mixed:
        lines += ["", _mixed(mixed)]
    novices = [len(p.novices) for p in layers if p.novices is not None]
    if novices:
        lines += [
            "",
            f"In {len(novices)} layers constants (novices) stand in for the {_range(novices)} other experts: the "
            "router still picks among all, and what it picks of these costs nothing.",
        ]
    if plan.is_refitted:
        lines += ["", _refitted(plan, record.get("about", {}).get("refit"))]
    if "projection" in record:
        cost = record["projection"]
        lines += [
            "",
            f"Projected from a plan that no ordinary checkpoint expresses. On {cost['split']} examples of "
            f"`{_code(cost['task'])}` the loss went from {cost['loss_before']:.4f} to {cost['loss_after']:.4f}; KL "
            f"divergence of next tokens {cost['kl']:.4f} nats, the same experts picked for {100 * cost['top_k']:.1f}% "
            "of picks.",
        ]
    if "trial" in record:
        study, trial = record["study"], record["trial"]
        task = study.get("task", {})
        loss = "no loss" if trial["loss"] is None else f"loss {trial['loss']:.4f}"
        lines += [
            "",
            f"Found by moeopt {record['moeopt']}: study `{_code(study['name'])}`, trial "
            f"{trial['number']}, task `{_code(task.get('name'))}`, {loss} on the `{_code(task.get('split'))}` "
            "split that the search minimised; expect a higher loss on unseen data.",
        ]
    return "\n".join([*lines, "", "`moeopt.json` says what was done, layer by layer; `plan.safetensors` exactly.", ""])


def _refitted(plan: Plan, refit: Any) -> str:
    """What the model card says of down projections that were fitted, and of what they were fitted to."""
    number = sum(layer.down is not None for layer in plan.layers)
    text = f"In {number} layers the experts' down projections are fitted, by ridge regression, to the full model"
    try:
        data = f"`{_code(refit['task']['name'])}`, `{_code(refit['split'])}`"
        return f"{text}: {refit['tokens']:,} tokens of {refit['sequences']:,} sequences of {data}."
    except (TypeError, KeyError, ValueError):
        return f"{text}."


def _mixed(layers: Sequence[LayerPlan]) -> str:
    """What the model card says of experts that are no weighted sums of those of the full model as they are."""
    merges = sorted({p.merge for p in layers})
    aligned = sum(p.neurons is not None for p in layers)
    order = f", with their neurons put in one order first in {aligned}" if aligned else ""
    return f"In {len(layers)} layers experts are merged by {' and '.join(merges)} means{order}."


def _code(text: Any) -> str:
    """Text of others between backticks in Markdown, which it cannot leave."""
    return line(text).replace("`", "'")


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
