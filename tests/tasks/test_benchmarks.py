"""Published multiple-choice benchmarks: their documented prompts, labels, files, and a run of each."""

from __future__ import annotations

import importlib
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows_of import MAKE, rows_of

from moeopt import Evaluator, tasks
from moeopt.errors import TaskError
from moeopt.tasks import Example, MultipleChoiceTask
from moeopt.tasks.mmlu import mmlu_task

TEMPLATES = ("harness", "eep")
OPTIONS = {"cb": 3, "openbookqa": 4, "hellaswag": 4, "mmlu": 4}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def all_examples(task: tasks.Task) -> list[Example]:
    return [example for split in task.splits for example in task.examples(split)]


def only(tmp_path: Path, name: str, row: dict[str, Any], **options: Any) -> Example:
    (example,) = all_examples(tasks.get(name, write(tmp_path / "rows.jsonl", [row]), **options))
    return example


def right(example: Example) -> str:
    return example.options[example.answer]


def documented(name: str) -> list[str]:
    """The indented blocks of a task file's docstring: a row, then the text that each template makes of it."""
    maker = tasks.REGISTRY[name]
    module = maker.__module__ if inspect.isfunction(maker) else maker.templates["harness"].__module__
    blocks, block = [], []
    for line in [*str(importlib.import_module(module).__doc__).split("\n"), "end"]:
        if line.startswith("    ") or not line:
            block.append(line)
        elif block:
            blocks.append(textwrap.dedent("\n".join(block)).strip("\n"))
            block = []
    return [block for block in blocks if block]


@pytest.mark.parametrize("name", sorted(MAKE))
def test_the_documented_row_becomes_the_documented_text(tmp_path, name):
    row, *texts = documented(name)
    for template, text in zip(TEMPLATES, texts):
        example = only(tmp_path, name, json.loads(row), template=template)
        if name == "winogrande" and template == "harness":
            assert text == "\n".join(f"{example.prompt}|{option}" for option in example.options)
        else:
            assert example.prompt + right(example) == text


def test_documented_options(tmp_path):
    for name, template, options in (
        ("boolq", "harness", (" no", " yes")),
        ("boolq", "eep", (" A", " B")),
        ("cb", "harness", (" True", " False", " Neither")),
        ("cb", "eep", (" A", " B", " C")),
        ("rte", "harness", (" True", " False")),
        ("wsc", "harness", (" no", " yes")),
        ("multirc", "harness", (" yes", " no")),
        ("copa", "harness", ("  the sun was rising.", "  the grass was cut.")),
        ("mmlu", "harness", (" A", " B", " C", " D")),
        ("mmlu", "eep", (" A", " B", " C", " D")),
    ):
        assert only(tmp_path, name, json.loads(documented(name)[0]), template=template).options == options


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", sorted(MAKE))
def test_every_benchmark_runs_end_to_end(tmp_path, tiny_model, tiny_tokenizer, name, template):
    """From a folder of hub rows with an unlabelled test split, on a random model: plumbing."""
    unlabelled = rows_of(name, 4, seed=2)
    for row in unlabelled:
        for column in ("label", "answer" if name != "multirc" else "", "answers", "answerKey"):
            if column in row:
                row[column] = [] if column == "answers" else "" if isinstance(row[column], str) else -1
    for split, rows in (("train", rows_of(name)), ("validation", rows_of(name, seed=1)), ("test", unlabelled)):
        write(tmp_path / f"{split}.jsonl", rows)
    task = tasks.get(name, str(tmp_path), template=template)
    assert task.splits == ("search", "dev", "test")
    assert len(task.examples("test")) == 20
    assert len(task.examples("search")) + len(task.examples("dev")) == 20
    result = Evaluator(tiny_model, tiny_tokenizer, task, split="test").evaluate(None)
    assert np.isfinite(result.losses).all()
    assert len(result.losses) == 20
    assert result.metrics[task.metric] == pytest.approx(float(np.mean(result.correct)))
    assert all(0 <= value <= 1 for value in result.metrics.values())
    assert task.describe()["template"].startswith(f"{template} v1")
    if name in OPTIONS:
        assert {e.answer for e in all_examples(task)} == set(range(OPTIONS[name]))


@pytest.mark.parametrize("name", sorted(MAKE))
def test_parquet_and_json_lines_give_the_same_task(tmp_path, name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows_of(name)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert (
        tasks.get(name, str(tmp_path / "rows.parquet")).describe()
        == tasks.get(name, write(tmp_path / "rows.jsonl", rows)).describe()
    )


ROW = {name: rows_of(name, 1)[0] for name in MAKE}
MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("cb", {"label": 3}, "'label' must be entailment or contradiction or neutral .or an index below 3., got 3"),
    ("cb", {"label": True}, "'label' must be entailment .*, got True"),
    ("cb", {"premise": None}, "'premise' must be text, got None"),
    ("rte", {"label": "neutral"}, "'label' must be entailment or not_entailment .*, got 'neutral'"),
    ("wsc", {"label": 2}, "'label' must be true or false"),
    ("wsc", {"span2_index": "nine"}, "'span2_index' must be a number >= 0, got 'nine'"),
    ("wsc", {"target": []}, "'target' must be an object"),
    ("copa", {"question": "reason"}, "'question' must be cause or effect, got 'reason'"),
    ("copa", {"label": 2}, "'label' must be choice1 or choice2"),
    ("multirc", {"label": "maybe"}, "'label' must be true or false"),
    ("multirc", {"passage": {"text": "t", "questions": 3}}, "'passage': 'questions' must be a list of objects, got 3"),
    ("record", {"answers": ["nobody"]}, "none of 'answers' .'nobody'. is one of 'entities'"),
    ("record", {"entities": []}, "'entities' must be a list of texts"),
    ("record", {"passage": 3}, "'passage' must be an object, got 3"),
    ("arc_easy", {"answerKey": "Z"}, "'answerKey' must be one of .*, got 'Z'"),
    ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "as many texts as labels, got 2 and 1"),
    ("arc_challenge", {"choices": ["a", "b"]}, "'choices' must be an object"),
    ("openbookqa", {"question_stem": 7}, "'question_stem' must be text, got 7"),
    ("hellaswag", {"endings": ["a", "b"]}, "'endings' must be 4 texts, got 2"),
    ("hellaswag", {"label": "4"}, "'label' must be 0 or 1 or 2 or 3 .*, got '4'"),
    ("winogrande", {"answer": 0}, "'answer' must be 1 or 2, got 0"),
    ("winogrande", {"sentence": "No blank."}, "'sentence' must have '_' and text after it, got 'No blank.'"),
    ("mmlu", {"answer": "E"}, "'answer' must be A or B or C or D .*, got 'E'"),
    ("mmlu", {"choices": ["a"]}, "'choices' must be four texts, got 1"),
    ("mmlu", {"subject": "anatomie"}, "unknown subject 'anatomie'; did you mean 'anatomy'"),
]


@pytest.mark.parametrize(("name", "change", "message"), MALFORMED)
def test_malformed_row_is_named_with_its_file_and_line(tmp_path, name, change, message):
    path = write(tmp_path / "rows.jsonl", [ROW[name], ROW[name] | change])
    with pytest.raises(TaskError, match=f"line 2.*{message}") as error:
        tasks.get(name, path, template="eep" if name == "wsc" else "harness")
    assert str(error.value).startswith(path)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_missing_column_is_named(tmp_path, name):
    needed = {"multirc": "paragraph", "record": "query", "winogrande": "sentence", "hellaswag": "ctx_a", "wsc": "text"}
    column = needed.get(name) or next(c for c in ROW[name] if c not in ("id", "idx", "word", "ind"))
    path = write(tmp_path / "rows.jsonl", [{k: v for k, v in ROW[name].items() if k != column}])
    with pytest.raises(TaskError, match=f"line 1.*'{column}'"):
        tasks.get(name, path)


def test_eep_openbookqa_needs_the_fact(tmp_path):
    row = {k: v for k, v in ROW["openbookqa"].items() if k != "fact1"}
    assert only(tmp_path, "openbookqa", row).prompt == row["question_stem"]
    with pytest.raises(TaskError, match="no 'fact1'"):
        only(tmp_path, "openbookqa", row, template="eep")


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_in_every_form(tmp_path, template):
    for i, label in enumerate(("entailment", "contradiction", "neutral")):
        named, numbered = (only(tmp_path, "cb", ROW["cb"] | {"label": x}, template=template) for x in (label, i))
        assert named == numbered
        if template == "eep":
            assert f"{right(named).strip()}. {label.capitalize()}" in named.prompt
    for i, label in enumerate(("entailment", "not_entailment")):
        named, numbered = (only(tmp_path, "rte", ROW["rte"] | {"label": x}, template=template) for x in (label, i))
        assert named == numbered
    for i, label in enumerate("ABCD"):
        named, numbered = (only(tmp_path, "mmlu", ROW["mmlu"] | {"answer": x}, template=template) for x in (label, i))
        assert named == numbered
        assert right(named) == f" {label}"
    for label in ("1", "2"):
        example = only(tmp_path, "winogrande", ROW["winogrande"] | {"answer": label}, template=template)
        assert example.answer == int(label) - 1
    for label in (3, "3"):
        assert only(tmp_path, "hellaswag", ROW["hellaswag"] | {"label": label}, template=template).answer == 3
    for labels in ("ABCDE", "12345"):
        for n in (3, 4, 5):
            choices = {"text": [f"c{i}" for i in range(n)], "label": [*labels[:n]]}
            row = ROW["arc_easy"] | {"choices": choices, "answerKey": labels[n - 1]}
            example = only(tmp_path, "arc_easy", row, template=template)
            assert len(example.options) == n
            assert right(example) == (f" c{n - 1}" if template == "harness" else f" {'ABCDE'[n - 1]}")


def own_wsc(row: dict[str, Any]) -> dict[str, Any]:
    spans = {column: row[column] for column in row if column.startswith("span")}
    return {"text": row["text"], "idx": row["idx"], "target": spans, "label": ["false", "true"][row["label"]]}


def own_science(stem: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        choices = [{"text": t, "label": x} for t, x in zip(row["choices"]["text"], row["choices"]["label"])]
        question = {"stem": row[stem], "choices": choices}
        rest = {column: row[column] for column in row if column not in ("choices", stem)}
        return rest | {"question": question}

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [("wsc", own_wsc), ("arc_easy", own_science("question")), ("openbookqa", own_science("question_stem"))],
)
def test_own_form_of_a_data_set_equals_the_hubs(tmp_path, name, change):
    rows = rows_of(name)
    hub = write(tmp_path / "hub.jsonl", rows)
    own = write(tmp_path / "own.jsonl", [change(row) for row in rows])
    for template in TEMPLATES:
        assert tasks.get(name, own, template=template).describe() == tasks.get(name, hub, template=template).describe()


def nested_multirc(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    paragraphs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        answers = paragraphs.setdefault(row["paragraph"], {}).setdefault(row["question"], [])
        answers.append({"text": row["answer"], "label": row["label"]})
    return [
        {"idx": i, "passage": {"text": p, "questions": [{"question": q, "answers": a} for q, a in questions.items()]}}
        for i, (p, questions) in enumerate(paragraphs.items())
    ]


def nested_record(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        passage = row["passage"]
        places = [(passage.index(e), passage.index(e) + len(e) - 1) for e in row["entities"]]
        spans = [{"start": start, "end": end} for start, end in places]
        entry = found.setdefault(passage, {"passage": {"text": passage, "entities": spans}, "qas": []})
        entry["qas"].append({"query": row["query"], "answers": [{"text": a} for a in row["answers"]]})
    return list(found.values())


def test_superglue_files_of_passages_equal_the_hubs_rows(tmp_path):
    record = rows_of("record")
    for row in record:
        row["entities"] = [entity.removeprefix("The ") for entity in row["entities"]]
    for name, rows, nest in (("multirc", rows_of("multirc"), nested_multirc), ("record", record, nested_record)):
        hub, own = write(tmp_path / "hub.jsonl", rows), write(tmp_path / "own.jsonl", nest(rows))
        for template in TEMPLATES:
            assert tasks.get(name, own, template=template).describe() == tasks.get(
                name, hub, template=template
            ).describe() | {"fingerprint": tasks.get(name, own, template=template).fingerprint()}
            wanted, found = (all_examples(tasks.get(name, path, template=template)) for path in (hub, own))
            assert [(e.prompt, e.options, e.answer) for e in found] == [(e.prompt, e.options, e.answer) for e in wanted]
        bad = nest(rows)
        (bad[1]["qas"][0] if name == "record" else bad[1]["passage"]["questions"][0]).pop("answers")
        if name == "record":
            with pytest.warns(UserWarning, match="left out 1 of 20 rows of train, which have no label: 'answers'"):
                tasks.get(name, write(tmp_path / "bad.jsonl", bad))
            continue
        with pytest.raises(TaskError, match=r"line 2.*answers"):
            tasks.get(name, write(tmp_path / "bad.jsonl", bad))


@pytest.mark.parametrize("name", ["multirc", "record"])
def test_a_lone_file_is_never_split_inside_a_passage(tmp_path, name):
    task = tasks.get(name, write(tmp_path / "rows.jsonl", rows_of(name, 400)))
    passages = [{example.group for example in task.examples(split)} for split in task.splits]
    assert len(passages) == 3
    assert sum(map(len, passages)) == len(set.union(*passages)) > 40
    assert None not in set.union(*passages)


def test_winogrande_scores_what_follows_the_name_and_nothing_else(tmp_path, tiny_tokenizer):
    rows = rows_of("winogrande")
    task = tasks.get("winogrande", write(tmp_path / "rows.jsonl", rows))
    for split in task.splits:
        examples = task.examples(split)
        for request in task.requests(split, tiny_tokenizer):
            example = examples[request.example]
            text = tiny_tokenizer.decode(request.ids, skip_special_tokens=True)
            assert text == example.prompt + example.options[request.option]
            row = next(r for r in rows if r["sentence"].split("_")[0] == example.prompt and r["sentence"][-3:] in text)
            name = (row["option1"], row["option2"])[request.option]
            scored = tiny_tokenizer.decode(request.ids[request.scored_from :])
            assert text == row["sentence"].replace("_", name)
            assert scored == row["sentence"].split("_")[1]


def test_winogrande_cuts_each_prompt_at_its_beginning(tmp_path, tiny_tokenizer):
    row = {"sentence": "a b c _ x.", "option1": "n", "option2": "mmm", "answer": "1"}
    task = tasks.get("winogrande", write(tmp_path / "rows.jsonl", [row]))
    with pytest.warns(UserWarning, match="2 of 2 prompts"):
        requests = task.requests(task.splits[0], tiny_tokenizer, max_length=7)
    assert [tiny_tokenizer.decode(r.ids) for r in requests] == ["<s>c n x.", "<s>mmm x."]
    assert {tiny_tokenizer.decode(r.ids[r.scored_from :]) for r in requests} == {" x."}


@pytest.mark.parametrize(("normalise", "choice"), [("tokens", 1), ("none", 0), ("characters", 2)])
def test_how_options_are_compared(normalise, choice):
    from moeopt.tasks import Request

    task = MultipleChoiceTask(
        "t", search=[Example("1", "q", (" a", " bcdefg", " hijklmnopqrstu"), 1)], normalise=normalise
    )
    tokens, likelihood = (1, 4, 3), np.array([-2.0, -4.0, -4.5])
    requests = [Request(0, j, tuple(range(n + 1)), 1) for j, n in enumerate(tokens)]
    scores = task.reduce("search", requests, likelihood, np.zeros(3, np.int64))
    assert scores.chosen.tolist() == [choice]
    assert scores.losses.tolist() == [1.0]
    assert ("normalise" in task.describe()) == (normalise != "tokens")
    with pytest.raises(TaskError, match="normalise must be tokens, none or characters, got 'bytes'"):
        MultipleChoiceTask("t", search=task.examples("search"), normalise="bytes")


def test_hub_configurations(monkeypatch):
    """What would be asked of the hub, told by the error of a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, template, wanted in (
        ("boolq", "harness", r"'google/boolq': "),
        ("cb", "harness", r"'aps/super_glue' \(cb\)"),
        ("rte", "eep", r"'aps/super_glue' \(rte\)"),
        ("wsc", "eep", r"'aps/super_glue' \(wsc.fixed\)"),
        ("copa", "harness", r"'aps/super_glue' \(copa\)"),
        ("multirc", "harness", r"'aps/super_glue' \(multirc\)"),
        ("record", "harness", r"'aps/super_glue' \(record\)"),
        ("openbookqa", "harness", r"'allenai/openbookqa' \(main\)"),
        ("openbookqa", "eep", r"'allenai/openbookqa' \(additional\)"),
        ("arc_easy", "harness", r"'allenai/ai2_arc' \(ARC-Easy\)"),
        ("arc_challenge", "harness", r"'allenai/ai2_arc' \(ARC-Challenge\)"),
        ("hellaswag", "harness", r"'Rowan/hellaswag': "),
        ("winogrande", "harness", r"'allenai/winogrande' \(winogrande_xl\)"),
        ("mmlu", "harness", r"'cais/mmlu' \(all\)"),
    ):
        with pytest.raises(TaskError, match=f"cannot load {wanted}"):
            tasks.get(name, template=template)
    with pytest.raises(TaskError, match=r"'aps/super_glue' \(boolq\)"):
        tasks.get("boolq", "aps/super_glue")
    with pytest.raises(TaskError, match=r"'allenai/winogrande' \(winogrande_s\)"):
        tasks.get("winogrande", config="winogrande_s")


def test_every_registered_benchmark_has_rows_and_a_documented_signature():
    for name in MAKE:
        assert {"data", "template"} <= set(inspect.signature(tasks.REGISTRY[name]).parameters)
    assert all("data" in inspect.signature(maker).parameters for maker in tasks.REGISTRY.values())
    assert mmlu_task is tasks.REGISTRY["mmlu"]
