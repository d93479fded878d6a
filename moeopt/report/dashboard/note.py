"""A study's note in Markdown, in which the study's own text is inert: what it searches, how to resume it, the best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from moeopt.report.dashboard.digest import Digest, number, shown
from moeopt.report.dashboard.resuming import resuming
from moeopt.study.reference import MOST_SHOWN

MARK = "[//]: # (moeopt writes what follows; text above this line is yours and stays)"
"""A line that Markdown does not show."""
MOST_RUNS = 64
"""Lines of a plan that are listed."""


def note(digest: Digest, command: Any, storage: str, trials: int | None = None) -> str:
    """The body of the note.

    Args:
        command: what resumes the study, as `moeopt search` left it; anything else is ignored.
        storage: the URL of its storage, without a password.
        trials: how many the study shall hold, where it says so.
    """
    parts = [f"## {code(digest.name)}"]
    if digest.problems:
        parts.append("\n".join(f"- **Cannot be read in full:** {code(line)}" for line in digest.problems))
    if digest.about:
        parts.append("### What it searches\n\n" + _table(_facts(digest)))
        parts.append("### How to resume\n\n" + resuming(digest, command, storage, trials))
    parts.append("### Best so far\n\n" + _best(digest))
    return "\n\n".join(parts) + "\n"


def joined(before: str, body: str) -> str:
    """A new note: what a user wrote above the mark of the one `before`, then the mark and the body."""
    own = before.split(MARK)[0].rstrip()
    return (f"{own}\n\n" if own else "") + f"{MARK}\n\n{body}"


def code(text: str, longest: int = 200) -> str:
    """Text in backticks, on one line, as a table cell can hold it: no Markdown and no HTML in it has an effect."""
    line = shown(text, longest) or "–"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line[0] in "` " or line[-1] in "` " else ""
    return ticks + pad + line.replace("|", "\\|") + pad + ticks


def _table(facts: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)])


def _facts(digest: Digest) -> list[tuple[str, str]]:
    part = digest.part
    facts = [("model", _named(part("model", "name_or_path"), part("model", "architecture")))]
    task, limit, split = part("task", "name"), part("task", "limit"), part("task", "split")
    scored = f"{shown(split)} split" + (f", {limit} examples" if number(limit) > 0 else "")
    facts.append(("task", f"{code(shown(task))}, {code(scored)}"))
    facts.append(("score", code(shown(part("evaluation", "score") or "likelihood"))))
    space = digest.space
    if space is not None:
        shape, groups = space.shape, len(space.groups)
        choices = f"{groups} choices for {shape.layers} layers" if groups < shape.layers else f"{shape.layers} layers"
        facts.append(
            ("space", code(f"{shown(part('space', 'kind'))}: keep {space.keep} of {shape.experts} experts, {choices}, "
                           f"{space.k} active, router {space.router}, {space.size} numbers"))
        )  # fmt: skip
    sampler = part("sampler")
    if isinstance(sampler, Mapping):
        options = ", ".join(f"{shown(k)}={shown(v)}" for k, v in list(sampler.items())[:24] if k != "name")
        facts.append(
            ("sampler", f"{code(shown(sampler.get('name')))}" + (f" ({code(options, 400)})" if options else ""))
        )
    pruner = part("pruner", "name")
    if isinstance(pruner, str) and pruner != "NopPruner":
        facts.append(("pruner", code(pruner)))
    return facts


def _named(name: Any, more: Any) -> str:
    return code(shown(name)) + (f" ({code(more)})" if isinstance(more, str) else "")


def _best(digest: Digest) -> str:
    best, full = digest.best, digest.full
    compared = [] if full is None else [("full model", code(str(full)))]
    compared += [] if full is None else [("**warning**", code(warning, 600)) for warning in full.warnings[:MOST_SHOWN]]
    if best is None:
        return "No trial has a loss yet." + ("\n\n" + _table(compared) if compared else "")
    label_free = digest.part("evaluation", "score") in ("kl", "acceptance")
    facts = [("trial", str(best.number)), ("loss", f"{best.loss:.4f}")]
    if not math.isnan(digest.accuracy):
        facts.append(("agreement" if label_free else "accuracy", f"{100 * digest.accuracy:.1f}%"))
    if best.operator:
        facts.append(("made by", code(best.operator)))
    if digest.held is not None:
        from moeopt.results.selection.gains import Held

        compared.append(("held", code(str(Held(**digest.held)), 400)))
    text = _table(facts + compared)
    if digest.selection is not None:
        sentences = digest.selection.get("sentences")
        lines = (
            [code(line, 300) for line in sentences[:4] if isinstance(line, str)] if isinstance(sentences, list) else []
        )
        text += (
            "\n\n**Selected on dev, reported on test:**\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""
        )
    if digest.plan is not None:
        from moeopt.report.terminal import layer_rows

        runs = list(layer_rows(digest.plan))
        text += "\n\n| layers | experts kept (~: others are merged in) | router | active |\n|---|---|---|---|\n"
        text += "\n".join(
            f"| {run['layers']} | {code(run['experts'], 400)} | {run['routing']} | {run['k']} |"
            for run in runs[:MOST_RUNS]
        )
        if len(runs) > MOST_RUNS:
            text += f"\n\n{len(runs) - MOST_RUNS} more runs of layers: `moeopt show`."
    return text
