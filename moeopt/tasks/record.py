"""ReCoRD (Zhang et al. 2018, arXiv 1810.12885; part of SuperGLUE): which entity of a news text fills a gap?

    {"passage": "The harrowing stories of women and children locked up in Albania.\\n@highlight\\nAmnesty has a report",
     "query": "The charity @placeholder spoke to 100 of them", "entities": ["Albania", "Amnesty"],
     "answers": ["Amnesty"], "idx": {"passage": 0, "query": 0}}

becomes, with `template="harness"` (lm-evaluation-harness 0.4, `record`; an option is the query with an entity in it, in
alphabetical order, with the harness's three spaces before the dash):

    The harrowing stories of women and children locked up in Albania.

      - Amnesty has a report.
       - The charity Amnesty spoke to 100 of them

and with `template="eep"` (the prompt of EEP, arXiv 2407.00945, there answered by generation; an option is " " and an
entity):

    Passage: The harrowing stories of women and children locked up in Albania.

    Amnesty has a report
    Result: The charity ____ spoke to 100 of them
    Question: What entity does ____ refer to in the result? Give me the entity name: Amnesty

All of an option is scored. Every entity that equals one of the gold answers after SQuAD's normalisation is right: the
loss is that of the likeliest of them. Published are EM and the F1 of the chosen entity's words, each against the best
gold answer. The queries of a passage stay in one split. SuperGLUE's own files have a line for each passage, with the
places of its entities and the queries inside.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks.answers import f1, normalised
from moeopt.tasks.base import Example, Scores
from moeopt.tasks.benchmark import Benchmark
from moeopt.tasks.multiple_choice import MultipleChoiceTask
from moeopt.tasks.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, kw_only=True)
class Query(Example):
    """An example with the entity of each option, the gold answers, and every option that is right."""

    entities: tuple[str, ...]
    gold: tuple[str, ...]
    right: tuple[int, ...]

    def f1(self, option: int) -> float:
        """The F1 of an option's entity against the best gold answer."""
        return f1(self.entities[option], [(answer,) for answer in self.gold])


class RecordTask(MultipleChoiceTask):
    """ReCoRD, with EM and token F1."""

    metric = "em"

    def right(self, example: Example) -> tuple[int, ...]:
        return example.right if isinstance(example, Query) else super().right(example)

    def metrics(self, split: str, scores: Scores) -> dict[str, float]:
        found = super().metrics(split, scores)
        if scores.chosen is None:
            return found
        queries = [example for example in self.examples(split) if isinstance(example, Query)]
        return found | {"f1": float(np.mean([query.f1(int(chosen)) for query, chosen in zip(queries, scores.chosen)]))}

    def fingerprint(self, split: str | None = None) -> str:
        examples = [e for s in self.splits if split in (None, s) for e in self.examples(s)]
        gold = [example.gold for example in examples if isinstance(example, Query)]
        return hashlib.sha256(json.dumps([super().fingerprint(split), gold]).encode()).hexdigest()


def flat(row: Row) -> Iterator[Row]:
    """A row for each query, as on the hub, from SuperGLUE's line for each passage."""
    if isinstance(row["passage"], str):
        yield row
        return
    passage = row.inner("passage")
    text = passage.text("text")
    entities = {text[span.number("start") : span.number("end") + 1] for span in passage.inners("entities")}
    for number, query in enumerate(row.inners("qas")):
        gold = query.inners("answers") if "answers" in query.values else []
        yield Row(
            query.where,
            {
                "passage": text,
                "query": query.text("query"),
                "entities": sorted(entities),
                "answers": sorted({answer.text("text") for answer in gold}),
                "idx": {"passage": row.values.get("idx"), "query": number},
            },
        )


def harness(row: Row) -> Example:
    first, *highlights = row.text("passage").strip().split("\n@highlight\n")
    prompt = f"{first}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)
    query = row.text("query")
    return _example(row, prompt, lambda entity: f"   - {query}".replace("@placeholder", entity))


def eep(row: Row) -> Example:
    passage = row.text("passage").replace("@highlight", "")
    query = row.text("query").replace("@placeholder", "____")
    prompt = (
        f"Passage: {passage}\nResult: {query}\n"
        "Question: What entity does ____ refer to in the result? Give me the entity name:"
    )
    return _example(row, prompt, lambda entity: f" {entity}")


def _example(row: Row, prompt: str, option: Callable[[str], str]) -> Query:
    entities, gold = sorted(set(row.texts("entities"))), sorted(set(row.texts("answers")))
    wanted = {normalised(answer) for answer in gold}
    right = tuple(i for i, entity in enumerate(entities) if normalised(entity) in wanted)
    if not right:
        raise TaskError(f"{row.where}: none of 'answers' {gold!r} is one of 'entities' {entities!r}")
    return Query(
        row.where,
        prompt,
        tuple(map(option, entities)),
        right[0],
        group=row.text("passage"),
        entities=tuple(entities),
        gold=tuple(gold),
        right=right,
    )


record_task = Benchmark(
    "record",
    hub="aps/super_glue",
    configs={"super_glue": "record"},
    labels=("answers",),
    templates={"harness": harness, "eep": eep},
    expand=flat,
    task=RecordTask,
)
