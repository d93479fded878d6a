"""What the files of published multiple-choice benchmarks share.

A file gives a row of the data set, the prompt that each template makes of it, and a `Benchmark`, which is the function
behind a name of `moeopt.tasks.REGISTRY`. Two templates are common:

- "harness": the prompt of lm-evaluation-harness 0.4 without examples before it. Its options follow a space, and its
  `acc` and `acc_norm` are what `normalise="none"` and "characters" choose.
- "eep": the prompt of EEP (arXiv 2407.00945), from its released configurations of OpenCompass. EEP lets the model
  generate and reads the first letter; here the letters, " A", " B" and so on, are the options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import TypeVar

from moeopt.errors import TaskError, nearest
from moeopt.tasks.base import Example
from moeopt.tasks.multiple_choice import MultipleChoiceTask
from moeopt.tasks.rows import Data, Row, load, origin, own_examples
from moeopt.tasks.splits import FRACTIONS, from_own

Template = Callable[[Row], Example]
T = TypeVar("T")


@dataclass(frozen=True)
class Benchmark:
    """A published data set as a function that gives its task.

    `templates` make an example of a row in the hub's schema. `configs` has the configuration of a hub data set by the
    last part of its id, or a mapping from template to configuration. `labels` are the columns of which one holds a
    row's answer. `expand` turns a row of another published form into rows in the hub's schema. `task` is the class.
    """

    name: str
    hub: str
    templates: Mapping[str, Template]
    configs: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)
    labels: tuple[str, ...] = ("label",)
    expand: Callable[[Row], Iterable[Row]] = lambda row: (row,)
    task: type[MultipleChoiceTask] = MultipleChoiceTask

    def __call__(
        self,
        data: Data | None = None,
        *,
        template: str = "harness",
        normalise: str = "tokens",
        fractions: Sequence[float] = FRACTIONS,
        config: str | None = None,
    ) -> MultipleChoiceTask:
        """The task, from the hub (`hub` unless `data` says otherwise) or local files.

        Args:
            data: a file of rows, a folder of them or a hub id: see `moeopt.tasks.rows.load`.
            template: which of `templates` writes the prompts.
            normalise: how options are compared: "tokens", "none" or "characters", see `MultipleChoiceTask`.
            fractions: of search, dev and test where the data has no splits of its own; with train, validation and an
                unlabelled test, validation becomes test and train is divided into search and dev.
            config: configuration of a hub data set; by default that of `configs`.

        Raises:
            TaskError: naming file and line of whatever is missing or malformed.
        """
        to_example = chosen_template(self.templates, template)
        data = self.hub if data is None else data
        default = self.configs.get(str(data).rpartition("/")[2])
        default = default.get(template) if isinstance(default, Mapping) else default
        rows = load(data, default if config is None else config)
        expanded = {split: [new for row in rows[split] for new in self.expand(row)] for split in rows}
        own = own_examples(self.name, expanded, to_example, self.labels)
        task = self.task(
            self.name, **from_own(own, fractions, self.name), template=f"{template} v1", normalise=normalise
        )
        task.origin = origin(own, rows)
        return task


def chosen_template(templates: Mapping[str, T], name: str) -> T:
    """The template of that name; raises `TaskError` when there is none."""
    if name not in templates:
        raise TaskError(f"unknown template {name!r}{nearest(name, list(templates))} (there are {', '.join(templates)})")
    return templates[name]


def row_id(row: Row, column: str = "idx") -> str:
    """What a row is called: its own id if it has one, otherwise where it stands."""
    return str(row.values.get(column, row.where))


def lettered(texts: Sequence[str]) -> str:
    """A line "A. text" for each, without a line end behind the last."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts))


def letters(n: int) -> tuple[str, ...]:
    """The options " A", " B", ... of a prompt that ends in "Answer:"."""
    return tuple(f" {letter}" for letter in ascii_uppercase[:n])
