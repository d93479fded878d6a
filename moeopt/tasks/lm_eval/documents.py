"""Documents of lm-evaluation-harness as examples: their texts, the right options, and the shots before them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from moeopt.errors import TaskError
from moeopt.tasks.base import Example
from moeopt.tasks.lm_eval.loading import SEED
from moeopt.tasks.rows import Row, grouped, sources
from moeopt.tasks.splits import from_own

PASSAGES = ("passage", "paragraph", "article", "premise", "context", "support")
"""Columns that hold what several questions may be about."""
Pair = tuple[str, str]
"""A context and its continuation, as the harness scores them."""


@dataclass(frozen=True, eq=False)
class Document:
    """A document of the harness: the task it belongs to, what is scored, and which of the options are right.

    `rule` says when a document whose task is not at hand counts as right: "choice", when a right option is chosen, or
    "greedy", when greedy decoding writes the first one.
    """

    task: str
    doc: Mapping[str, Any]
    pairs: tuple[Pair, ...]
    right: tuple[int, ...]
    rule: str | None = None


class Reader:
    """One task of the harness, read into examples.

    Args:
        name, leaf: the task's name and the harness's own object.

    Attributes:
        documents: of the examples, by their ids.
        origin: which split was read from where, in words.
    """

    def __init__(self, name: str, leaf: Any) -> None:
        self.name, self.leaf = name, leaf
        self.documents: dict[str, Document] = {}
        self.origin = ""

    def parts(self, fractions: Sequence[float], most: int | None) -> dict[str, list[Example]]:
        """The examples by split."""
        name, leaf = self.name, self.leaf
        roles = {"train": "training", "validation": "validation", "test": "test"}
        split_of_source = {leaf.get_config(f"{role}_split"): own for own, role in roles.items()}
        own = {
            split: {
                f"{name} {split} {i}": doc
                for i, doc in enumerate(islice(getattr(leaf, f"{roles[split]}_docs")(), most))
            }
            for source, split in split_of_source.items()
            if source is not None
        }
        plain = {split: [self._example(key, doc, 0) for key, doc in docs.items()] for split, docs in own.items()}
        parts = from_own(plain, fractions, name)
        shots = int(leaf.get_config("num_fewshot"))
        self.origin = sources({split: f"the {leaf.get_config(f'{roles[split]}_split')} documents" for split in own})
        return self._with_shots(shots, own, parts) if shots else parts

    def _with_shots(
        self, shots: int, own: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Sequence[Example]]
    ) -> dict[str, list[Example]]:
        """The same examples with few-shot prompts: those of test as the harness draws them for all it evaluates."""
        name, leaf = self.name, self.leaf
        sampler, pool = leaf.sampler, list(leaf.sampler.df)
        leaf.set_fewshot_seed(SEED)
        evaluated = own.get("test") or own["validation"]
        drawn = {key: self._example(key, doc, shots) for key, doc in evaluated.items()}
        found = {"test": [drawn[example.id] for example in parts["test"]]}
        split_of = {_key(doc): "left out" for docs in own.values() for doc in docs.values()}
        split_of |= {_key(self.documents[e.id].doc): split for split, examples in parts.items() for e in examples}
        try:
            for split, later in (("search", ("dev", "test")), ("dev", ("test",))):
                shown = [doc for doc in pool if split_of.get(_key(doc)) not in (*later, "left out")]
                asked = {_key(doc) for doc in shown} & {_key(self.documents[e.id].doc) for e in parts[split]}
                if parts[split] and len(shown) < shots + bool(asked):
                    raise TaskError(
                        f"lm_eval task {name!r} has too few documents outside {' and '.join(later)} to show {shots} of"
                        f" them in the prompts of {split} ({len(shown)}): lower num_fewshot"
                    )
                sampler.replace_df(shown)
                leaf.set_fewshot_seed(SEED)
                leaf.sampler = _WithoutOwn(sampler, asked)
                found[split] = []
                for example in parts[split]:
                    doc = leaf.sampler.doc = self.documents[example.id].doc
                    found[split].append(self._example(example.id, doc, shots))
                leaf.sampler = sampler
        finally:
            leaf.sampler = sampler.replace_df(pool)
        return found

    def _example(self, key: str, doc: Any, shots: int) -> Example:
        name, leaf = self.name, self.leaf
        context = leaf.fewshot_context(doc, num_fewshot=shots, gen_prefix=leaf.doc_to_prefix(doc))
        built = leaf.construct_requests(
            doc=doc, ctx=context, metadata=(name, 0, 1), apply_chat_template=False, chat_template=None
        )
        pairs = tuple((str(one.args[0]), str(one.args[1])) for one in (built if isinstance(built, list) else [built]))
        choices = [pairs[0][1]] if leaf.OUTPUT_TYPE == "loglikelihood" else leaf.doc_to_choice(doc)
        right = (0,) if leaf.OUTPUT_TYPE == "loglikelihood" else _right(leaf, doc, choices)
        if not right:
            raise TaskError(f"lm_eval task {name!r}: {key!r} has no right option among {choices!r}: {doc!r}")
        self.documents[key] = Document(name, doc, pairs, right)
        contexts, continuations = zip(*pairs[: len(choices)])
        if len(set(contexts)) == 1:
            example = Example(key, contexts[0], continuations, right[0], _passages(doc))
        else:
            whole = tuple(a + b for a, b in zip(contexts, continuations))
            example = Example(key, "", whole, right[0], _passages(doc))
        return grouped(example, Row(key, doc))


class _WithoutOwn:
    """A few-shot sampler of the harness that never draws `doc`, the document that the prompt asks about."""

    def __init__(self, sampler: Any, keys: set[str]) -> None:
        self.sampler, self.keys, self.doc = sampler, keys, None

    def sample(self, n: int, **_: Any) -> Any:
        return self.sampler.sample(n, eval_doc=self.doc if _key(self.doc) in self.keys else None)


def _passages(doc: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(doc[column] for column in PASSAGES if isinstance(doc.get(column), str))


def _key(doc: Any) -> str:
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=repr).encode()).hexdigest()


def _right(leaf: Any, doc: Any, choices: Sequence[str]) -> tuple[int, ...]:
    """The right options: all that the harness counts as such."""
    gold = leaf.doc_to_text(doc) if leaf.multiple_input else leaf.doc_to_target(doc)
    if isinstance(gold, str):
        return (choices.index(gold),) if gold in choices else ()
    return tuple(int(g) for g in (gold if isinstance(gold, list) else [gold]) if 0 <= g < len(choices))
