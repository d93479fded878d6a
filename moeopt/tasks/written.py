"""What the files of published benchmarks of generated answers share; `benchmark` is that of multiple choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moeopt.tasks.answers import Judge
from moeopt.tasks.base import Example
from moeopt.tasks.benchmark import chosen_template
from moeopt.tasks.generation import GenerationTask
from moeopt.tasks.rows import Data, Row, load, origin, own_examples
from moeopt.tasks.splits import FRACTIONS, from_own

Rows = dict[str, list[Row]]
"""Rows by the data set's own split."""


@dataclass(frozen=True)
class Template:
    """How rows of a data set become examples, how an answer ends, and how it is judged, the reported metric first."""

    to_example: Callable[[Row], Example]
    judges: Mapping[str, Judge]
    stop: tuple[str, ...]
    max_new_tokens: int


def _rows(data: Data, config: str | None, template: str) -> Rows:
    return load(data, config)


@dataclass(frozen=True)
class WrittenBenchmark:
    """A published data set as a function that gives its task.

    `templates` say what becomes of a row in the hub's schema, `labels` are the columns of which one holds its answer,
    and `labelled` tells whether it has one where that takes more. `rows(data, config, template)` reads them.
    """

    name: str
    hub: str
    templates: Mapping[str, Template]
    labels: tuple[str, ...]
    labelled: Callable[[Row], bool] | None = None
    rows: Callable[[Data, str | None, str], Rows] = _rows

    def __call__(
        self,
        data: Data | None = None,
        *,
        template: str = "harness",
        fractions: Sequence[float] = FRACTIONS,
        config: str | None = None,
        stop: Sequence[str] | str | None = None,
        max_new_tokens: int | None = None,
    ) -> GenerationTask:
        """The task, from the hub (`hub` unless `data` says otherwise) or local files.

        Args:
            data: a file of rows, a folder of them or a hub id: see `moeopt.tasks.rows.load`.
            template: which of `templates` writes the prompts and judges the answers.
            fractions: of search, dev and test where the data has no splits of its own; of two, the later one becomes
                test, and the other is divided into search and dev, passage by passage where there are passages.
            config: configuration of a hub data set.
            stop, max_new_tokens: where an answer ends; None for the template's.

        Raises:
            TaskError: naming file and line of whatever is missing or malformed.
        """
        chosen = chosen_template(self.templates, template)
        rows = self.rows(self.hub if data is None else data, config, template)
        own = own_examples(self.name, rows, chosen.to_example, self.labels, self.labelled)
        task = GenerationTask(
            self.name,
            **from_own(own, fractions, self.name),
            judges=chosen.judges,
            stop=chosen.stop if stop is None else stop,
            max_new_tokens=chosen.max_new_tokens if max_new_tokens is None else max_new_tokens,
            template=f"{template} v1",
        )
        task.origin = origin(own, rows)
        return task
