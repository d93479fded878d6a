"""Generation tasks: prompts, references, data of the hub's schema, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moeopt import tasks
from moeopt.demo.skills import MODEL
from moeopt.errors import TaskError
from moeopt.evaluation import Evaluator
from moeopt.models import load
from moeopt.tasks import Example, GenerationTask
from moeopt.tasks.generation import accepted

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def squad_row(i: int) -> dict[str, object]:
    context = f"Passage {i // 2}: {NUMBERS[i // 2]} towers stand in Rome."
    texts = [NUMBERS[i // 2], f"the {NUMBERS[i // 2]}", NUMBERS[i // 2]]
    answers = {"text": texts, "answer_start": [12] * 3}
    return {"id": f"q{i}", "title": "Towers", "context": context, "question": f"How many, {i}?", "answers": answers}


def drop_row(i: int) -> dict[str, object]:
    spans, kinds = ([str(i)], ["number"]) if i % 2 else (["Smith", "Jones, Jr."], ["span", "span"])
    return {
        "section_id": f"s{i // 2}",
        "query_id": f"q{i}",
        "passage": f"Smith and Jones ran {i // 2} yards.",
        "question": f"Who or how many, {i}?",
        "answers_spans": {"spans": spans, "types": kinds},
    }


def annotated_row(i: int) -> dict[str, object]:
    nobody = {"day": "", "month": "", "year": ""}
    answer = {"number": str(i), "date": nobody, "spans": []}
    day = {"day": "3", "month": "May", "year": "1999"}
    validated = {"number": ["", "", str(i)], "date": [day, nobody, nobody], "spans": [[], ["Smith", "Jones"], []]}
    row = {key: value for key, value in drop_row(i).items() if key != "answers_spans"}
    return {**row, "answer": answer, "validated_answers": validated}


def gsm8k_row(i: int) -> dict[str, object]:
    return {"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}.\n#### 1,{2 * i:03}"}


def math_row(i: int) -> dict[str, object]:
    solution = f"Half of ${i}$ is $\\boxed{{\\frac{{{i}}}{{2}}}}$."
    return {"problem": f"What is half of {i}?", "level": "Level 1", "type": "Algebra", "solution": solution}


def own_row(i: int) -> dict[str, object]:
    return {"prompt": f"{i} is", "answer": [NUMBERS[i % 10], f"number {i}"] if i % 2 else NUMBERS[i % 10]}


ROWS = {
    "squad": (squad_row, "harness", "eep"),
    "drop": (drop_row, "harness", "eep"),
    "gsm8k": (gsm8k_row, "harness", "eep"),
    "math": (math_row, "harness", "minerva"),
    "generation": (own_row, ""),
}
CASES = [(name, template) for name, (_, *templates) in ROWS.items() for template in templates]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task_of(tmp_path: Path, name: str, template: str, **options: object) -> GenerationTask:
    file = write(tmp_path / f"{name}.jsonl", [ROWS[name][0](i) for i in range(20)])  # type: ignore[operator]
    found = tasks.get(name, file, **({"template": template} if template else {}), **options)
    assert isinstance(found, GenerationTask)
    return found


def first(task: GenerationTask, id_: str) -> Example:
    return next(e for split in task.splits for e in task.examples(split) if e.id == id_)


@pytest.fixture(scope="module")
def demo():
    return load(MODEL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cut at their beginning")
@pytest.mark.parametrize(("name", "template"), CASES)
def test_every_task_runs_end_to_end(tmp_path, tiny_tokenizer, make_mixtral, demo, name, template):
    task = task_of(tmp_path, name, template, fractions=(0.8, 0.1, 0.1), max_new_tokens=6)
    sizes = [len(task.examples(split)) for split in task.splits]
    assert sum(sizes) == (10 if (name, template) == ("drop", "eep") else 20)
    for model, tokenizer in ((make_mixtral(layers=1), tiny_tokenizer), demo):
        evaluator = Evaluator(model, tokenizer, task, limit=2 if template == "eep" else None)
        likelihood, generation = evaluator.evaluate(), evaluator.generate()
        assert np.isfinite(likelihood.losses).all()
        assert next(iter(generation.metrics)) == task.metric
        assert len(generation.texts) == len(likelihood.losses)
        for values in generation.metrics.values():
            assert values.shape == likelihood.losses.shape
            assert 0 <= values.min() <= values.max() <= 1


@pytest.mark.parametrize(("name", "template"), CASES)
def test_the_reference_is_right_and_continues_the_prompt(tmp_path, tiny_tokenizer, name, template):
    task = task_of(tmp_path, name, template)
    for split in task.splits:
        examples = task.examples(split)
        ends = [next((o[: o.find(s)] for s in task.stop if s in o), o) for o in (e.options[e.answer] for e in examples)]
        judged = task.judge(split, ends)
        single = np.asarray([len(accepted(e)[0]) == 1 for e in examples])
        assert judged[task.metric][single].tolist() == [1.0] * single.sum()
        for prompt, request, example in zip(
            task.prompts(split, tiny_tokenizer), task.requests(split, tiny_tokenizer), examples, strict=True
        ):
            assert tiny_tokenizer.decode(prompt.ids) == "<s>" + example.prompt
            assert tiny_tokenizer.decode(request.ids) == "<s>" + example.prompt + example.options[example.answer]
            assert request.ids[: request.scored_from] == prompt.ids


def test_a_passage_is_in_one_split(tmp_path):
    for name in ("squad", "drop"):
        task = task_of(tmp_path, name, "harness")
        groups = [{example.group for example in task.examples(split)} for split in task.splits]
        assert len(groups) > 1
        assert sum(map(len, groups)) == len(set.union(*groups)) == 10


def test_prompts_are_the_harness_s(tmp_path):
    assert first(task_of(tmp_path, "squad", "harness"), "q3").prompt == (
        "Title: Towers\n\nBackground: Passage 1: one towers stand in Rome.\n\nQuestion: How many, 3?\n\nAnswer:"
    )
    example = first(task_of(tmp_path, "squad", "eep"), "q3")
    assert example.prompt.endswith("answer `impossible to answer`:\nQuestion: How many, 3?\nAnswer:")
    assert example.options == (" one", " the one")
    assert (
        first(task_of(tmp_path, "drop", "harness"), "q2").prompt == "Smith and Jones ran 1 yards. Who or how many, 2?"
    )
    gsm8k = task_of(tmp_path, "gsm8k", "eep").examples("search")[0]
    assert gsm8k.prompt.count("Let's think step by step\nAnswer:") == 5
    assert "<<" not in gsm8k.options[0]
    assert gsm8k.options[0].startswith("\n")
    assert gsm8k.options[0].endswith(f"The answer is {gsm8k.references[0][0]}")


def test_an_unanswerable_question_accepts_saying_so(tmp_path):
    row = {**squad_row(0), "answers": {"text": [], "answer_start": []}}
    for template, said in (("harness", " unanswerable"), ("eep", " impossible to answer")):
        task = tasks.get("squad", write(tmp_path / "v2.jsonl", [row]), template=template, fractions=(1, 0, 0))
        assert task.examples("search")[0].options == (said,)


def test_answers_of_drop_in_either_schema(tmp_path):
    task = tasks.get("drop", write(tmp_path / "a.jsonl", [annotated_row(7)]), fractions=(1, 0, 0))
    assert task.examples("search")[0].references == (("7",), ("3 May 1999",), ("Smith", "Jones"))
    assert task.examples("search")[0].options == (" 7", " 3 May 1999", " Smith, Jones")
    raw = annotated_row(7)
    columns = raw["validated_answers"]
    raw["validated_answers"] = [dict(zip(columns, values)) for values in zip(*columns.values())]
    task_raw = tasks.get("drop", write(tmp_path / "r.jsonl", [raw]), fractions=(1, 0, 0))
    assert task_raw.fingerprint() == task.fingerprint()


@pytest.mark.parametrize(
    ("spans", "kinds", "expected"),
    [
        (["3", "4"], ["number", "number"], {("3",), ("4",)}),
        (["A", "B", "A", "B"], ["span"] * 4, {("A", "B")}),
        (["A", "A B", "A"], ["span"] * 3, {("A",), ("A B",)}),
        (["3", "A", "A"], ["number", "span", "span"], {("3",), ("A",)}),
    ],
)
def test_flat_answers_of_drop_s_validation_split(tmp_path, spans, kinds, expected):
    write(
        tmp_path / "train.jsonl", [{**drop_row(i), "answers_spans": {"spans": spans, "types": kinds}} for i in range(9)]
    )
    write(tmp_path / "validation.jsonl", [{**drop_row(20), "answers_spans": {"spans": spans, "types": kinds}}])
    task = tasks.get("drop", tmp_path)
    assert set(task.examples("test")[0].references) == expected
    assert task.examples("search")[0].references == (tuple(spans),)


def test_long_prompts_leave_room_for_the_answer(tiny_tokenizer):
    task = GenerationTask("t", [Example("1", "abcdefgh", (" no",), 0)], max_new_tokens=5)
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        (prompt,) = task.prompts("search", tiny_tokenizer, max_length=9)
    assert tiny_tokenizer.decode(prompt.ids) == "<s>fgh"
    with pytest.raises(TaskError, match="5 new tokens leave no room for its prompt within 5"):
        task.prompts("search", tiny_tokenizer, max_length=5)


def test_the_loss_is_that_of_the_reference(tiny_tokenizer):
    task = GenerationTask("t", [Example(str(i), f"q{i}:", (" yes", " no"), 1) for i in range(3)])
    requests = task.requests("search", tiny_tokenizer)
    assert [tiny_tokenizer.decode(r.ids[r.scored_from :]) for r in requests] == [" no"] * 3
    scores = task.reduce("search", requests, np.asarray([-6.0, -3.0, 0.0]), np.asarray([3, 2, 3]))
    np.testing.assert_allclose(scores.losses, [2, 1, 0])
    np.testing.assert_array_equal(scores.correct, [1, 0, 1])
    assert task.metrics("search", scores) == {"greedy_match": pytest.approx(2 / 3)}


def test_references_are_part_of_the_fingerprint():
    def fingerprint(**facts):
        return GenerationTask("t", [Example("1", "p", ("a",), 0, **facts)]).fingerprint()

    assert fingerprint() != fingerprint(references=(("b",),))
    for bad in ("18", ("18",), ((),), ((18,),)):
        with pytest.raises(TaskError, match=r"references must be tuples of texts|expected text, got 18"):
            fingerprint(references=bad)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("squad", {**squad_row(0), "answers": ["two"]}, "line 1: 'answers' must be"),
        ("drop", {**drop_row(0), "answers_spans": {"spans": ["x"]}}, "line 1: answers must be as in ucinlp/drop"),
        ("gsm8k", {"question": "?", "answer": "four"}, "line 1: 'answer' must end in '#### ' and a number, got 'four'"),
        ("math", {**math_row(0), "solution": "It is 4."}, r"line 1: 'solution' has no \\boxed"),
        ("generation", {"prompt": "p", "answer": [""]}, "line 1: 'answer' must be a text or a list of texts"),
        ("generation", {"prompt": "p"}, "line 1: no 'answer'"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, row, message):
    with pytest.raises(TaskError, match=message):
        tasks.get(name, write(tmp_path / "bad.jsonl", [row]))


def test_bad_options_are_named(tmp_path):
    file = write(tmp_path / "rows.jsonl", [own_row(i) for i in range(9)])
    with pytest.raises(TaskError, match="unknown metric 'f2'; did you mean 'f1'"):
        tasks.get("generation", file, metric="f2")
    with pytest.raises(TaskError, match="max_new_tokens must be an integer of at least 1, got 0"):
        tasks.get("generation", file, max_new_tokens=0)
    with pytest.raises(TaskError, match="stop must be non-empty texts"):
        tasks.get("generation", file, stop=["\n", ""])
    with pytest.raises(TaskError, match="unknown template 'epe'; did you mean 'eep'"):
        tasks.get("gsm8k", file, template="epe")
    names = write(tmp_path / "names.jsonl", [drop_row(2)])
    with pytest.raises(TaskError, match="template 'eep' asks only for numbers"):
        tasks.get("drop", names, template="eep")
