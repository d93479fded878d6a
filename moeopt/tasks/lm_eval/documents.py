"""Documents of lm-evaluation-harness as examples: their texts, the right options, and the shots before them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from moeopt.errors import TaskError
from moeopt.tasks.base import Example
from moeopt.tasks.lm_eval.data_sets import SEARCHED, ties
from moeopt.tasks.lm_eval.loading import SEED
from moeopt.tasks.prompting import templated
from moeopt.tasks.rows import Row, grouped, is_label, sources
from moeopt.tasks.splits import divide_given

ROLES = {"train": "training", "validation": "validation", "test": "test"}
"""A data set's own splits, and what the harness calls them."""


@dataclass(frozen=True)
class Chat:
    """A context that is messages, (role, content), of a chat; a tokenizer's template writes it.

    `answered` is whether the last message is the beginning of the answer.
    """

    messages: tuple[tuple[str, str], ...]
    answered: bool = False

    def text(self, tokenizer: Any) -> str:
        """What the model reads; raises `TaskError` if the tokenizer's template does not take the messages."""
        how = {"continue_final_message": True} if self.answered else {"add_generation_prompt": True}
        return templated(tokenizer, [{"role": role, "content": content} for role, content in self.messages], **how)


Context = str | Chat
Pair = tuple[Context, str]
"""A context and its continuation, as the harness scores them."""


@dataclass(frozen=True)
class PromptOptions:
    """How contexts are written, by the harness's names; examples are turns of a chat unless `fewshot_as_multiturn` is
    False."""

    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None

    def __post_init__(self) -> None:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise TaskError("fewshot_as_multiturn is of chats: it needs apply_chat_template=True")
        if self.fewshot_as_multiturn is None:
            object.__setattr__(self, "fewshot_as_multiturn", self.apply_chat_template)
        for name in ("apply_chat_template", "fewshot_as_multiturn"):
            if not isinstance(getattr(self, name), bool):
                raise TaskError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.system_instruction is not None and not str(self.system_instruction).strip():
            raise TaskError(f"system_instruction must be a text, got {self.system_instruction!r}")

    def describe(self) -> dict[str, Any]:
        """JSON facts under "prompting"; nothing for prompts as the task has them."""
        facts: dict[str, Any] = {}
        if self.apply_chat_template:
            facts = {"apply_chat_template": True, "fewshot_as_multiturn": self.fewshot_as_multiturn}
        if self.system_instruction is not None:
            facts["system_instruction"] = self.system_instruction
        return {"prompting": facts} if facts else {}


@dataclass(frozen=True, eq=False)
class Document:
    """A document of the harness: the task it belongs to, what is scored, and which of the options are right.

    `rule` says when a document whose task is not at hand counts as right: "choice", when a right option is chosen, or
    "greedy", when greedy decoding writes the first one; `lengths` is then what the log-likelihoods of the
    options are divided by before they are compared, if anything. Of an answer that is generated, `until` are the texts
    that end it, and it has at most `max_gen_toks` tokens; the option is the reference.
    """

    task: str
    doc: Mapping[str, Any]
    pairs: tuple[Pair, ...]
    right: tuple[int, ...]
    rule: str | None = None
    lengths: tuple[float, ...] = ()
    until: tuple[str, ...] = ()
    max_gen_toks: int = 0


class Reader:
    """One task of the harness, read into examples.

    Args:
        name, leaf: the task's name and the harness's own object.
        prompts: how contexts are written.

    Attributes:
        documents: of the examples, by their ids.
        origin: which split was read from where, in words.
    """

    def __init__(self, name: str, leaf: Any, prompts: PromptOptions) -> None:
        self.name, self.leaf, self.prompts = name, leaf, prompts
        self.documents: dict[str, Document] = {}
        self.origin = ""

    def parts(self, fractions: Sequence[float], most: int | None) -> dict[str, list[Example]]:
        """The examples by split."""
        name, leaf = self.name, self.leaf
        searched = SEARCHED.get(leaf.DATASET_PATH)
        if searched in leaf.dataset and leaf.get_config("validation_split") is None:
            leaf.set_config("validation_split", searched)
        split_of_source = {leaf.get_config(f"{role}_split"): split for split, role in ROLES.items()}
        docs_of = {
            split: {
                f"{name} {split} {i}": doc
                for i, doc in enumerate(islice(getattr(leaf, f"{ROLES[split]}_docs")(), most))
            }
            for source, split in split_of_source.items()
            if source is not None
        }
        plain = {
            split: [example for key, doc in docs.items() if (example := self._example(key, doc, 0, PromptOptions()))]
            for split, docs in docs_of.items()
        }
        total, read = (sum(map(len, parts.values())) for parts in (docs_of, plain))
        if not read:
            raise TaskError(f"lm_eval task {name!r}: no document has a label")
        if read < total:
            warnings.warn(
                f"task {name!r}: left out {total - read:,} of {total:,} documents without label", stacklevel=4
            )
        parts = divide_given({split: examples for split, examples in plain.items() if examples}, fractions, name)
        shots = int(leaf.get_config("num_fewshot"))
        self.origin = sources(
            {split: f"the {leaf.get_config(f'{ROLES[split]}_split')} documents" for split in docs_of if plain[split]}
        )
        return self._prompted(shots, docs_of, parts) if shots or self.prompts != PromptOptions() else parts

    def _prompted(
        self, shots: int, docs_of: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Sequence[Example]]
    ) -> dict[str, list[Example]]:
        """The same examples with their whole prompts: those of test with the shots that the harness draws for them."""
        name, leaf = self.name, self.leaf
        sampler, pool = leaf.sampler, list(leaf.sampler.df)
        leaf.set_fewshot_seed(SEED)
        evaluated = docs_of.get("test") or docs_of["validation"]
        drawn = {key: self._example(key, doc, shots, self.prompts) for key, doc in evaluated.items()}
        prompted = {"test": [example for e in parts["test"] if (example := drawn.get(e.id))]}
        split_of = {_key(doc): "left out" for docs in docs_of.values() for doc in docs.values()}
        split_of |= {_key(self.documents[e.id].doc): split for split, examples in parts.items() for e in examples}
        try:
            for split, later in (("search", ("dev", "test")), ("dev", ("test",))):
                shown = [doc for doc in pool if split_of.get(_key(doc)) not in (*later, "left out")]
                asked = {_key(doc) for doc in shown} & {_key(self.documents[e.id].doc) for e in parts[split]}
                if shots and parts[split] and len(shown) < shots + bool(asked):
                    raise TaskError(
                        f"lm_eval task {name!r} has too few documents outside {' and '.join(later)} to show {shots} of"
                        f" them in the prompts of {split} ({len(shown)}): lower num_fewshot"
                    )
                sampler.replace_df(shown)
                leaf.set_fewshot_seed(SEED)
                leaf.sampler = _WithoutOwn(sampler, asked)
                prompted[split] = []
                for example in parts[split]:
                    doc = leaf.sampler.doc = self.documents[example.id].doc
                    whole = self._example(example.id, doc, shots, self.prompts)
                    assert whole is not None
                    prompted[split].append(whole)
                leaf.sampler = sampler
        finally:
            leaf.sampler = sampler.replace_df(pool)
        return prompted

    def _example(self, key: str, doc: Any, shots: int, prompts: PromptOptions) -> Example | None:
        """The example of a document, which is remembered; None if it has no label."""
        name, leaf, chat = self.name, self.leaf, prompts.apply_chat_template
        context = leaf.fewshot_context(
            doc,
            num_fewshot=shots,
            system_instruction=prompts.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=prompts.fewshot_as_multiturn,
            chat_template=_chat if chat else None,
            gen_prefix=leaf.doc_to_prefix(doc),
        )
        built = leaf.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(name, 0, 1),
            apply_chat_template=chat,
            chat_template=_chat if chat else None,
        )
        instances = built if isinstance(built, list) else [built]
        if leaf.OUTPUT_TYPE == "generate_until":
            (instance,) = instances
            settings = instance.args[1]
            until = settings.get("until", ())
            answer = self._reference(doc, chat)
            self.documents[key] = Document(
                name,
                doc,
                ((instance.args[0], answer),),
                (0,),
                until=(until,) if isinstance(until, str) else tuple(until),
                max_gen_toks=int(settings.get("max_gen_toks", 256)),
            )
            return grouped(Example(key, _text(instance.args[0]), (answer,), 0, ties(doc)), Row(key, doc))
        pairs = tuple((instance.args[0], str(instance.args[1])) for instance in instances)
        choices = [pairs[0][1]] if leaf.OUTPUT_TYPE == "loglikelihood" else leaf.doc_to_choice(doc)
        right = (0,) if leaf.OUTPUT_TYPE == "loglikelihood" else _right(leaf, doc, choices)
        if right is None:
            return None
        if not right:
            raise TaskError(f"lm_eval task {name!r}: {key!r} has no right option among {choices!r}: {doc!r}")
        self.documents[key] = Document(name, doc, pairs, right)
        contexts, continuations = zip(*pairs[: len(choices)])
        if len({_text(context) for context in contexts}) == 1:
            example = Example(key, _text(contexts[0]), continuations, right[0], ties(doc))
        else:
            whole = tuple(_text(a) + b for a, b in zip(contexts, continuations))
            example = Example(key, "", whole, right[0], ties(doc))
        return grouped(example, Row(key, doc))

    def _reference(self, doc: Any, chat: bool) -> str:
        """The answer to a document as a text that continues its context."""
        leaf, target = self.leaf, self.leaf.doc_to_target(doc)
        prefix, delimiter = leaf.doc_to_prefix(doc), leaf.config.target_delimiter
        if self.name == "drop":  # whose own template joins the names of the answer's columns
            target, delimiter = ", ".join(doc["answers"][0]), " "
        if isinstance(target, int) and leaf.config.doc_to_choice is not None:
            target = leaf.doc_to_choice(doc)[target]
        target = str(target[0] if isinstance(target, (list, tuple)) else target)
        if prefix:
            return target if prefix[-1:].isspace() else f" {target}"
        return target if chat else f"{delimiter}{target}"


class _WithoutOwn:
    """A few-shot sampler of the harness that never draws `doc`, the document that the prompt asks about."""

    def __init__(self, sampler: Any, keys: set[str]) -> None:
        self.sampler, self.keys, self.doc = sampler, keys, None

    def sample(self, n: int, **_: Any) -> Any:
        return self.sampler.sample(n, eval_doc=self.doc if _key(self.doc) in self.keys else None)


def _chat(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> Chat:
    """What the harness is given for a chat template, as the tokenizer is not known yet."""
    return Chat(tuple((message["role"], message["content"]) for message in messages), not add_generation_prompt)


def _text(context: Context) -> str:
    """A context as the prompt of an example."""
    return context if isinstance(context, str) else json.dumps(context.messages, ensure_ascii=False)


def _key(doc: Any) -> str:
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=repr).encode()).hexdigest()


def _right(leaf: Any, doc: Any, choices: Sequence[str]) -> tuple[int, ...] | None:
    """The right options: all that the harness counts as such; None if there is no label."""
    gold = leaf.doc_to_text(doc) if leaf.multiple_input else leaf.doc_to_target(doc)
    if isinstance(gold, str) and gold in choices:
        return (choices.index(gold),)
    if not is_label(gold):
        return None
    if isinstance(gold, str):
        return ()
    return tuple(int(g) for g in (gold if isinstance(gold, list) else [gold]) if 0 <= g < len(choices))
