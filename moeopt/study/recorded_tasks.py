"""Tasks as JSON: what a study keeps of its task, so that a worker elsewhere can score the same examples.

Kept is the data, not the way to it: prompts, options and answers of one split, only those in use under a limit, shots,
and the names of what judges them. Nothing in it is code or a path. What it was made of, all splits included, is known
by the fingerprints that were taken then; a restored task gives them back as they are.

A task that is code of its own (a subclass of the user's, a metric of the user's) cannot be kept so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from moeopt.errors import TaskError
from moeopt.tasks import drop, gsm8k, math_problems, squad
from moeopt.tasks.answers import METRICS, Judge
from moeopt.tasks.base import SPLITS, Example, Task
from moeopt.tasks.cb import CbTask
from moeopt.tasks.generation import GenerationTask
from moeopt.tasks.lm_eval.documents import Document
from moeopt.tasks.lm_eval.task import HarnessTask
from moeopt.tasks.mixture import MixtureTask
from moeopt.tasks.mmlu import MmluTask, Question
from moeopt.tasks.mmlu_subjects import CATEGORY
from moeopt.tasks.multiple_choice import MultipleChoiceTask
from moeopt.tasks.multirc import Answer, MultiRCTask
from moeopt.tasks.own import original
from moeopt.tasks.prompted import PromptedTask
from moeopt.tasks.prompting import Prompting, checked
from moeopt.tasks.record import Query, RecordTask
from moeopt.tasks.splits import Splits
from moeopt.tasks.text import TextTask
from moeopt.tasks.winogrande import Blank, WinograndeTask

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS: dict[str, type[Task]] = {
    "cb": CbTask,
    "generation": GenerationTask,
    "lm_eval": HarnessTask,
    "mixture": MixtureTask,
    "mmlu": MmluTask,
    "multiple_choice": MultipleChoiceTask,
    "multirc": MultiRCTask,
    "record": RecordTask,
    "text": TextTask,
    "winogrande": WinograndeTask,
}
EXAMPLES: dict[str, type[Example]] = {
    "example": Example,
    "answer": Answer,
    "blank": Blank,
    "query": Query,
    "question": Question,
}
JUDGES: dict[str, Judge] = {
    **METRICS,
    **{f"drop.{name}": judge for name, judge in drop.OFFICIAL.items()},
    "gsm8k.flexible_extract": gsm8k.flexible_extract,
    "gsm8k.strict_match": gsm8k.strict_match,
    "math.exact_match": math_problems.exact_match,
    "squad.contains": squad.contains,
}
MOST = 1 << 22
"""Examples of one task that are restored; more is a damaged or hostile study."""

Kept = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """What of a task is in use: so many examples (windows, for text) of a split, as `Task.requests` takes it."""

    split: str
    tokenizer: Any
    limit: int | None = None
    max_length: int | None = None


def keep(task: Task, use: Use) -> Kept:
    """The JSON from which `restored` makes a task that scores the examples in use alike.

    Raises:
        TaskError: if the task or what judges its answers is not moeopt's own, saying which.
    """
    kind = next((name for name, known in KINDS.items() if known is original(task)), None)
    if kind is None:
        raise TaskError(f"task {task.name!r} is code of its own, {original(task).__name__}")
    body = _KEEP[kind](task, use) if kind in _KEEP else _keep_prompted(task, use)
    prints = {"": task.fingerprint(), use.split: task.fingerprint(use.split)}
    return {"kind": kind, "name": task.name, "facts": task.describe(), "fingerprints": prints, **body}


def restored(kept: Any, split: str) -> Task:
    """The task that `keep` wrote down, with the one split; `describe` and `fingerprint` are those of the whole task.

    The published metrics of tasks of lm-evaluation-harness are down to `acc`.

    Raises:
        TaskError: if it is not what `keep` writes.
    """
    try:
        kind, name, facts, prints = (kept[key] for key in ("kind", "name", "facts", "fingerprints"))
        if kind not in KINDS:
            raise TaskError(f"this moeopt knows no task of kind {kind!r:.80}")
        _check(split in SPLITS and isinstance(name, str) and isinstance(facts, dict), "name, facts")
        _check(isinstance(prints, dict) and all(isinstance(prints[key], str) for key in ("", split)), "fingerprints")
        task = _RESTORE.get(kind, _restore_prompted)(KINDS[kind], name, split, kept)
        return _recorded(task, facts, prints, _weights(kept.get("weights")))
    except TaskError as error:
        raise TaskError(f"the task kept in the study cannot be used: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise TaskError(f"the task kept in the study is damaged: {type(error).__name__}: {error!s:.200}") from None


def _keep_prompted(task: Any, use: Use) -> Kept:
    chosen = list(task._splits.first(use.split, use.limit))
    if isinstance(task, MultiRCTask):  # its EM asks whether all answers to a question are among those evaluated
        asked = {example.question for example in chosen if isinstance(example, Answer)}
        rest = task.examples(use.split)[len(chosen) :]
        chosen += [example for example in rest if isinstance(example, Answer) and example.question in asked]
    prompting: Prompting = task._prompting
    body: Kept = {"template": task.template, "examples": [_written(example) for example in chosen]}
    if prompting != Prompting():
        shots = [_written(shot) for shot in prompting.shots]
        body["prompting"] = {"shots": shots, "chat": prompting.chat, "system": prompting.system}
        body["prompting"]["separator"] = prompting.separator
    if isinstance(task, GenerationTask):
        known = {judge: name for name, judge in reversed(JUDGES.items())}
        for name, judge in task.judges.items():
            if judge not in known:
                raise TaskError(f"task {task.name!r} is judged by code of its own, {name!r}")
        judges = {name: known[judge] for name, judge in task.judges.items()}
        return body | {"judges": judges, "stop": list(task.stop), "max_new_tokens": task.max_new_tokens}
    return body | {"normalise": task.normalise}


def _restore_prompted(kind: Any, name: str, split: str, kept: Kept) -> Task:
    examples = [_read(example) for example in _listed(kept["examples"])]
    options: dict[str, Any] = {"template": _text(kept["template"])}
    if kind is GenerationTask:
        judges = {_text(key): JUDGES[value] for key, value in kept["judges"].items()}
        stop = [_text(text) for text in kept["stop"]]
        options |= {"judges": judges, "stop": stop, "max_new_tokens": kept["max_new_tokens"]}
    else:
        options["normalise"] = kept["normalise"]
    task: PromptedTask = kind(name, **{split: examples}, **options)
    if "prompting" in kept:
        how = dict(kept["prompting"])
        shots = tuple(_read(shot) for shot in _listed(how.pop("shots")))
        task._prompting = replace(checked(shots=len(shots), **how)[1], shots=shots)
    return task


def _keep_text(task: Any, use: Use) -> Kept:
    used = {document for _, document, _ in task.windows(use.split, use.tokenizer, use.max_length)[: use.limit]}
    documents = task.examples(use.split)
    return {"window": task.window, "documents": [documents[i].options[0] for i in sorted(used)]}


def _restore_text(kind: Any, name: str, split: str, kept: Kept) -> Task:
    _check(isinstance(kept["window"], int), "window")
    documents = [_text(text) for text in _listed(kept["documents"])]
    return TextTask(name, **{split: documents}, window=kept["window"])


def _keep_mixture(task: Any, use: Use) -> Kept:
    members: dict[str, Kept] = {}
    counts = task.counts(use.split, use.tokenizer, use.limit, use.max_length)
    for name, member in task.members.items():
        weights = member.weights(use.split, use.tokenizer, use.max_length)
        runs = [[float(value), len(list(run))] for value, run in groupby(weights)]
        members[name] = {**keep(member, replace(use, limit=max(1, counts[name]))), "weights": runs}
    return {"use": task.use, "shares": task.shares, "members": members}


def _restore_mixture(kind: Any, name: str, split: str, kept: Kept) -> Task:
    members = {_text(key): (restored(member, split), 1.0) for key, member in kept["members"].items()}
    shares = kept["shares"]
    _check(shares.keys() == members.keys() and all(_positive(share) for share in shares.values()), "shares")
    _check(all("weights" in member for member in kept["members"].values()), "weights")
    task = MixtureTask(members, use=kept["use"], name=name)
    task.shares = {key: float(shares[key]) for key in members}
    return task


def _keep_harness(task: Any, use: Use) -> Kept:
    chosen = task._splits.first(use.split, use.limit)
    documents = [task._documents[example.id] for example in chosen]
    bodies = [
        {"task": document.task, "pairs": document.pairs, "right": document.right, "rule": task.rule(document, example)}
        for example, document in zip(chosen, documents)
    ]
    return {"examples": [_written(example) | body for example, body in zip(chosen, bodies)]}


def _restore_harness(kind: Any, name: str, split: str, kept: Kept) -> Task:
    examples, documents = [], {}
    for one in _listed(kept["examples"]):
        example = _read({key: one[key] for key in one if key not in ("task", "pairs", "right", "rule")})
        pairs = tuple((_text(context), _text(continuation)) for context, continuation in one["pairs"])
        right = tuple(one["right"])
        _check(bool(right) and all(_index(i, len(example.options)) for i in right), "right")
        _check(len(pairs) >= len(example.options) and one["rule"] in ("choice", "greedy"), "pairs")
        examples.append(example)
        documents[example.id] = Document(_text(one["task"]), {}, pairs, right, one["rule"])
    return HarnessTask.of_documents(name, Splits(name, **{**dict.fromkeys(SPLITS, ()), split: examples}), documents)


_KEEP: dict[str, Callable[[Any, Use], Kept]] = {
    "lm_eval": _keep_harness,
    "mixture": _keep_mixture,
    "text": _keep_text,
}
_RESTORE: dict[str, Callable[[Any, str, str, Kept], Task]] = {
    "lm_eval": _restore_harness,
    "mixture": _restore_mixture,
    "text": _restore_text,
}


def _written(example: Example) -> Kept:
    """An example's fields that are not as by default; of its group nothing, since it has its split."""
    body: Kept = {"as": next(name for name, kind in EXAMPLES.items() if kind is type(example))}
    for one in fields(example):
        value = getattr(example, one.name)
        if one.name != "group" and (one.default is MISSING or value != one.default):
            body[one.name] = value
    return body if body["as"] != "example" else {key: value for key, value in body.items() if key != "as"}


def _read(body: Mapping[str, Any]) -> Example:
    kind = EXAMPLES[body.get("as", "example")]
    given = {key: _FIELDS[key](value) for key, value in body.items() if key != "as"}
    example = kind(**given)
    if isinstance(example, Query):
        count = len(example.options)
        _check(len(example.entities) == count and bool(example.gold) and bool(example.right), "entities")
        _check(all(i < count for i in example.right), "right")
    return example


def _text(value: Any) -> str:
    _check(isinstance(value, str), "text")
    return str(value)


def _texts(value: Any) -> tuple[str, ...]:
    _check(isinstance(value, (list, tuple)), "texts")
    return tuple(_text(text) for text in value)


def _subject(value: Any) -> str:
    _check(value in CATEGORY, "subject")
    return str(value)


def _indices(value: Any) -> tuple[int, ...]:
    _check(isinstance(value, (list, tuple)) and all(_index(i, MOST) for i in value), "right")
    return tuple(value)


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "id": _text,
    "prompt": _text,
    "options": _texts,
    "answer": lambda value: value,
    "references": lambda value: tuple(_texts(parts) for parts in value),
    "question": _texts,
    "rest": _text,
    "entities": _texts,
    "gold": _texts,
    "right": _indices,
    "subject": _subject,
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


def _recorded(task: Task, facts: Kept, prints: Mapping[str, str], weights: NDArray[np.float32] | None) -> Task:
    """The task, of a subclass of its class that says of the whole task what was recorded."""
    kind = type(task)

    def describe(self: Task) -> Kept:
        return {**facts}

    def fingerprint(self: Task, split: str | None = None) -> str:
        if (split or "") not in prints:
            raise TaskError(f"of task {self.name!r} the study keeps the split {self.splits[0]!r} only, not {split!r}")
        return prints[split or ""]

    members: dict[str, Any] = {"describe": describe, "fingerprint": fingerprint, "kept": True, "_original": kind}
    if weights is not None:
        members["weights"] = lambda self, split, tokenizer, max_length=None: weights.copy()
    object.__setattr__(task, "__class__", type(kind.__name__, (kind,), members))
    return task
