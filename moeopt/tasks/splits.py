"""Which example belongs to which split.

A data set's own splits are respected:

- train, validation, test  -> search, dev, test;
- two of them              -> the later one is test; a hash divides the earlier one into search and dev;
- one file, or one split   -> a hash divides it into search, dev and test.

The hash is over an example's prompt and options, or over its group, so equal examples, and those of a group, never
straddle a split, and a file that grows moves none of its old examples. An example that a data set repeats in a later
split of its own is dropped from the earlier one.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from moeopt.errors import TaskError
from moeopt.tasks.base import SPLITS, Example, Task

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

OWN = ("train", "validation", "test")
FRACTIONS = (0.4, 0.2, 0.4)


def content_hash(example: Example) -> str:
    """SHA-256 of prompt and options: 64 hexadecimal digits. The answer is left out: one question, one split."""
    return hashlib.sha256(json.dumps([example.prompt, example.options]).encode()).hexdigest()


def divide(examples: Iterable[Example], fractions: Sequence[float] = FRACTIONS) -> dict[str, list[Example]]:
    """Divides one list into search, dev and test by the examples' hashes, in about the given fractions (sum 1)."""
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise TaskError(f"fractions must be three numbers >= 0 that sum to 1, got {tuple(fractions)}")
    search, dev, _ = fractions
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in examples:
        name = content_hash(example) if example.group is None else hashlib.sha256(example.group.encode()).hexdigest()
        u = int(name[:13], 16) / 16**13
        parts["search" if u < search else "dev" if u < search + dev or fractions[2] == 0 else "test"].append(example)
    return parts


def from_own(own: Mapping[str, Sequence[Example]], fractions: Sequence[float] = FRACTIONS) -> dict[str, list[Example]]:
    """Maps a data set's own splits (keys among `OWN`, at least one) to search, dev and test."""
    given = [own[name] for name in OWN if own.get(name)]
    if len(given) == 1:
        return divide(given[0], fractions)
    if len(given) == 2:
        first, last = fractions[0], fractions[1]
        if first + last <= 0:
            raise TaskError(f"fractions {tuple(fractions)} leave nothing for search and dev")
        parts = divide(given[0], (first / (first + last), last / (first + last), 0.0))
        parts["test"] = list(given[1])
    else:
        parts = {split: list(examples) for split, examples in zip(SPLITS, given, strict=True)}
    return without_repeats(parts)


def without_repeats(parts: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """Splits in which an example that a later split has is dropped from the earlier one."""
    kept: dict[str, list[Example]] = {}
    later: set[str] = set()
    for split in reversed(SPLITS):
        hashes = [content_hash(example) for example in parts[split]]
        kept[split] = [e for e, h in zip(parts[split], hashes, strict=True) if h not in later]
        later.update(hashes)
    return kept


class Splits:
    """Examples by split, each in the order of its hashes, which is a fixed random one.

    Raises:
        TaskError: if there is no example at all, or two splits share one.
    """

    def __init__(self, task: str, search: Iterable[Example], dev: Iterable[Example], test: Iterable[Example]) -> None:
        self.task = task
        self._examples: dict[str, tuple[Example, ...]] = {}
        owner: dict[str, str] = {}
        for split, examples in zip(SPLITS, (search, dev, test), strict=True):
            hashed = sorted(((content_hash(e), e) for e in examples), key=lambda pair: pair[0])
            for h, example in hashed:
                if owner.setdefault(h, split) != split:
                    raise TaskError(f"task {task!r}: example {example.id!r} is in both {owner[h]!r} and {split!r}")
            self._examples[split] = tuple(example for _, example in hashed)
        if not owner:
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


def checked_limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise TaskError(f"limit must be at least 1, got {limit}")
    return limit
