"""A task of examples in splits, whose prompts may have shots before them and a chat template around them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from moeopt.errors import TaskError
from moeopt.tasks.base import Example
from moeopt.tasks.prompting import SEPARATOR, Prompting, checked, draw
from moeopt.tasks.rows import examples_of
from moeopt.tasks.splits import FRACTIONS, DividedTask, Splits, divide


class PromptedTask(DividedTask):
    """What tasks of prompts share; subclasses say what is scored.

    Args:
        name: what studies record.
        search, dev, test: examples; a split may be empty, the same example may not be in two of them.
        template: name and version of whatever wrote the prompts; recorded with the results.

    Raises:
        TaskError: if splits overlap, or there are no examples.
    """

    def __init__(
        self, name: str, search: Iterable[Example], dev: Iterable[Example], test: Iterable[Example], *, template: str
    ) -> None:
        self.name = name
        self.template = template
        self._splits = Splits(name, search, dev, test)
        self._prompting = Prompting()

    @classmethod
    def from_rows(
        cls,
        name: str,
        rows: Iterable[Mapping[str, Any]],
        to_example: Callable[[Mapping[str, Any]], Example],
        *,
        fractions: Sequence[float] = FRACTIONS,
        **options: Any,
    ) -> Self:
        """A task from any rows, divided into search, dev and test by a hash of each example (or of its group).

        Args:
            name, options: as for the class.
            rows, to_example: `to_example(row)` for every row.
            fractions: of search, dev and test.

        Raises:
            TaskError: also when `to_example` fails on a row; it names the row.
        """
        parts: dict[str, Any] = {**divide(examples_of(name, rows, to_example), fractions)}
        return cls(name, **parts, **options)

    def prompted(
        self, *, shots: int = 0, chat: bool = False, system: str | None = None, separator: str = SEPARATOR
    ) -> Self:
        count, prompting = checked(shots, chat, system, separator)
        if self._prompting != Prompting():
            raise TaskError(f"task {self.name!r} has shots or chat already")
        task = copy.copy(self)
        shown, task._splits = draw(self._splits, count)
        task._prompting = replace(prompting, shots=shown)
        return task

    def shown(self) -> tuple[Example, ...]:
        return self._prompting.shots

    def check(self, tokenizer: Any) -> None:
        self._prompting.check(self.name, tokenizer)

    def fingerprint(self, split: str | None = None) -> str:
        return self._prompting.fingerprint(super().fingerprint(split))
