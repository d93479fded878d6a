"""Tasks as JSON: what a study keeps of its task, so that a worker elsewhere can score the same examples.

Kept is the data, not the way to it: prompts, options and answers of one split, only those in use under a limit, shots,
and the names of what judges them. Nothing in it is code or a path. What it was made of, all splits included, is known
by the fingerprints that were taken then; a restored task gives them back as they are.

A task that is code of its own (a subclass of the user's, a metric of the user's) cannot be kept so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.study import former_tasks
from moeopt.study.former_tasks import FormerExample
from moeopt.tasks.answers import METRICS, Judge
from moeopt.tasks.base import SPLITS, Example, Task
from moeopt.tasks.generation import GenerationTask
from moeopt.tasks.lm_eval.documents import Chat, Context, Document
from moeopt.tasks.lm_eval.generated import HarnessGenerationTask
from moeopt.tasks.lm_eval.options import HarnessTask
from moeopt.tasks.mixture import MixtureTask
from moeopt.tasks.multiple_choice import MultipleChoiceTask
from moeopt.tasks.own import original
from moeopt.tasks.prompted import PromptedTask
from moeopt.tasks.prompting import Prompting, checked
from moeopt.tasks.splits import Splits
from moeopt.tasks.text import TextTask

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS: dict[str, type[Task]] = {
    "generation": GenerationTask,
    "lm_eval": HarnessTask,
    "lm_eval_generation": HarnessGenerationTask,
    "mixture": MixtureTask,
    "multiple_choice": MultipleChoiceTask,
    "text": TextTask,
    **former_tasks.KINDS,
}
JUDGES: dict[str, Judge] = {**METRICS, **former_tasks.JUDGES}
MOST = 1 << 22
"""Examples of one task that are restored; more is a damaged or hostile study."""

Recorded = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """What of a task is in use: so many examples (windows, for text) of a split, as `Task.requests` takes it."""

    split: str
    tokenizer: Any
    limit: int | None = None
    max_length: int | None = None


def keep(task: Task, use: Use) -> Recorded:
    """The JSON from which `restored` makes a task that scores the examples in use alike.

    Raises:
        TaskError: if the task or what judges its answers is not moeopt's own, saying which.
    """
    kind = next((name for name, kind in KINDS.items() if kind is original(task)), None)
    if kind is None:
        raise TaskError(f"task {task.name!r} is code of its own, {original(task).__name__}")
    body = _KEEP[kind](task, use) if kind in _KEEP else _keep_prompted(task, use)
    prints = {"": task.fingerprint(), use.split: task.fingerprint(use.split)}
    return {"kind": kind, "name": task.name, "facts": task.describe(), "fingerprints": prints, **body}


def restored(record: Any, split: str) -> Task:
    """The task that `keep` wrote down, with the one split; `describe` and `fingerprint` are those of the whole task.

    The published metrics of tasks of lm-evaluation-harness are down to `acc`.

    Raises:
        TaskError: if it is not what `keep` writes.
    """
    try:
        kind, name, facts, prints = (record[key] for key in ("kind", "name", "facts", "fingerprints"))
        if kind not in KINDS:
            raise TaskError(f"this moeopt knows no task of kind {kind!r:.80}")
        _check(split in SPLITS and isinstance(name, str) and isinstance(facts, dict), "name, facts")
        _check(isinstance(prints, dict) and all(isinstance(prints[key], str) for key in ("", split)), "fingerprints")
        task = _RESTORE.get(kind, _restore_prompted)(KINDS[kind], name, split, record)
        return _recorded(task, facts, prints, _weights(record.get("weights")))
    except TaskError as error:
        raise TaskError(f"the task kept in the study cannot be used: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise TaskError(f"the task kept in the study is damaged: {type(error).__name__}: {error!s:.200}") from None


def _keep_prompted(task: Any, use: Use) -> Recorded:
    chosen = list(task._splits.first(use.split, use.limit))
    prompting: Prompting = task._prompting
    body: Recorded = {"template": task.template, "examples": [_written(example) for example in chosen]}
    if prompting != Prompting():
        shots = [_written(shot) for shot in prompting.shots]
        body["prompting"] = {"shots": shots, "chat": prompting.chat, "system": prompting.system}
        body["prompting"]["separator"] = prompting.separator
    if isinstance(task, GenerationTask):
        names = {judge: name for name, judge in reversed(JUDGES.items())}
        for name, judge in task.judges.items():
            if judge not in names:
                raise TaskError(f"task {task.name!r} is judged by code of its own, {name!r}")
        judges = {name: names[judge] for name, judge in task.judges.items()}
        return body | {"judges": judges, "stop": list(task.stop), "max_new_tokens": task.max_new_tokens}
    return body | {"normalise": task.normalise}


def _restore_prompted(kind: Any, name: str, split: str, record: Recorded) -> Task:
    examples = [_read(example) for example in _listed(record["examples"])]
    options: dict[str, Any] = {"template": _text(record["template"])}
    if kind is GenerationTask:
        judges = {_text(key): JUDGES[value] for key, value in record["judges"].items()}
        stop = [_text(text) for text in record["stop"]]
        options |= {"judges": judges, "stop": stop, "max_new_tokens": record["max_new_tokens"]}
    else:
        options["normalise"] = record["normalise"]
    task: PromptedTask = kind(name, **{split: examples}, **options)
    if "prompting" in record:
        how = dict(record["prompting"])
        shots = tuple(_read(shot) for shot in _listed(how.pop("shots")))
        task._prompting = replace(checked(shots=len(shots), **how)[1], shots=shots)
    return task


def _keep_text(task: Any, use: Use) -> Recorded:
    used = {document for _, document, _ in task.windows(use.split, use.tokenizer, use.max_length)[: use.limit]}
    documents = task.examples(use.split)
    return {"window": task.window, "documents": [documents[i].options[0] for i in sorted(used)]}


def _restore_text(kind: Any, name: str, split: str, record: Recorded) -> Task:
    _check(isinstance(record["window"], int), "window")
    documents = [_text(text) for text in _listed(record["documents"])]
    return TextTask(name, **{split: documents}, window=record["window"])


def _keep_mixture(task: Any, use: Use) -> Recorded:
    members: dict[str, Recorded] = {}
    counts = task.counts(use.split, use.tokenizer, use.limit, use.max_length)
    for name, member in task.members.items():
        weights = member.weights(use.split, use.tokenizer, use.max_length)
        runs = [[float(value), len(list(run))] for value, run in groupby(weights)]
        members[name] = {**keep(member, replace(use, limit=max(1, counts[name]))), "weights": runs}
    return {"use": task.use, "shares": task.shares, "members": members}


def _restore_mixture(kind: Any, name: str, split: str, record: Recorded) -> Task:
    members = {_text(key): (restored(member, split), 1.0) for key, member in record["members"].items()}
    shares = record["shares"]
    _check(shares.keys() == members.keys() and all(_positive(share) for share in shares.values()), "shares")
    _check(all("weights" in member for member in record["members"].values()), "weights")
    task = MixtureTask(members, use=record["use"], name=name)
    task.shares = {key: float(shares[key]) for key in members}
    return task


def _keep_harness(task: Any, use: Use) -> Recorded:
    bodies = []
    for example in task._splits.first(use.split, use.limit):
        document = task._documents[example.id]
        pairs = [(_written_context(context), continuation) for context, continuation in document.pairs]
        body = _written(example) | {"task": document.task, "pairs": pairs, "right": document.right}
        body["rule"] = task.rule(document, example)
        lengths = [length for _, length in task._lengths(document, len(example.options))]
        bodies.append(body if set(lengths) == {1.0} else body | {"lengths": lengths})
    return {"examples": bodies, "metric": task.metric}


def _restore_harness(kind: Any, name: str, split: str, record: Recorded) -> Task:
    examples, documents = [], {}
    for body in _listed(record["examples"]):
        example, pairs = _read_document(body)
        right, lengths = tuple(body["right"]), tuple(body.get("lengths", ()))
        _check(bool(right) and all(_index(i, len(example.options)) for i in right), "right")
        _check(len(pairs) >= len(example.options) and body["rule"] in ("choice", "greedy"), "pairs")
        _check(not lengths or (len(lengths) == len(example.options) and all(map(_positive, lengths))), "lengths")
        examples.append(example)
        documents[example.id] = Document(_text(body["task"]), {}, pairs, right, body["rule"], lengths)
    metric = _text(record.get("metric", "acc"))
    return HarnessTask(name, _one_split(name, split, examples), documents, metric=metric)


def _keep_written(task: Any, use: Use) -> Recorded:
    if not task.is_published:
        raise TaskError(f"task {task.name!r} is judged by code of its own, of a task folder")
    bodies = []
    for example in task._splits.first(use.split, use.limit):
        document = task._documents[example.id]
        ((context, _),) = document.pairs
        try:
            doc = json.loads(json.dumps(document.doc))
        except (TypeError, ValueError) as error:
            raise TaskError(f"task {task.name!r} has documents that are no JSON ({error})") from None
        about = {"task": document.task, "context": _written_context(context), "doc": doc}
        bodies.append(_written(example) | about | {"until": document.until, "max_gen_toks": document.max_gen_toks})
    return {"examples": bodies, "metric": task.metric, "version": task.version}


def _restore_written(kind: Any, name: str, split: str, record: Recorded) -> Task:
    examples, documents = [], {}
    for body in _listed(record["examples"]):
        example, pairs = _read_document({**body, "pairs": [(body["context"], body["options"][0])]})
        _check(isinstance(body["doc"], dict) and _index(body["max_gen_toks"] - 1, MOST), "doc")
        examples.append(example)
        documents[example.id] = Document(
            _text(body["task"]),
            body["doc"],
            pairs,
            (0,),
            until=_texts(body["until"]),
            max_gen_toks=body["max_gen_toks"],
        )
    metric, version = _text(record["metric"]), _text(record["version"])
    splits = _one_split(name, split, examples)
    return HarnessGenerationTask(name, splits, documents, metric=metric, version=version)


def _written_context(context: Context) -> Any:
    return context if isinstance(context, str) else {"messages": context.messages, "answered": context.answered}


def _read_context(value: Any) -> Context:
    if not isinstance(value, dict):
        return _text(value)
    messages = tuple((_text(role), _text(content)) for role, content in value["messages"])
    _check(isinstance(value["answered"], bool) and bool(messages), "messages")
    return Chat(messages, value["answered"])


def _read_document(body: Mapping[str, Any]) -> tuple[Example, tuple[tuple[Context, str], ...]]:
    example = _read({key: body[key] for key in body if key in _FIELDS and key not in former_tasks.FIELDS})
    return example, tuple((_read_context(context), _text(text)) for context, text in body["pairs"])


def _one_split(name: str, split: str, examples: Sequence[Example]) -> Splits:
    return Splits(name, **{**dict.fromkeys(SPLITS, ()), split: examples})


_KEEP: dict[str, Callable[[Any, Use], Recorded]] = {
    "lm_eval": _keep_harness,
    "lm_eval_generation": _keep_written,
    "mixture": _keep_mixture,
    "text": _keep_text,
}
_RESTORE: dict[str, Callable[[Any, str, str, Recorded], Task]] = {
    "lm_eval": _restore_harness,
    "lm_eval_generation": _restore_written,
    "mixture": _restore_mixture,
    "text": _restore_text,
}


def _written(example: Example) -> Recorded:
    """An example's fields that are not as by default; of its group nothing, since it has its split."""
    body: Recorded = {"as": "blank"} if type(example) is FormerExample else {}
    for field in fields(example):
        value = getattr(example, field.name)
        if field.name != "group" and (field.default is MISSING or value != field.default):
            body[field.name] = value
    return body


def _read(body: Mapping[str, Any]) -> Example:
    kind = body.get("as", "example")
    if kind not in ("example", *former_tasks.EXAMPLES):
        raise TaskError(f"this moeopt knows no example of kind {kind!r:.80}")
    former = kind in former_tasks.EXAMPLES
    readable = _FIELDS.keys() - (() if former else former_tasks.FIELDS)
    if not former and body.keys() - readable:
        raise TaskError(f"an example has the unknown field {(body.keys() - readable).pop()!r:.80}")
    given = {key: _FIELDS[key](body[key]) for key in body.keys() & readable}
    if former and isinstance(body.get("right"), (list, tuple)):
        _check(all(i < len(given["options"]) for i in given["right"]), "right")
    return FormerExample(**given) if former else Example(**given)


def _text(value: Any) -> str:
    _check(isinstance(value, str), "text")
    return str(value)


def _texts(value: Any) -> tuple[str, ...]:
    _check(isinstance(value, (list, tuple)), "texts")
    return tuple(_text(text) for text in value)


def _indices(value: Any) -> tuple[int, ...]:
    _check(isinstance(value, (list, tuple)) and all(_index(i, MOST) for i in value), "right")
    return tuple(value)


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "id": _text,
    "prompt": _text,
    "options": _texts,
    "answer": lambda value: value,
    "references": lambda value: tuple(_texts(parts) for parts in value),
    "rest": _text,
    "right": _indices,
}


def _listed(value: Any) -> Sequence[Any]:
    _check(isinstance(value, (list, tuple)) and len(value) <= MOST, "examples")
    return value  # type: ignore[no-any-return]


def _index(value: Any, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} of the wrong form")


def _weights(runs: Any) -> NDArray[np.float32] | None:
    """Weights from runs of equal ones, (value, count)."""
    if runs is None:
        return None
    _check(all(_positive(value) and _index(count, MOST) and count for value, count in runs), "weights")
    _check(0 < sum(count for _, count in runs) <= MOST, "weights")
    return np.repeat([value for value, _ in runs], [count for _, count in runs]).astype(np.float32)


def _recorded(task: Task, facts: Recorded, prints: Mapping[str, str], weights: NDArray[np.float32] | None) -> Task:
    """The task, of a subclass of its class that says of the whole task what was recorded."""
    kind = type(task)

    def describe(self: Task) -> Recorded:
        return {**facts}

    def fingerprint(self: Task, split: str | None = None) -> str:
        if (split or "") not in prints:
            raise TaskError(f"of task {self.name!r} the study keeps the split {self.splits[0]!r} only, not {split!r}")
        return prints[split or ""]

    members: dict[str, Any] = {"describe": describe, "fingerprint": fingerprint, "recorded": True, "_original": kind}
    if weights is not None:
        members["weights"] = lambda self, split, tokenizer, max_length=None: weights.copy()
    object.__setattr__(task, "__class__", type(kind.__name__, (kind,), members))
    return task
