"""A task of examples in splits, whose prompts may have shots before them and a chat template around them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from moeopt.errors import TaskError
from moeopt.tasks.base import Example
from moeopt.tasks.delimiter import Delimiter
from moeopt.tasks.prompting import SEPARATOR, Prompting, checked, draw
from moeopt.tasks.rows import Data, Row, labelled_examples, load, origin
from moeopt.tasks.splits import FRACTIONS, DividedTask, Splits, divide, divide_given


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
        examples = []
        for number, row in enumerate(rows):
            try:
                examples.append(to_example(row))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise TaskError(f"task {name!r}, row {number}: {type(error).__name__}: {error}") from error
        parts: dict[str, Any] = {**divide(examples, fractions)}
        return cls(name, **parts, **options)

    @classmethod
    def from_data(
        cls,
        name: str,
        data: Data,
        to_example: Callable[[Row], Example],
        *,
        labelled: Callable[[Row], bool],
        delimiter: Delimiter,
        fractions: Sequence[float],
        config: str | None,
        **options: Any,
    ) -> Self:
        """A task from rows that are the user's; raises as `moeopt.tasks.rows.load` and `labelled_examples`."""
        rows = load(data, config)
        examples = labelled_examples(name, rows, to_example, ("answer",), labelled)
        delimiter.say(name)
        task = cls(name, **divide_given(examples, fractions, name), template="verbatim v1", **options)
        task.origin = origin(examples, rows)
        return task

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
