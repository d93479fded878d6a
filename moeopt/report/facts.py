"""What a study's description says that it searches, in words, whatever a stranger wrote into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moeopt.showing import line


def part(about: Any, *path: str) -> Any:
    """A field of a description, or None."""
    for key in path:
        about = about.get(key) if isinstance(about, Mapping) else None
    return about


def score(about: Any) -> str:
    """What trials minimised; studies of the first versions do not say, as there was one way."""
    return line(part(about, "evaluation", "score") or "likelihood", 80)


def is_label_free(about: Any) -> bool:
    """Whether losses are distances from the full model, and accuracies agreement with it."""
    return score(about) in ("kl", "acceptance")


def facts(about: Any) -> Iterator[tuple[str, str]]:
    """Model, task, score, space, sampler and pruner, each in a line; the last two where they are told."""

    def told(*path: str) -> str:
        value = part(about, *path)
        return "?" if value is None else line(value, 80)

    name, architecture = told("model", "name_or_path"), told("model", "architecture")
    yield "model", architecture if name == "?" else f"{name} ({architecture})"
    count, limit = part(about, "task", "examples", str(part(about, "task", "split"))), part(about, "task", "limit")
    sizes = (f" of {line(count, 20)} examples" if count else "") + (f", first {line(limit, 20)}" if limit else "")
    yield "task", f"{told('task', 'name')}, split {told('task', 'split')}{sizes}"
    yield "score", score(about)
    for key in ("objectives", "constraints"):
        names = part(about, "evaluation", key)
        if isinstance(names, list) and names:
            yield key, line(", ".join(map(str, names)), 200)
    groups = part(about, "space", "groups")
    fewest, total = told("space", "range", "low"), told("space", "range", "total")
    keep = told("space", "keep") if fewest == "?" else f"{fewest} to {told('space', 'keep')}"
    keep += "" if total == "?" else f" (in all at most {total})"
    yield (
        "space",
        f"{told('space', 'kind')}: {told('space', 'shape', 'layers')} layers in "
        f"{len(groups) if isinstance(groups, list) else '?'} groups, keep {keep} of "
        f"{told('space', 'shape', 'experts')} experts, {told('space', 'k')} active, router {told('space', 'router')}",
    )
    sampler = part(about, "sampler")
    if isinstance(sampler, Mapping):
        settings = [item for item in sampler.items() if item[0] != "name"][:24]
        options = ", ".join(f"{line(key, 40)}={line(value, 80)}" for key, value in settings)
        yield "sampler", told("sampler", "name") + (f": {options}" if options else "")
    pruner = part(about, "pruner", "class")
    if isinstance(pruner, str) and not pruner.endswith(".NopPruner"):
        yield "pruner", line(pruner.rpartition(".")[2], 80)
