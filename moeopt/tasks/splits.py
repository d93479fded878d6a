"""Which example belongs to which split.

A data set's own splits are respected:

- train, validation, test  -> search, dev, test;
- two of them              -> the later one is test; a hash divides the earlier one into search and dev;
- one file, or one split   -> a hash divides it into search, dev and test.

The hash is over an example's family (`moeopt.tasks.likeness`: near-duplicates, and whoever shares a group), so that no
family straddles two splits, and a file that grows moves none of its old examples unless the new ones tie two families
together. Of a data set's own splits, what is of a later split's family is dropped from the earlier one, and counted in
a warning.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moeopt.errors import TaskError
from moeopt.showing import listed, shown
from moeopt.tasks.base import SPLITS, Example, Task
from moeopt.tasks.likeness import families

OWN = ("train", "validation", "test")
FRACTIONS = (0.4, 0.2, 0.4)


def content_hash(example: Example) -> str:
    """SHA-256 of prompt and options, to the letter: 64 hexadecimal digits. It is what examples are ordered by."""
    return hashlib.sha256(json.dumps([example.prompt, example.options]).encode()).hexdigest()


def divide(examples: Iterable[Example], fractions: Sequence[float] = FRACTIONS) -> dict[str, list[Example]]:
    """Divides one list into search, dev and test by the examples' families, in about the given fractions (sum 1)."""
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise TaskError(f"fractions must be three numbers >= 0 that sum to 1, got {tuple(fractions)}")
    search, dev, _ = fractions
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    examples = list(examples)
    for example, family in zip(examples, families(examples), strict=True):
        u = int(family[:13], 16) / 16**13
        parts["search" if u < search else "dev" if u < search + dev or fractions[2] == 0 else "test"].append(example)
    return parts


def divide_given(
    splits: Mapping[str, Sequence[Example]], fractions: Sequence[float] = FRACTIONS, task: str = ""
) -> dict[str, list[Example]]:
    """Maps a data set's own splits (keys among `OWN`) to search, dev and test; `task` is its name, for a warning."""
    given = [splits[name] for name in OWN if splits.get(name)]
    if len(given) < 2:
        return divide(given[0] if given else (), fractions)
    if len(given) == 2:
        first, last = fractions[0], fractions[1]
        if first + last <= 0:
            raise TaskError(f"fractions {tuple(fractions)} leave nothing for search and dev")
        parts = divide(given[0], (first / (first + last), last / (first + last), 0.0))
        parts["test"] = list(given[1])
    else:
        parts = {split: list(examples) for split, examples in zip(SPLITS, given, strict=True)}
    return without_shared(parts, task)


def without_shared(parts: Mapping[str, Sequence[Example]], task: str = "") -> dict[str, list[Example]]:
    """Splits without what is of the family of a later split's example, with a warning that counts it."""
    every = [(split, example) for split in SPLITS for example in parts[split]]
    last: dict[str, int] = {}
    named = families([example for _, example in every])
    for (split, _), family in zip(every, named, strict=True):
        last[family] = max(last.get(family, 0), SPLITS.index(split))
    apart: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for (split, example), family in zip(every, named, strict=True):
        if SPLITS[last[family]] == split:
            apart[split].append(example)
    lost = [(split, len(parts[split]) - len(apart[split]), len(parts[split])) for split in SPLITS]
    said = [f"{n:,} of {total:,} examples of {split}" for split, n, total in lost if n]
    if said:
        warnings.warn(
            f"{f'task {task!r}: ' if task else ''}left out {listed(said)}: a later split has them, or others of their"
            " group (the same passage, say)",
            stacklevel=3,
        )
    return apart


def check_apart(parts: Mapping[tuple[str, ...], Sequence[Example]], where: str = "") -> None:
    """Refuse examples of one family in two splits; `parts` by split, and by the member of a mixture that they are of.

    Raises:
        TaskError: naming two such examples and what they share.
    """
    every = [(place, example) for place, examples in parts.items() for example in examples]
    owner: dict[str, tuple[tuple[str, ...], Example]] = {}
    for (place, example), family in zip(every, families([example for _, example in every]), strict=True):
        first, other = owner.setdefault(family, (place, example))
        if first[0] == place[0]:
            continue
        here, there = (" of ".join(map(repr, names)) for names in (place, first))
        if example.likeness == other.likeness:
            raise TaskError(f"{where}example {example.id!r} is in {here} and in {there}")
        raise TaskError(
            f"{where}example {example.id!r} of {here} and example {other.id!r} of {there} are of one group"
            f" ({shown(example.group or other.group)}), which must stay in one split"
        )


class Splits:
    """Examples by split, each in the order of its hashes, which is a fixed random one.

    Raises:
        TaskError: if there is no example at all, or two splits share one, near-duplicates included, or a group.
    """

    def __init__(self, task: str, search: Iterable[Example], dev: Iterable[Example], test: Iterable[Example]) -> None:
        self.task = task
        self._examples: dict[str, tuple[Example, ...]] = {}
        parts = {split: list(part) for split, part in zip(SPLITS, (search, dev, test), strict=True)}
        check_apart({(split,): part for split, part in parts.items()}, f"task {task!r}: ")
        for split, examples in parts.items():
            self._examples[split] = tuple(sorted(examples, key=content_hash))
        if not any(parts.values()):
            raise TaskError(f"task {task!r} has no examples")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if self._examples[split])

    def counts(self) -> dict[str, int]:
        return {split: len(self._examples[split]) for split in self.names}

    def examples(self, split: str) -> tuple[Example, ...]:
        if split not in SPLITS:
            raise TaskError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
        if not self._examples[split]:
            raise TaskError(f"split {split!r} of task {self.task!r} is empty; it has {self.counts()}")
        return self._examples[split]

    def first(self, split: str, limit: int | None) -> tuple[Example, ...]:
        """The first `limit` examples, all when None or more than there are."""
        return self.examples(split)[: checked_limit(limit)]

    def fingerprint(self, split: str | None = None) -> str:
        digest = hashlib.sha256()
        for name in SPLITS if split is None else (split,):
            rows = [[e.prompt, e.options, e.answer, *e.references] for e in self._examples[name]]
            digest.update(json.dumps([name, rows]).encode())
        return digest.hexdigest()


class DividedTask(Task):
    """A task whose examples are in `Splits`; subclasses say what is scored."""

    _splits: Splits

    @property
    def splits(self) -> tuple[str, ...]:
        return self._splits.names

    def examples(self, split: str) -> tuple[Example, ...]:
        return self._splits.examples(split)

    def fingerprint(self, split: str | None = None) -> str:
        return self._splits.fingerprint(split)

    def facts(self, kind: str, template: str) -> dict[str, Any]:
        """What `describe` says of any kind."""
        examples = self._splits.counts()
        facts = {"name": self.name, "kind": kind, "fingerprint": self.fingerprint(), "examples": examples}
        return {**facts, "template": template}


def checked_limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise TaskError(f"limit must be at least 1, got {limit}")
    return limit
