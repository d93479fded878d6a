"""A task that is kept as JSON and restored scores the same examples in the same way; what is not one is refused."""

from __future__ import annotations

import copy
import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows_of import GENERATED, MAKE, rows_of, write

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.study.recorded_tasks import Use, keep, restored
from moeopt.tasks import Example, GenerationTask, MixtureTask, MultipleChoiceTask, Task, TextTask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of prompts that are cut, examples left out

CHATML = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXTS = [f"document {i} has {word} and then " + "some more words " * (i % 4 + 1) for i in range(12) for word in "ab"]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    found = copy.deepcopy(tiny_tokenizer)
    found.chat_template = CHATML
    return found


def made(folder: Path, name: str, **options: Any) -> Task:
    if name == "text":
        return TextTask.from_documents("text", TEXTS, window=32)
    if name in ("multiple_choice", "generation"):
        answer = {"multiple_choice": {"options": [" a", " b", " c"]}, "generation": {}}[name]
        rows = [{"prompt": f"{i}:", **answer, "answer": " b" if i % 3 else " a"} for i in range(80)]
    else:
        rows = rows_of(name, 40 if name in GENERATED else 80)
    return tasks.get(name, write(folder / f"{name}.jsonl", rows), **options)


CASES = [
    *((name, {}) for name in sorted(MAKE)),
    ("eep_boolq", {}), ("eep_record", {}), ("squad", {}), ("eep_drop", {}), ("gsm8k", {"num_fewshot": 0}), ("text", {}),
    ("hellaswag", {"metric": "acc_norm"}),
    ("multiple_choice", {"normalise": "characters"}),
    ("multiple_choice", {"shots": 2, "separator": "\n"}),
    ("generation", {"shots": 1}),
    ("multiple_choice", {"chat": True, "system": "Be brief.", "shots": 1}),
    ("copa", {"apply_chat_template": True, "system_instruction": "Be brief."}),
    ("squad", {"apply_chat_template": True}),
]  # fmt: skip


def through_json(task: Task, use: Use) -> Task:
    text = json.dumps(keep(task, use))
    return restored(json.loads(text), use.split)


def assert_alike(task: Task, found: Task, use: Use) -> None:
    """Facts, requests, and scores and metrics for any log-likelihoods; a generation task's prompts and judgement."""
    limits = use.tokenizer, use.limit, use.max_length
    assert found.describe() == task.describe()
    assert found.name == task.name
    assert found.metric == task.metric
    assert found.fingerprint() == task.fingerprint()
    assert found.fingerprint(use.split) == task.fingerprint(use.split)
    assert isinstance(found, GenerationTask) == isinstance(task, GenerationTask)
    ours, theirs = task.requests(use.split, *limits), found.requests(use.split, *limits)
    assert ours == theirs
    rng = np.random.default_rng(0)
    lengths = np.asarray([len(request.ids) - request.scored_from for request in ours])
    for _ in range(3):
        likelihoods = -rng.exponential(lengths)
        hits = np.where(rng.random(len(ours)) < 0.3, lengths, rng.integers(0, lengths))
        a, b = task.reduce(use.split, ours, likelihoods, hits), found.reduce(use.split, theirs, likelihoods, hits)
        np.testing.assert_array_equal(a.losses, b.losses)
        np.testing.assert_array_equal(a.weights, b.weights)
        np.testing.assert_array_equal(a.correct, b.correct)
        before, after = task.metrics(use.split, a), found.metrics(use.split, b)
        if "lm_eval" not in str(task.describe()):
            assert before == after
        assert before[task.metric if task.metric in before else "greedy_match"] == next(iter(after.values()))
    assert [r.ids for r in task.solutions(use.split, ours)] == [r.ids for r in found.solutions(use.split, theirs)]
    if isinstance(task, GenerationTask):
        assert isinstance(found, GenerationTask)
        prompts = task.prompts(use.split, *limits)
        assert prompts == found.prompts(use.split, *limits)
        options = [example.options[0] for example in task.examples(use.split)[: len(prompts)]]
        texts = [text[: len(text) // (1 + i % 2)] for i, text in enumerate(options)]
        for name, values in task.judge(use.split, texts).items():
            np.testing.assert_array_equal(values, found.judge(use.split, texts)[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize(("split", "limit"), [("search", None), ("search", 5), ("dev", 3)])
def test_every_task_is_restored_alike(name, options, split, limit, tmp_path, tokenizer):
    task, use = made(tmp_path, name, **options), Use(split, tokenizer, limit, 512)
    assert_alike(task, through_json(task, use), use)


@pytest.mark.parametrize("use", ["share", "all"])
@pytest.mark.parametrize("limit", [None, 7, 1])
def test_mixtures_are_restored_alike(use, limit, tmp_path, tokenizer):
    members = {"b": (made(tmp_path, "multiple_choice", shots=1), 1), "r": (made(tmp_path, "record"), 3)}
    members["m"] = made(tmp_path, "multirc"), 0.7
    inner = MixtureTask({"t": (made(tmp_path, "text"), 2), "s": (made(tmp_path, "squad"), 1)})
    task = MixtureTask({**members, "inner": (inner, 1.1)}, use=use)
    how = Use("search", tokenizer, limit, 512)
    assert_alike(task, through_json(task, how), how)


@pytest.mark.parametrize(("name", "shots"), [("sums", 0), ("sums", 2), ("sums_word", 0), ("all_sums", 1)])
def test_tasks_of_the_harness_are_restored_without_its_data(name, shots, harness_tasks, tokenizer):
    task = tasks.get(f"lm_eval:{name}", include_path=harness_tasks, num_fewshot=shots)
    for limit in (None, 4):
        use = Use("search", tokenizer, limit, 512)
        assert_alike(task, through_json(task, use), use)


def test_a_restored_task_is_kept_and_restored_again(tmp_path, tokenizer):
    for name in ("multirc", "squad", "text"):
        task, use = made(tmp_path, name), Use("search", tokenizer, 6, 512)
        assert_alike(task, through_json(through_json(task, use), use), use)


def test_only_examples_in_use_are_kept(tmp_path, tokenizer):
    for name, key in (("boolq", "examples"), ("text", "documents")):
        task = made(tmp_path, name)
        few, whole = (len(keep(task, Use("search", tokenizer, limit))[key]) for limit in (3, None))
        assert few <= 3 < whole == len(task.examples("search"))
    assert "test" not in through_json(task, Use("search", tokenizer)).splits
    with pytest.raises(TaskError, match="search"):
        through_json(task, Use("search", tokenizer)).fingerprint("test")


FORMER = [json.loads(line) for line in Path(__file__).with_name("former_tasks.jsonl").read_text().splitlines()]
"""What moeopt 0.1 recorded of tasks that it had of its own, and the scores that it gave them."""


@pytest.mark.parametrize("case", FORMER, ids=lambda case: case["kept"]["name"])
def test_what_older_studies_recorded_is_scored_as_it_was(case, tiny_tokenizer):
    task = restored(case["kept"], "search")
    requests = task.requests("search", tiny_tokenizer, 2)
    ids = json.dumps([[request.ids, request.scored_from] for request in requests])
    assert hashlib.sha256(ids.encode()).hexdigest() == case["ids"]
    scored = np.asarray([request.scored for request in requests])
    scores = task.reduce("search", requests, -np.sqrt(np.arange(len(requests)) + 1.0) * scored, scored)
    assert task.metric == case["metric"]
    assert (scores.losses.tolist(), scores.correct.tolist()) == (case["losses"], case["correct"])
    assert (None if scores.choice is None else scores.choice.tolist()) == case["choice"]
    assert restored(json.loads(json.dumps(keep(task, Use("search", tiny_tokenizer)))), "search").name == task.name
    if "judged" in case:
        assert isinstance(task, GenerationTask)
        judged = task.judge("search", case["texts"])
        assert {name: values.tolist() for name, values in judged.items()} == case["judged"]


def test_answers_are_judged_by_the_harness_s_own_version_and_no_folder_of_the_user_s(
    tmp_path, harness_tasks, tokenizer
):
    use = Use("search", tokenizer, 2)
    kept = json.loads(json.dumps(keep(made(tmp_path, "squad"), use)))
    assert restored(kept, "search").judge("search", ["a", "b"])["f1"].shape == (2,)
    with pytest.raises(TaskError, match=r"judged by lm-evaluation-harness 0\.3, but"):
        restored({**kept, "version": "0.3"}, "search").judge("search", ["a", "b"])
    for name in ("os.system", "humaneval"):
        other = {**kept, "examples": [{**example, "task": name} for example in kept["examples"]]}
        with pytest.raises(TaskError):
            restored(other, "search").judge("search", ["a", "b"])
    written = tasks.get("sums_written", include_path=harness_tasks)
    with pytest.raises(TaskError, match="judged by code of its own"):
        keep(written, use)


class Mine(MultipleChoiceTask):
    """A user's own."""


def examples(n: int = 8) -> list[Example]:
    return [Example(str(i), f"{i}?", (" a", " b"), i % 2) for i in range(n)]


def test_code_of_the_user_s_is_not_kept(tmp_path, tokenizer):
    use = Use("search", tokenizer)
    with pytest.raises(TaskError, match="'mine' is code of its own, Mine"):
        keep(Mine("mine", examples()), use)
    with pytest.raises(TaskError, match="Mine"):
        keep(MixtureTask({"a": (Mine("mine", examples()), 1)}), use)
    judged = GenerationTask("g", examples(), judges={"own": lambda text, references: 1.0})
    with pytest.raises(TaskError, match="'g' is judged by code of its own, 'own'"):
        keep(judged, use)
    (tmp_path / "own.py").write_text(
        "from moeopt.tasks import Example, MultipleChoiceTask\n"
        "def plain():\n"
        "    return MultipleChoiceTask('p', [Example(str(i), f'{i}?', (' a', ' b'), 0) for i in range(5)])\n"
        "class Own(MultipleChoiceTask):\n"
        "    def __init__(self):\n"
        "        super().__init__('o', [Example(str(i), f'{i}?', (' a', ' b'), 0) for i in range(5)])\n"
    )
    plain = tasks.get(f"{tmp_path}/own.py:plain")  # from the user's code, but data
    assert_alike(plain, through_json(plain, use), use)
    with pytest.raises(TaskError, match="Own"):
        keep(tasks.get(f"{tmp_path}/own.py:Own"), use)


WEIRD = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.text(max_size=6) | st.just("example"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in inner for path in paths(item, (*at, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    found = copy.copy(value)
    found[path[0]] = changed(value[path[0]], path[1:], new)
    return found


@pytest.fixture(scope="module")
def specimens(tmp_path_factory, tiny_tokenizer, harness_tasks) -> list[Any]:
    folder = tmp_path_factory.mktemp("kept")
    found: list[Task] = [
        made(folder, name) for name in ("multirc", "record", "winogrande", "generation", "squad", "text")
    ]
    found.append(made(folder, "multiple_choice", shots=1))
    found.append(MixtureTask({"a": (found[0], 1), "b": (found[5], 2)}))
    found.append(tasks.get("lm_eval:sums", include_path=harness_tasks))
    return [json.loads(json.dumps(keep(task, Use("search", tiny_tokenizer, 2)))) for task in found]


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_anything_else_is_refused_or_harmless(data, specimens, tiny_tokenizer):
    kept = data.draw(st.sampled_from(specimens))
    path = data.draw(st.sampled_from([path for path in paths(kept) if path[:1] != ("facts",)]))
    damaged = changed(kept, path, data.draw(WEIRD))
    with suppress(TaskError):  # and nothing else
        task = restored(damaged, "search")
        requests = task.requests("search", tiny_tokenizer, 2, 512)
        scores = task.reduce("search", requests, -np.ones(len(requests)), np.ones(len(requests), np.int64))
        task.metrics("search", scores)
