"""A study's note in Markdown, in which the study's own text is inert: what it searches, how to resume it, the best."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from moeopt.report.dashboard.digest import LONGEST, Digest
from moeopt.report.dashboard.resuming import resuming
from moeopt.report.facts import facts, is_label_free
from moeopt.showing import line
from moeopt.study.reference import MOST_SHOWN

if TYPE_CHECKING:
    from moeopt.plan import Plan

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
        parts.append("\n".join(f"- **Cannot be read in full:** {code(problem, 200)}" for problem in digest.problems))
    if digest.about:
        searched = [(name, code(text, 400)) for name, text in facts(digest.about)]
        parts.append("### What it searches\n\n" + _table(searched))
        parts.append("### How to resume\n\n" + resuming(digest, command, storage, trials))
    parts.append("### Best so far\n\n" + _best(digest))
    return "\n\n".join(parts) + "\n"


def joined(before: str, body: str) -> str:
    """A new note: what a user wrote above the mark of the one `before`, then the mark and the body."""
    users = before.split(MARK)[0].rstrip()
    return (f"{users}\n\n" if users else "") + f"{MARK}\n\n{body}"


def code(value: object, longest: int = LONGEST) -> str:
    """A value in backticks, on one line, as a table cell can hold it: no Markdown and no HTML in it has an effect."""
    text = line(value, longest) or "–"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text[0] in "` " or text[-1] in "` " else ""
    return ticks + pad + text.replace("|", "\\|") + pad + ticks


def _table(facts: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)])


def _best(digest: Digest) -> str:
    best, full = digest.best, digest.full
    told = []
    if best is not None:
        told = [("trial", str(best.number)), ("loss", f"{best.loss:.4f}")]
        if not math.isnan(digest.accuracy):
            told.append(("agreement" if is_label_free(digest.about) else "accuracy", f"{100 * digest.accuracy:.1f}%"))
        if best.operator:
            told.append(("made by", code(best.operator)))
    if full is not None:
        told.append(("full model", code(str(full), 200)))
        told += [("**warning**", code(warning, 600)) for warning in full.warnings[:MOST_SHOWN]]
    if best is not None and digest.held is not None:
        from moeopt.results.selection.gains import Held

        told.append(("held", code(str(Held(**digest.held)), 400)))
    parts = ([] if best is not None else ["No trial has a loss yet."]) + ([_table(told)] if told else [])
    sentences = None if best is None or digest.selection is None else digest.selection.get("sentences")
    said = [code(text, 300) for text in sentences[:4] if isinstance(text, str)] if isinstance(sentences, list) else []
    if said:
        parts.append("\n".join(["**Selected on dev, reported on test:**\n", *(f"- {text}" for text in said)]))
    if digest.plan is not None:
        parts.append(_plan(digest.plan))
    return "\n\n".join(parts)


def _plan(plan: Plan) -> str:
    from moeopt.report.terminal import layer_rows

    runs = list(layer_rows(plan))
    lines = ["| layers | experts kept (~: others are merged in) | router | active |", "|---|---|---|---|"]
    for run in runs[:MOST_RUNS]:
        lines.append(f"| {run['layers']} | {code(run['experts'], 400)} | {run['routing']} | {run['k']} |")
    more = f"\n\n{len(runs) - MOST_RUNS} more runs of layers: `moeopt show`." if len(runs) > MOST_RUNS else ""
    return "\n".join(lines) + more
