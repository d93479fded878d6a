"""Tasks of lm-evaluation-harness in a folder of one's own run no Python unless the folder is trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeopt
from moeopt.cli import main
from moeopt.errors import TaskError
from moeopt.evaluation import Evaluator, lm_eval_report

PLAIN = {"doc_to_text": "{{n}} is {{a}}", "doc_to_target": "{{a}}", "doc_to_choice": ["0", "1"]}
REFUSED = r"runs Python.*; read it, and if you trust it: trust_remote_code=True, or --trust-remote-code"


def write(folder: Path, name: str, fields: dict[str, str], **more: Any) -> None:
    """A task on 20 rows; `fields` are written as YAML, the others as JSON, which is YAML, too."""
    (folder / "rows.jsonl").write_text("".join(json.dumps({"n": i, "a": i % 2}) + "\n" for i in range(20)))
    whole = {
        "task": name, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, **PLAIN, **more,
    }  # fmt: skip
    lines = [f"{key}: {json.dumps(value)}" for key, value in whole.items() if key not in fields]
    lines += [f"{key}: {value}" for key, value in fields.items()]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A folder in which `tricks.py` makes a file `ran` when it is imported."""
    ran = tmp_path / "ran"
    (tmp_path / "tricks.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from lm_eval.api.task import ConfigurableTask\n"
        "def it(doc, *_): return 0\n"
        "def docs(docs): return docs\n"
        "def results(doc, results): return {'acc': 1.0}\n"
        "class Own(ConfigurableTask):\n"
        "    def __init__(self, config=None):\n"
        "        super().__init__(config={k: v for k, v in config.items() if k != 'class'})\n"
    )
    return tmp_path


WAYS = {
    "doc_to_target": {"doc_to_target": "!function tricks.it"},
    "process_docs": {"process_docs": "!function tricks.docs"},
    "process_results": {"process_results": "!function tricks.results"},
    "class": {"class": "!function tricks.Own"},
    "quoted": {'"doc_to_target"': '!function "tricks.it"'},
    "block": {"process_docs": "!function >-\n  tricks.docs"},
    "anchor": {"doc_to_target": "&x !function tricks.it"},
    "verbatim": {"doc_to_target": "!<!function> tricks.it"},
    "nested": {"fewshot_config": "{process_docs: !function tricks.docs}"},
    "nowhere": {"unused": "[{a: !function tricks.it}]"},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("through", ["itself", "include", "chain", "group", "member", "tag"])
def test_no_function_of_a_folder_runs_unless_it_is_trusted(
    way: str, through: str, evil: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    quick = lambda path: TaskManager(include_path=path, include_defaults=False)  # noqa: E731  reading all takes a minute
    monkeypatch.setattr(moeopt.tasks.lm_eval.loading, "_whole", quick)
    fields = dict(WAYS[way])
    name = {"itself": "asked", "include": "base", "chain": "base"}.get(through, "member")
    write(evil, name, {} if through == "member" else fields, **({"tag": "asked"} if through == "tag" else {}))
    asked = {"include": "include: base\ntask: asked\n", "chain": "include: middle\ntask: asked\n"}
    text = "\n".join(f"    {key}: {value}" for key, value in fields.items() if "\n" not in value)
    asked["member"] = f"group: asked\ntask:\n  - task: member\n{text or '    x: !function tricks.it'}\n"
    asked["group"] = "group: asked\ntask: [member]\n"
    if through in asked:
        (evil / "asked.yaml").write_text(asked[through])
    if name == "base":
        deep = evil / "deep" if through == "chain" else evil
        deep.mkdir(exist_ok=True)
        (evil / "base.yaml").rename(deep / "base")
        (evil / "tricks.py").rename(deep / "tricks.py")
        (evil / "middle").write_text(f"include: [{deep / 'base'}]\n")
    with pytest.raises(TaskError, match=REFUSED):
        moeopt.tasks.get("lm_eval:asked", include_path=evil)
    assert not (evil / "ran").exists()


def test_a_trusted_folder_runs_its_python(evil: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    write(evil, "asked", WAYS["doc_to_target"])
    with pytest.raises(TaskError, match=REFUSED):
        lm_eval_report(tiny_model, tiny_tokenizer, "asked", include_path=evil)
    assert main(["lm-eval", str(moeopt.demo.MODEL), "--tasks", "asked", "--include-path", str(evil)]) == 2
    assert not (evil / "ran").exists()
    task = moeopt.tasks.get("lm_eval:asked", include_path=evil, trust_remote_code=True)
    assert (evil / "ran").exists()
    assert task.examples("test")
    report = lm_eval_report(tiny_model, tiny_tokenizer, "asked", include_path=evil, trust_remote_code=True)
    assert report["asked"].metrics


def test_neither_an_unknown_name_nor_a_module_that_is_installed_runs_any(evil: Path) -> None:
    write(evil, "other", WAYS["doc_to_target"])
    with pytest.raises(TaskError, match="unknown task 'asked'"):
        moeopt.tasks.get("lm_eval:asked", include_path=evil)
    write(evil, "asked", {"doc_to_target": "!function os.system"})
    with pytest.raises(TaskError, match=REFUSED):
        moeopt.tasks.get("lm_eval:asked", include_path=evil)
    write(evil, "plain", {})
    assert moeopt.tasks.get("lm_eval:plain", include_path=evil).examples("test")
    assert not (evil / "ran").exists()


def test_a_metric_from_elsewhere_needs_trust(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (evil / "mine").mkdir()
    (evil / "tricks.py").rename(evil / "mine" / "mine.py")
    monkeypatch.chdir(evil)
    for metric in ({"metric": "mine"}, {"metric": str(evil / "mine")}, {"metric": "acc", "hf_evaluate": True}):
        write(evil, "asked", {}, metric_list=[{**metric, "aggregation": "mean", "higher_is_better": True}])
        with pytest.raises(TaskError, match=r"runs Python of the evaluate package's.*trust_remote_code=True"):
            moeopt.tasks.get("lm_eval:asked", include_path=evil)
    assert not (evil / "ran").exists()


@settings(max_examples=20, deadline=None)
@given(
    way=st.sampled_from(
        ["cycler.__init__.__globals__.os", "''.__class__.__mro__[1].__subclasses__()", "lipsum.__globals__['os']"]
    ),
    field=st.sampled_from(["doc_to_text", "doc_to_target", "description"]),
)
def test_templates_do_not_reach_python(way: str, field: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("templates")
    call = f".system({f'touch {folder}/ran'!r})" if "os" in way else ""
    write(folder, "asked", {}, **{field: f"{{{{ {way}{call} }}}}"})
    with pytest.raises(TaskError, match=r"SecurityError|UndefinedError"):
        moeopt.tasks.get("lm_eval:asked", include_path=folder)
    assert not (folder / "ran").exists()


def test_the_harness_s_own_tasks_run_theirs(evil: Path, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Also beside a folder of one's own, and where a task of that folder includes one of them."""
    import lm_eval.tasks

    rows = [
        {"activity_label": "A", "ctx_a": f"a {i}", "ctx_b": "b", "ctx": "a b", "endings": list("wxyz"), "label": "1"}
        for i in range(40)
    ]
    data = tmp_path / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert moeopt.tasks.get("lm_eval:hellaswag", include_path=evil, data=data).examples("test")
    theirs = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    (evil / "mine.yaml").write_text(f"include: {theirs}\ntask: mine\n")
    task = moeopt.tasks.get("lm_eval:mine", include_path=evil, data=data)
    assert len(Evaluator(tiny_model, tiny_tokenizer, task, split="test").evaluate().losses)
    assert not (evil / "ran").exists()
