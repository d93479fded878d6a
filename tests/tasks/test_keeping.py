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
from test_contract import KINDS, assert_alike, rows_task

from moeopt import tasks
from moeopt.errors import TaskError
from moeopt.study.recorded_tasks import Use, keep, restored
from moeopt.tasks import Example, GenerationTask, MixtureTask, MultipleChoiceTask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of prompts that are cut, examples left out


@pytest.mark.parametrize(("name", "shots"), [("sums", 0), ("sums", 2), ("sums_word", 0), ("all_sums", 1)])
def test_tasks_of_the_harness_are_restored_without_its_data(name, shots, harness_tasks, tiny_tokenizer):
    task = tasks.get(f"lm_eval:{name}", include_path=harness_tasks, num_fewshot=shots)
    for limit in (None, 4):
        use = Use("search", tiny_tokenizer, limit, 512)
        assert_alike(task, restored(json.loads(json.dumps(keep(task, use))), "search"), use)


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
    tmp_path, harness_tasks, tiny_tokenizer
):
    use = Use("search", tiny_tokenizer, 2)
    recorded = json.loads(json.dumps(keep(rows_task(tmp_path, "squad"), use)))
    assert restored(recorded, "search").judge("search", ["a", "b"])["f1"].shape == (2,)
    with pytest.raises(TaskError, match=r"judged by lm-evaluation-harness 0\.3, but"):
        restored({**recorded, "version": "0.3"}, "search").judge("search", ["a", "b"])
    for name in ("os.system", "humaneval"):
        other = {**recorded, "examples": [{**example, "task": name} for example in recorded["examples"]]}
        with pytest.raises(TaskError):
            restored(other, "search").judge("search", ["a", "b"])
    written = tasks.get("sums_written", include_path=harness_tasks)
    with pytest.raises(TaskError, match="judged by code of its own"):
        keep(written, use)


class Mine(MultipleChoiceTask):
    """A user's own."""


def examples(n: int = 8) -> list[Example]:
    return [Example(str(i), f"{i}?", (" a", " b"), i % 2) for i in range(n)]


def test_code_of_the_user_s_is_not_kept(tmp_path, tiny_tokenizer):
    use = Use("search", tiny_tokenizer)
    with pytest.raises(TaskError, match="'mine' is code of its own, Mine"):
        keep(Mine("mine", examples()), use)
    with pytest.raises(TaskError, match="Mine"):
        keep(MixtureTask({"a": (Mine("mine", examples()), 1)}), use)
    judged = GenerationTask("g", examples(), judges={"own": lambda text, references: 1.0})
    with pytest.raises(TaskError, match="'g' is judged by code of its own, 'own'"):
        keep(judged, use)
    source = "from moeopt.tasks import Example, MultipleChoiceTask as Kind\nclass Own(Kind):\n    def __init__(self):\n"
    source += "        super().__init__('o', [Example(str(i), f'{i}?', (' a', ' b'), 0) for i in range(5)])\n"
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(TaskError, match="Own"):
        keep(tasks.get(f"{tmp_path}/mine.py:Own"), use)


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
    other = copy.copy(value)
    other[path[0]] = changed(value[path[0]], path[1:], new)
    return other


@pytest.fixture(scope="module")
def specimens(tmp_path_factory, tiny_tokenizer, harness_tasks) -> list[Any]:
    folder = tmp_path_factory.mktemp("kept")
    made = [rows_task(folder, name) for name in ("multirc", "record", "winogrande", "generation", "squad")]
    made += [KINDS["text"](folder), rows_task(folder, "multiple_choice", shots=1)]
    made += [MixtureTask({"a": (made[0], 1), "b": (made[5], 2)})]
    made += [tasks.get("lm_eval:sums", include_path=harness_tasks)]
    return [json.loads(json.dumps(keep(task, Use("search", tiny_tokenizer, 2)))) for task in made]


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_anything_else_is_refused_or_harmless(data, specimens, tiny_tokenizer):
    recorded = data.draw(st.sampled_from(specimens))
    path = data.draw(st.sampled_from([path for path in paths(recorded) if path[:1] != ("facts",)]))
    damaged = changed(recorded, path, data.draw(WEIRD))
    with suppress(TaskError):  # and nothing else
        task = restored(damaged, "search")
        requests = task.requests("search", tiny_tokenizer, 2, 512)
        scores = task.reduce("search", requests, -np.ones(len(requests)), np.ones(len(requests), np.int64))
        task.metrics("search", scores)
