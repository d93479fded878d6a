"""A user's own task, from a Python file."""

from __future__ import annotations

from pathlib import Path

import pytest

import moeopt
from moeopt import tasks
from moeopt.cli import main
from moeopt.errors import TaskError

SUMS = """
from beside import FIRST
from moeopt.tasks import Example, MultipleChoiceTask, Task


def sums(top: int = 24) -> MultipleChoiceTask:
    rows = [(a, b) for a in range(FIRST, top) for b in range(FIRST, top)]
    return MultipleChoiceTask.from_rows(
        "sums", rows, lambda r: Example(f"{r}", f"add {r[0]}+{r[1]}=", (f"{sum(r)}", f"{sum(r) + 1}"), 0)
    )


class Lines(MultipleChoiceTask):
    def __init__(self, data, *, shout=False):
        lines = open(data).read().split()
        super().__init__("lines", [Example(line, line, ("a", "b"), 0) for line in lines])


class Half(Task):
    name = "half"


def nothing():
    return 3


def needy(top, *args, **more):
    return sums(top)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("FIRST = 10\n")
    (tmp_path / "my_tasks.py").write_text(SUMS)
    return tmp_path / "my_tasks.py"


def test_function_and_class(file, tmp_path):
    task = tasks.get(f"{file}:sums", top=15, shots=2)
    assert sum(len(task.examples(split)) for split in task.splits) == 25 - 2
    described = task.describe()
    assert described["code"].startswith("my_tasks.py:sums ")
    assert described["prompting"]["shots"] == 2
    (tmp_path / "data.txt").write_text("one two")
    lines = tasks.get(f"{file}:Lines", data=str(tmp_path / "data.txt"))
    assert {example.id for example in lines.examples("search")} == {"one", "two"}
    assert lines.prompted(chat=True).describe()["code"].startswith("my_tasks.py:Lines ")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sum", {}, "my_tasks.py has no class or function 'sum'; did you mean 'sums'"),
        ("FIRST", {}, "has no class or function 'FIRST'"),
        ("sums", {"topp": 3}, "no option 'topp'; did you mean 'top'"),
        ("sums", {"data": "x"}, "takes no data, got 'x'"),
        ("Lines", {}, "needs data"),
        ("needy", {}, "missing a required argument: 'top'"),
        ("Half", {}, "task 'Half' of .* lacks describe, examples, fingerprint, reduce, requests, splits"),
        ("nothing", {}, "'nothing' of .* gives int, not a moeopt.tasks.Task"),
    ],
)
def test_bad_names_are_named(file, name, options, message):
    with pytest.raises(TaskError, match=message):
        tasks.get(f"{file}:{name}", **options)


def test_bad_files_are_named(file, tmp_path):
    with pytest.raises(TaskError, match=r"cannot read task file .*absent.py: No such file"):
        tasks.get(f"{tmp_path}/absent.py:sums")
    file.write_text("import nowhere_at_all\n")
    with pytest.raises(TaskError, match=r"my_tasks.py fails: ModuleNotFoundError: No module named 'nowhere_at_all'"):
        tasks.get(f"{file}:sums")
    file.write_text("def broken(:\n")
    with pytest.raises(TaskError, match=r"my_tasks.py fails: SyntaxError"):
        tasks.get(f"{file}:sums")


def test_search_from_the_command_line(file, tmp_path, capsys):
    command = ["search", str(moeopt.demo.MODEL), "--task", f"{file}:sums", "--limit", "4", "--keep", "4"]
    command += ["--sampler", "random", "--storage", f"sqlite:///{tmp_path}/s.db", "--study", "m"]
    command += ["--task-option", "shots=2", "--trials"]
    assert main([*command, "1"]) == 0
    assert "1 trials done" in capsys.readouterr().out
    assert main([*command, "2", "--task-option", "chat=true"]) == 2
    assert "task.prompting.chat" in capsys.readouterr().err
    assert main([*command, "2", "--study", "n", "--task-option", "chat=true"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    file.write_text(SUMS + "# changed\n")
    assert main([*command, "2"]) == 2
    assert "task.code: study has 'my_tasks.py:sums" in capsys.readouterr().err
