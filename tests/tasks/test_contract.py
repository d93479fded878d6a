"""What every kind of task must hold. A new kind is one line of `KINDS`: how to make it, in an empty folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows_of import GENERATED, MAKE, apart, chatting, rows_of, write
from tokenizer_kinds import small

import moeopt
from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.study.recorded_tasks import Use, keep, restored
from moeopt.tasks import GenerationTask, MixtureTask, Task, TextTask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of prompts that are cut, examples left out

TEXTS = [f"document {i} has {word} and then " + "some more words " * (i % 4 + 1) for i in range(12) for word in "ab"]
PAIRS = """
from moeopt.tasks import Example, MultipleChoiceTask

def sums(top: int = 20) -> MultipleChoiceTask:
    rows = [(a, b) for a in range(10, top) for b in range(10, top)]
    return MultipleChoiceTask.from_rows(
        "sums", rows, lambda r: Example(f"{r}", f"{r[0]}+{r[1]}=", (f"{sum(r)}", f"{sum(r) + 1}"), 0)
    )
"""


def rows_task(folder: Path, name: str, **options: Any) -> Task:
    """Of a file of rows, by the registry; published tasks of the harness, and EEP's, among them."""
    rows = [{"prompt": f"{i}:", "options": [" a", " b", " c"], "answer": " b" if i % 3 else " a"} for i in range(80)]
    if name not in tasks.REGISTRY:
        written = name.removeprefix("eep_") in GENERATED
        rows, options = rows_of(name, 40 if written else 80), ({"num_fewshot": 0} if written else {}) | options
    return tasks.get(name, write(folder / f"{name}.jsonl", rows), **options)


def own_task(folder: Path) -> Task:
    (folder / "pairs.py").write_text(PAIRS)
    return tasks.get(f"{folder}/pairs.py:sums")


def mixture(folder: Path, use: str) -> Task:
    """Of every kind, mixtures among them."""
    inner = MixtureTask({"t": (KINDS["text"](folder), 2), "s": (KINDS["published, generated"](folder), 1)})
    members = {"c": (VARIANTS["multiple choice, shots"](folder), 1), "o": (KINDS["published, options"](folder), 3)}
    return MixtureTask({**members, "i": (inner, 1.1)}, use=use)  # type: ignore[arg-type]


KINDS: dict[str, Callable[[Path], Task]] = {
    "multiple choice": lambda folder: rows_task(folder, "multiple_choice", normalise="characters"),
    "generation": lambda folder: rows_task(folder, "generation"),
    "text": lambda folder: TextTask.from_documents("text", TEXTS, window=32),
    "mixture": lambda folder: mixture(folder, "share"),
    "own": own_task,
    "published, options": lambda folder: rows_task(folder, "hellaswag", metric="acc_norm"),
    "published, generated": lambda folder: rows_task(folder, "squad"),
}
VARIANTS: dict[str, Callable[[Path], Task]] = {
    "multiple choice, shots": lambda folder: rows_task(folder, "multiple_choice", shots=2, separator="\n"),
    "multiple choice, chat": lambda folder: rows_task(folder, "multiple_choice", chat=True, system="Hi.", shots=1),
    "generation, shots": lambda folder: rows_task(folder, "generation", shots=1),
    "mixture, all": lambda folder: mixture(folder, "all"),
    "published, chat": lambda folder: rows_task(folder, "copa", apply_chat_template=True, system_instruction="Hi."),
    "published, several right": lambda folder: rows_task(folder, "record"),
    "published, generated, chat": lambda folder: rows_task(folder, "squad", apply_chat_template=True),
}
PUBLISHED = [name for short in (*MAKE, *GENERATED) for name in (short, f"eep_{short}")]
PUBLISHED = [{"eep_sglue_rte": "eep_rte"}.get(name, name) for name in PUBLISHED if name != "eep_hendrycks_math_algebra"]
CASES = [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)]
EVERY = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Task]:
    def made(kind: str) -> Task:
        return (KINDS | VARIANTS).get(kind, lambda folder: rows_task(folder, kind))(tmp_path)

    return made


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return chatting(tiny_tokenizer)


def scores_of(task: Task, split: str, requests: list[tasks.Request], seed: int = 0) -> tasks.Scores:
    """As a model might score them."""
    rng = np.random.default_rng(seed)
    tokens = np.asarray([request.scored for request in requests])
    hits = np.where(rng.random(len(tokens)) < 0.3, tokens, rng.integers(0, tokens))
    return task.reduce(split, requests, -rng.exponential(tokens), hits)


@pytest.mark.parametrize("kind", CASES)
def test_splits_are_apart_and_the_same_whenever_they_are_made(kind, make):
    task, again = make(kind), make(kind)
    assert task.splits == tasks.SPLITS
    apart(task, lambda example: example.likeness, least=20)
    assert json.loads(json.dumps(task.describe())) == json.loads(json.dumps(again.describe()))
    prints = {task.fingerprint(split) for split in (*task.splits, None)}
    assert len(prints) == 4 == len({*prints, *(again.fingerprint(split) for split in (*task.splits, None))})
    assert all(task.examples(split) == again.examples(split) for split in task.splits)
    for split in ("train", "", "Search"):
        with pytest.raises(TaskError, match=f"unknown split {split!r}"):
            task.examples(split)
    assert task.describe()["examples"] == {split: len(task.examples(split)) for split in task.splits}
    assert f"search {len(task.examples('search'))}" in task.summary


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("around", ["tiny", "sentencepiece", "byte level, line ends"])
def test_requests_have_scores(kind, around, make, tokenizer):
    task = make(kind)
    tokenizer = tokenizer if around == "tiny" else chatting(small(around, "<s>"))
    task.check(tokenizer)
    whole = task.requests("search", tokenizer, None, 400)
    examples = list(dict.fromkeys(request.example for request in whole))
    assert examples == list(range(len(examples)))
    assert all(len(request.ids) <= 401 for request in whole)  # the last token is scored, not read
    assert all(tokenizer.decode(request.ids[request.scored_from :]) for request in whole)
    weights = task.weights("search", tokenizer, 400)
    for limit in (1, 3, 7, len(examples), 10**6):  # nested, and scored alike
        requests = task.requests("search", tokenizer, limit, 400)
        n = min(limit, len(examples))
        assert requests == whole[: len(requests)]
        assert len({request.example for request in requests}) == n
        scores = scores_of(task, "search", requests)
        for column in (scores.losses, scores.correct, scores.weights, scores.choice if task.chooses else scores.losses):
            assert (column.shape, column.dtype) == ((n,), np.float32)
            assert np.isfinite(column).all()
        assert (scores.losses >= 0).all()
        assert ((scores.correct >= 0) & (scores.correct <= 1)).all()
        np.testing.assert_array_equal(scores.weights, weights[:n])
        assert (scores.chosen is not None) >= task.chooses
        assert all(np.isfinite(value) for value in task.metrics("search", scores).values())
        assert task.chance("search", requests).shape == (n,)
        assert {request.example for request in task.solutions("search", requests)} == set(range(n))
    with pytest.raises(TaskError, match="limit must be at least 1, got 0"):
        task.requests("search", tokenizer, 0)


def assert_alike(task: Task, other: Task, use: Use) -> None:
    """Facts, requests, and scores and metrics for any log-likelihoods; a generation task's prompts and judgement."""
    limits = use.tokenizer, use.limit, use.max_length
    assert other.describe() == task.describe()
    assert (other.name, other.metric, other.unit) == (task.name, task.metric, task.unit)
    assert all(other.fingerprint(split) == task.fingerprint(split) for split in (None, use.split))
    ours, theirs = task.requests(use.split, *limits), other.requests(use.split, *limits)
    assert ours == theirs
    for seed in range(3):
        a, b = scores_of(task, use.split, ours, seed), scores_of(other, use.split, theirs, seed)
        for column in ("losses", "weights", "correct", "choice", "chosen"):
            np.testing.assert_array_equal(getattr(a, column), getattr(b, column))
        before, after = task.metrics(use.split, a), other.metrics(use.split, b)
        if "lm_eval" not in str(task.describe()):
            assert before == after
        assert before[task.metric if task.metric in before else "greedy_match"] == next(iter(after.values()))
    assert [r.ids for r in task.solutions(use.split, ours)] == [r.ids for r in other.solutions(use.split, theirs)]
    if isinstance(task, GenerationTask):
        assert isinstance(other, GenerationTask)
        prompts = task.prompts(use.split, *limits)
        assert prompts == other.prompts(use.split, *limits)
        options = [example.options[0] for example in task.examples(use.split)[: len(prompts)]]
        texts = [text[: len(text) // (1 + i % 2)] for i, text in enumerate(options)]
        for name, values in task.judge(use.split, texts).items():
            np.testing.assert_array_equal(values, other.judge(use.split, texts)[name])


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(("split", "limit"), [("search", None), ("dev", 3)])
def test_a_study_s_record_of_it_scores_alike(kind, split, limit, make, tokenizer):
    """Also the record of what was made from one; only examples in use are in it, none of other splits."""
    task, use = make(kind), Use(split, tokenizer, limit, 512)
    recorded = json.loads(json.dumps(keep(task, use)))
    again = restored(recorded, split)
    assert_alike(task, again, use)
    assert_alike(task, restored(json.loads(json.dumps(keep(again, use))), split), use)
    assert again.splits == (split,)
    entries = recorded.get("examples", recorded.get("documents"))
    assert entries is None or len(entries) <= len(task.examples(split)[:limit])
    with pytest.raises(TaskError, match="test"):
        again.fingerprint("test")


@pytest.mark.parametrize("kind", CASES)
def test_a_search_minimises_its_loss(kind, make, tiny_model, tokenizer):
    space = moeopt.PruneSpace.of(tiny_model, keep=2, groups=1)
    objective = moeopt.Objective(tiny_model, tokenizer, task := make(kind), space, limit=5, max_length=400)
    study = moeopt.create_study(objective=objective, storage=None, sampler="random", warm_starts=())
    study.optimize(objective, n_trials=2)
    evaluation = objective.evaluator.evaluate(space.plan(study.best_trial))
    assert evaluation.loss == pytest.approx(study.best_value, abs=1e-5)
    assert evaluation.losses.shape == (5,)
    if task.metric in evaluation.metrics:
        assert evaluation.metrics[task.metric] == pytest.approx(evaluation.accuracy, abs=1e-6)
