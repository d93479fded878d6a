"""The model card of an exported checkpoint: metadata as the hub reads them, and what there is to say in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from moeopt.exporting.base import BASE_CARD, Base
from moeopt.plan import LayerPlan, Plan
from moeopt.showing import line, listed
from moeopt.statistics import Interval
from moeopt.trials.selected import FULL, WINNER

PIPELINES = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageTextToText": "image-text-to-text"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
UNKNOWN_LICENCE = (
    "What licence the full model has is not known: its folder has neither a card that says so nor a LICENSE file. Look "
    "it up before you pass this checkpoint on."
)


@dataclass(frozen=True)
class Weights:
    """Bytes of all tensors, and how many numbers they hold; None where some are packed."""

    nbytes: int
    parameters: int | None


def card(
    name: str,
    base: Base,
    plan: Plan,
    record: Mapping[str, Any],
    full: Weights,
    small: Weights,
    *,
    remarks: Sequence[str] = (),
    asked: Sequence[str] = (),
    auto_class: str = "AutoModelForCausalLM",
) -> str:
    """A README.md.

    Args:
        name: of the checkpoint.
        base: the full model.
        plan: as it is written.
        record: what moeopt.json holds; nothing private.
        full, small: the weights of the full model, and those that are written.
        remarks: what is said of tensors that no class reads.
        asked: what servers ask for that it does not give.
        auto_class: transformers' class that loads it.
    """
    custom, remote = record["form"] == "custom", record.get("trust_remote_code", False)
    pruned = all(p.kept is not None for p in plan.layers)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES[auto_class],
        base_model=base.hub_id,
        base_model_relation=None if base.hub_id is None else "finetune",  # nearest of what the hub has a word for
        **base.licence,  # type: ignore[arg-type]
        datasets=_data_sets(record) or None,
        tags=["moe", "mixture-of-experts", "moeopt", "expert-pruning" if pruned else "expert-merging"]
        + (["custom_code"] if custom or remote else []),
        model_name=line(name) if (results := _results(record)) else None,
        eval_results=results,
    )
    sections = [
        _title(base, plan, record, full, small),
        _changed(plan, record, full, small, remarks),
        _use(record, auto_class, asked, custom or remote),
        _scores(record),
        _made(record, base),
    ]
    return "\n".join(["---", data.to_yaml(), "---", *(text for part in sections for text in part), ""])


def _title(base: Base, plan: Plan, record: Mapping[str, Any], full: Weights, small: Weights) -> Iterator[str]:
    layers, name = plan.layers, _code(base.name)
    r, k = (_range([getattr(p, each) for p in layers]) for each in ("kept_experts", "k"))
    does = "keeps" if all(p.kept is not None for p in layers) else "merges its experts into"
    active = "active" if all(p.novices is None for p in layers) else "picked, novices among them,"
    form = "An ordinary checkpoint: it loads with plain transformers."
    if record["form"] == "custom":
        form = (
            "A custom checkpoint: it needs transformers 5 and the class that it brings with it, `modeling_moeopt.py`."
        )
    elif record.get("trust_remote_code", False):
        form = f"It loads with the code that `{name}` brings, which was copied as it is."
    yield from (f"# `{name}`, {layers[0].experts} to {r} experts", "")
    yield (
        f"Each of the {len(layers)} MoE layers of `{name}` {does} {r} of {layers[0].experts} experts, {k} {active} per "
        f"token: {small.nbytes / 2**20:.1f} MiB of weights, from {full.nbytes / 2**20:.1f} MiB. {form}"
    )
    if record["form"] == "custom":
        yield from ("", f"Why not an ordinary one: {_plain(record['why_custom'])}.")


def _changed(
    plan: Plan, record: Mapping[str, Any], full: Weights, small: Weights, remarks: Sequence[str]
) -> Iterator[str]:
    """What was removed and merged, in numbers and in words."""
    layers = plan.layers
    r = [p.kept_experts for p in layers]
    yield from ("", "## What was changed", "", "| | full model | this model |", "|---|---|---|")
    yield f"| experts in a MoE layer | {layers[0].experts} | {_range(r)} |"
    if full.parameters is not None and small.parameters is not None:
        yield f"| parameters | {full.parameters:,} | {small.parameters:,} |"
    yield f"| bytes of weights | {full.nbytes:,} | {small.nbytes:,} |"
    if len(set(r)) > 1:
        yield from ("", f"Experts of each layer: {', '.join(map(str, r))}.")
    for remark in remarks:
        yield from ("", f"{_plain(remark[0].upper() + remark[1:])}.")
    mixed = [p for p in layers if not p.sums_experts]
    if mixed:
        yield from ("", _mixed(mixed))
    novices = [len(p.novices) for p in layers if p.novices is not None]
    if novices:
        yield ""
        yield (
            f"In {len(novices)} layers constants (novices) stand in for the {_range(novices)} other experts: the "
            "router still picks among all, and what it picks of these costs nothing."
        )
    if plan.is_refitted:
        yield from ("", _refitted(plan, (record.get("about") or {}).get("refit")))
    if "projection" in record:
        cost = record["projection"]
        yield ""
        yield (
            f"Projected from a plan that no ordinary checkpoint expresses. On {cost['split']} examples of "
            f"`{_code(cost['task'])}` the loss went from {cost['loss_before']:.4f} to {cost['loss_after']:.4f}; KL "
            f"divergence of next tokens {cost['kl']:.4f} nats, the same experts picked for {100 * cost['top_k']:.1f}% "
            "of picks."
        )


def _use(record: Mapping[str, Any], auto_class: str, asked: Sequence[str], trust: bool) -> Iterator[str]:
    trusted = ", trust_remote_code=True" if trust else ""
    yield from ("", "## How to load it", "", "```python", f"from transformers import {auto_class}, AutoTokenizer", "")
    yield 'checkpoint = "..."  # the folder of this file, or its name on the hub'
    yield f'model = {auto_class}.from_pretrained(checkpoint, dtype="auto"{trusted})'
    yield f"tokenizer = AutoTokenizer.from_pretrained(checkpoint{trusted})"
    yield from ("```", "")
    if record["form"] == "custom":
        yield (
            "`moeopt.load(checkpoint)` needs no `trust_remote_code`: it runs its own copy of the class, if that is the "
            "same byte for byte. vLLM, SGLang and llama.cpp do not read this form."
        )
    elif trust:
        yield "Servers that read the full model with its code read this one."
    else:
        yield "vLLM, SGLang and llama.cpp read it as far as they read the full model."
        if asked:
            yield from ("What they ask for beside that:", "", *(f"- {_plain(each)}" for each in asked))


def _scores(record: Mapping[str, Any]) -> Iterator[str]:
    """What the study tells of the plan on each split, the full model beside it."""
    yield from ("", "## Scores", "")
    selection, held, about = record.get("selection"), record.get("held"), record.get("about") or {}
    rows: list[str] = []
    told: list[str] = []
    if selection is not None:
        rows += _selected_rows(selection)
        told += [*selection["sentences"], *selection["warnings"]]
    elif "trial" in record:
        rows += _searched_rows(record)
    if held is not None:
        change = -Interval(held["dev"], held["low"], held["high"])
        told.append(
            f"Loss on {held['examples']:,} dev examples less that of trial {held['start']}, with which the search "
            f"began: {change}."
        )
    if rows:
        yield "| split | examples | score | full model | this model | difference, 95% interval |"
        yield from ("|---|---|---|---|---|---|", *rows, "")
        yield (
            "The search minimised the loss on `search`; expect more on unseen data. `dev` chose this plan among "
            "others, `test` had no part in it."
            if selection is not None
            else "The search minimised the loss on this split; expect a higher loss on unseen data."
        )
    told += [*_texts(about.get("uniform")), *_texts(about.get("judged"))]
    if told:
        yield from ("", "```text", *(_fenced(text) for text in told), "```")
    if selection is None and "trial" in record:
        yield ""
        yield "**Not judged** against the full model on examples that the search never saw, as `moeopt select` does."
    elif not rows and not told:
        yield "**Not judged**: no study says how it scores against the full model."


def _selected_rows(selection: Mapping[str, Any]) -> Iterator[str]:
    metric = selection["metric"]
    for split in ("test", "dev", "search"):
        scores, count = selection["scores"][split], selection["examples"].get(split, {}).get("count", 0)
        for name in ("loss", metric):
            full, small = scores[FULL][name], scores[WINNER][name]
            interval = selection["test_minus"][FULL][name] if split == "test" else None
            change = f"{small - full:+.4f}" if interval is None else str(_interval(interval))
            yield f"| {split} | {count:,} | {_cell(name)} | {full:.4f} | {small:.4f} | {change} |"


def _searched_rows(record: Mapping[str, Any]) -> Iterator[str]:
    trial, task, full = record["trial"], record["study"]["task"], record.get("full_model") or {}
    count = f"{full['examples']:,}" if full else "all" if task.get("limit") is None else f"{task['limit']:,}"
    for name in ("loss", "accuracy"):
        if trial.get(name) is None:
            continue
        whole = full.get(name)
        cells = ("—", f"{trial[name]:.4f}", "—")
        if whole is not None:
            cells = (f"{whole:.4f}", f"{trial[name]:.4f}", f"{trial[name] - whole:+.4f}")
        yield f"| {_cell(task.get('split'))} | {count} | {name} | {' | '.join(cells)} |"


def _results(record: Mapping[str, Any]) -> list[EvalResult] | None:
    """What the hub shows as evaluation results: those on test, where there are some."""
    selection = record.get("selection")
    if selection is None:
        return None
    task, metric, named = line(record["study"]["task"]["name"]), selection["metric"], _data_sets(record)
    scores = selection["scores"]["test"][WINNER]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=named[0] if len(named) == 1 else re.sub(r"[^\w.-]", "-", task),
            dataset_name=task,
            dataset_split="test",
            metric_type=line(name),
            metric_name=f"{line(name)} of {selection['examples']['test']['count']:,} test examples",
            metric_value=round(scores[name], 6),
        )
        for name in (metric, "loss")
    ]


def _data_sets(record: Mapping[str, Any]) -> list[str]:
    """The data sets of the hub that the task of a study names, those of a mixture's members included."""

    def named(task: Any) -> Iterator[str]:
        if not isinstance(task, dict):
            return
        for part in (task.get("tasks") or {}).values() if isinstance(task.get("tasks"), dict) else ():
            source = part.get("data_set") if isinstance(part, dict) else None
            if isinstance(source, list) and source and isinstance(source[0], str) and _HUB_ID.fullmatch(source[0]):
                yield source[0]
        for member in (task.get("members") or {}).values() if isinstance(task.get("members"), dict) else ():
            yield from named(member)

    return [*dict.fromkeys(named((record.get("study") or {}).get("task")))]


def _made(record: Mapping[str, Any], base: Base) -> Iterator[str]:
    """Task, study, commands and versions; and what is known of the full model."""
    yield from ("", "## How it was made", "")
    if "trial" in record:
        study, number = record["study"], record["trial"]["number"]
        task, sampler = study["task"], study["sampler"]
        sizes = [f"{line(split)} {count:,}" for split, count in (task.get("examples") or {}).items()]
        of = f" ({listed(sizes)} examples)" if sizes else ""
        yield (
            f"Found by moeopt {record['moeopt']}: study `{_code(study['name'])}`, trial {number} of "
            f"{record['trials']:,}; task `{_code(task['name'])}`{of}; sampler `{_code(sampler.get('name'))}`, seed "
            f"{_code(sampler.get('seed'))}."
        )
    else:
        yield f"Written by moeopt {record['moeopt']} from a plan."
    commands = [record[key] for key in ("search_command", "command") if record.get(key)]
    if commands:
        yield from ("", "```console", *(f"$ {_fenced(command)}" for command in commands), "```")
    else:
        yield from ("", "It was exported by `moeopt.export` in Python.")
    yield from ("", "`moeopt.json` says what was done, layer by layer; `plan.safetensors` exactly.", "")
    yield from ("## The full model", "")
    at = f", revision `{base.revision}`" if base.revision else ""
    if base.hub_id is not None:
        yield f"[`{base.hub_id}`](https://huggingface.co/{base.hub_id}){at}."
    else:
        yield f"`{_code(base.name)}`, from a folder; which model of the hub that is, nothing there says."
    if base.licence:
        yield f"Its licence: `{_code(base.licence['license'])}`, as its {_plain(base.licence_from)} says."
        if base.licence["license"] == "other" and "license_link" in base.licence:
            yield f"See `{_code(base.licence['license_link'])}`."
    else:
        yield UNKNOWN_LICENCE
    if base.card is not None:
        yield f"Its own card is [`{BASE_CARD}`]({BASE_CARD}): what it says of scores and sizes is of the full model."


def _refitted(plan: Plan, refit: Any) -> str:
    """What is said of down projections that were fitted, and of what they were fitted to."""
    number = sum(layer.down is not None for layer in plan.layers)
    text = f"In {number} layers the experts' down projections are fitted, by ridge regression, to the full model"
    try:
        data = f"`{_code(refit['task']['name'])}`, `{_code(refit['split'])}`"
        return f"{text}: {refit['tokens']:,} tokens of {refit['sequences']:,} sequences of {data}."
    except (TypeError, KeyError, ValueError):
        return f"{text}."


def _mixed(layers: Sequence[LayerPlan]) -> str:
    """What is said of experts that are no weighted sums of those of the full model as they are."""
    merges = sorted({p.merge for p in layers})
    aligned = sum(p.neurons is not None for p in layers)
    order = f", with their neurons put in one order first in {aligned}" if aligned else ""
    return f"In {len(layers)} layers experts are merged by {' and '.join(merges)} means{order}."


def _texts(value: Any) -> list[str]:
    return [str(text) for text in value] if isinstance(value, list) else []


def _interval(stored: Mapping[str, float]) -> Interval:
    return Interval(stored["mean"], stored["low"], stored["high"])


def _code(text: Any) -> str:
    """Text of others between backticks in Markdown, which it cannot leave."""
    return line(text).replace("`", "'")


def _plain(text: Any) -> str:
    """Text of others in a line of Markdown, which starts no code, link, tag or table in it."""
    return line(text, 2000).replace("`", "'").replace("<", "‹").replace("[", "\\[")


def _fenced(text: Any) -> str:
    """Text of others in a line of a block of code, which it cannot end."""
    return line(text, 2000).replace("`", "'")


def _cell(text: Any) -> str:
    return f"`{_code(text)}`".replace("|", "/")


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
