"""What users mistype: each is one error, said when it is given, and nothing is left behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

import moeopt
from moeopt.cli import main
from moeopt.errors import ModelError, MoeoptError, SpaceError, StudyError
from moeopt.plan import ModelShape
from moeopt.samplers import get
from moeopt.tasks import TextTask

optuna.logging.set_verbosity(optuna.logging.WARNING)
TASK = TextTask("toy", search=[f"the {a} cat sat" for a in ("red", "old", "big", "fat")], window=16)


@pytest.fixture(scope="module")
def model(make_mixtral: Any) -> Any:
    return make_mixtral(layers=2, experts=4, hidden=16, intermediate=16)


@pytest.fixture(scope="module")
def parts(model: Any, tiny_tokenizer: Any) -> dict[str, Any]:
    space = moeopt.PruneSpace.of(model, keep=2, encoding="rows")
    return {"model": model, "tokenizer": tiny_tokenizer, "task": TASK, "space": space}


@pytest.fixture(scope="module")
def objective(parts: dict[str, Any]) -> moeopt.Objective:
    return moeopt.Objective(**parts)


NO_PART = {
    "a model's path": ({"model": "mixtral"}, "moeopt.load", "'mixtral'"),
    "a model's Path": ({"model": Path("mixtral")}, "moeopt.load", "Path('mixtral')"),
    "what load returns": ({"model": ("model", "tokenizer")}, "moeopt.load", "tuple"),
    "a model's class": ({"model": type(TASK)}, "the class TextTask"),
    "a tokenizer's path": ({"tokenizer": "mixtral"}, "tokenizer", "'mixtral'"),
    "no tokenizer": ({"tokenizer": None}, "tokenizer", "None"),
    "a task's name": ({"task": "boolq"}, "moeopt.tasks.get('boolq')"),
    "a task's class": ({"task": TextTask}, "task", "the class TextTask"),
    "a task's data": ({"task": Path("boolq.jsonl")}, "task", "boolq.jsonl"),
    "a study's URL": ({"storage": "sqlite:///x.db"}, "create_study(storage=...)", "merged_weights", "x.db"),
    "a study's Path": ({"storage": Path("x.db")}, "create_study(storage=...)", "merged_weights"),
    "an open storage": ({"storage": optuna.storages.InMemoryStorage()}, "create_study", "InMemoryStorage"),
    "no place for weights": ({"merged_weights": "disk"}, "merged_weights", "'scratch'", "'disk'"),
    "a split that is none": ({"split": "train"}, "'train'"),
    "a list of splits": ({"split": ["search"]}, "split"),
    "no examples": ({"limit": 0}, "limit", "0"),
    "a text of a number": ({"limit": "10"}, "limit", "'10'"),
    "a share of examples": ({"limit": 0.5}, "limit", "0.5"),
    "a flag": ({"limit": True}, "limit", "True"),
    "no tokens": ({"batch_tokens": 0}, "batch_tokens", "0"),
    "half a length": ({"max_length": 1.5}, "max_length", "1.5"),
    "a negative memory": ({"prefix_memory": -1}, "prefix_memory", "-1"),
    "a memory with its unit": ({"prefix_memory": "1GiB"}, "prefix_memory", "'1GiB'"),
    "a device that is none": ({"prefix_device": "gpu"}, "prefix_device", "'gpu'"),
    "a score that is none": ({"score": "klx"}, "score", "'klx'", "kl"),
    "a list of scores": ({"score": ["kl"]}, "score", "kl"),
    "a share for compression": ({"compression": 0.5}, "compression", "0.5"),
}
NO_OBJECTIVE = {
    "a space's name": ({"space": "eep"}, "EEPSpace.of", "'eep'"),
    "a space's class": ({"space": moeopt.EEPSpace}, "the class EEPSpace"),
    "a model's shape": ({"space": ModelShape(2, 4, 2)}, "space", "ModelShape"),
    "no rung": ({"rungs": 0}, "rungs", "0"),
    "a list of rungs": ({"rungs": [1, 4]}, "rungs"),
    "a report that is none": ({"report": "sum"}, "report", "'sum'"),
    "a weight of text": ({"active_weight": "0.1"}, "active_weight", "'0.1'"),
}


@pytest.mark.parametrize("name", [*NO_PART, *NO_OBJECTIVE])
def test_evaluators_and_objectives_say_what_is_not_what_they_take(name: str, parts: dict[str, Any]) -> None:
    wrong, *named = {**NO_PART, **NO_OBJECTIVE}[name]
    kind, taken = (moeopt.Objective, [*parts]) if name in NO_OBJECTIVE else (moeopt.Evaluator, [*parts][:3])
    with pytest.raises(MoeoptError) as error:
        kind(**{part: parts[part] for part in taken} | wrong)
    assert all(text in str(error.value) for text in named), str(error.value)
    assert len(str(error.value)) < 400


Call = Callable[[moeopt.Objective, str], Any]


def created(objective: moeopt.Objective, url: str, **options: Any) -> Any:
    return moeopt.create_study(**{"study_name": "s", "objective": objective, "storage": url} | options)


NO_CALL: dict[str, tuple[Call, str]] = {
    "the loss alone": (lambda o, url: created(lambda trial: 0.0, url), "objective must be a moeopt.Objective"),
    "the class": (lambda o, url: created(moeopt.Objective, url), "the class Objective"),
    "a Path": (lambda o, url: created(o, Path(url[10:])), "sqlite:///"),
    "a file": (lambda o, url: created(o, url[10:]), "sqlite:///"),
    "a study for a storage": (lambda o, url: created(o, optuna.create_study()), "storage .*Study"),
    "one warm start": (lambda o, url: created(o, url, warm_starts="naee"), r"\['naee'\]"),
    "a file to start from": (lambda o, url: created(o, url, warm_starts=[Path("plan")]), "warm start"),
    "no warm starts": (lambda o, url: created(o, url, warm_starts=None), "warm_starts"),
    "half a seed": (lambda o, url: created(o, url, seed=0.5), "seed .*0.5"),
    "a text of a seed": (lambda o, url: created(o, url, seed="0"), "seed .*'0'"),
    "a sampler's class": (lambda o, url: created(o, url, sampler=moeopt.samplers.EEPSampler), "sampler"),
    "a pruner's class": (lambda o, url: created(o, url, pruner=moeopt.RacingPruner), "pruner"),
    "a number for a name": (lambda o, url: created(o, url, study_name=3), "name .*3"),
    "a study by its name": (lambda o, url: moeopt.optimize("s", o, n_trials=1), "optuna.Study.*'s'"),
    "objective and study": (lambda o, url: moeopt.optimize(o, created(o, None), n_trials=1), "optuna.Study.*Objective"),
    "a loss": (lambda o, url: moeopt.optimize(created(o, None), 0.5, n_trials=1), "objective .*0.5"),
    "one callback": (
        lambda o, url: moeopt.optimize(created(o, None), o, n_trials=1, callbacks=moeopt.report.dashboard.Refresh()),
        "callbacks is a list",
    ),
    "loading a Path": (lambda o, url: moeopt.load_study("s", Path(url[10:])), "sqlite:///"),
    "loading from nothing": (lambda o, url: moeopt.load_study("s", None), "storage .*None"),
    "loading no name": (lambda o, url: moeopt.load_study(None, optuna.storages.InMemoryStorage()), "name"),
    "name and storage": (lambda o, url: moeopt.load_study(url, "s"), "storage .*'s'"),
    "a worker of a Path": (lambda o, url: moeopt.run_worker(Path(url[10:]), "s"), "sqlite:///"),
    "a worker of no study": (lambda o, url: moeopt.run_worker(url, "s"), "no database"),
    "a worker's task by name": (lambda o, url: moeopt.run_worker(url, "s", task="boolq"), "task .*'boolq'"),
    "a worker's pruner by name": (lambda o, url: moeopt.run_worker(url, "s", pruner="racing"), "pruner .*'racing'"),
    "a worker's device": (lambda o, url: moeopt.run_worker(url, "s", device_map="gpu"), "device_map .*'gpu'"),
    "a worker's dtype": (lambda o, url: moeopt.run_worker(url, "s", dtype="float8"), "dtype .*'float8'"),
}


@pytest.mark.parametrize("name", NO_CALL)
def test_a_call_says_what_is_not_what_it_takes(name: str, objective: moeopt.Objective, tmp_path: Path) -> None:
    call, named = NO_CALL[name]
    with pytest.raises(MoeoptError) as error:
        call(objective, f"sqlite:///{tmp_path}/s.db")
    assert re.search(named, str(error.value)), str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_takes_a_checkpoint_and_no_model(
    objective: moeopt.Objective, checkpoint: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    created(objective, url)
    with pytest.raises(ModelError, match=r"folder, or a hub id .*MixtralForCausalLM"):
        moeopt.run_worker(url, "s", model=objective.model, n_trials=1)
    with pytest.raises(MoeoptError, match="unknown sampler 'eepp'"):
        moeopt.run_worker(url, "s", model=str(checkpoint / "model"), sampler="eepp", n_trials=1)


# Names --------------------------------------------------------------------------------------------------------------

NO_NAME = st.sampled_from(["", " ", "\t", "a ", " a", "a\nb", "a\x00b", "\x1b[31m", "a\u202eb", "\udc80", "n" * 513])


@given(NO_NAME | st.text(st.characters(categories=["Zs", "Zl", "Zp", "Cc", "Cf"]), max_size=9))
def test_a_study_has_a_name_that_can_be_typed_again(name: str) -> None:
    space = moeopt.PruneSpace(ModelShape(1, 2, 1), keep=1)
    assert space.size
    with pytest.raises(StudyError, match="name"):
        moeopt.study.check_name(name)


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=512))
def test_any_other_name_is_fine(name: str) -> None:
    moeopt.study.check_name(name)


# What is enqueued ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["local", "plain"])
@pytest.mark.parametrize("value", [4, -1, 1e300])
def test_a_number_out_of_range_fails_its_trial_alone(
    objective: moeopt.Objective, sampler: str, value: float, tmp_path: Path
) -> None:
    space, url = objective.space, f"sqlite:///{tmp_path}/s.db"
    if sampler == "plain":
        study = optuna.create_study(storage=url, sampler=optuna.samplers.RandomSampler(seed=0))
    else:
        study = moeopt.create_study(objective=objective, storage=url, sampler=sampler)
    study.enqueue_trial({space.names[1]: value})
    study.enqueue_trial({space.names[1]: 3})
    with pytest.raises(SpaceError, match=re.escape(space.names[1])):
        study.optimize(objective, n_trials=1)
    study.optimize(objective, n_trials=2)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert "from 0 to 3" in study.trials[0].user_attrs["failure"]
    assert study.trials[1].params[space.names[1]] == 3
    assert moeopt.study.reclaim(study) == []


def test_a_genotype_out_of_range_fails_its_trial_alone(objective: moeopt.Objective) -> None:
    import numpy as np

    from moeopt.trials import genome

    study = moeopt.create_study(objective=objective, storage=None, sampler="local")
    size = objective.space.size
    for x in (np.full(size, 9.0), np.zeros(size + 1)):
        study.add_trial(genome.waiting(genome.pack(genome.GENOME, x.astype(np.float32)), {}))
    for named in ("from 0 to 3", f"brings {size + 1} numbers"):
        with pytest.raises(SpaceError, match=named):
            study.optimize(objective, n_trials=1)
    study.optimize(objective, n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "COMPLETE"]


# The command line ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(f"text number {i} says that {i} and {i} are {2 * i}. " * 4)
    return folder


BAD_COMMANDS = {
    "no name": (["--study", ""], "name", "''"),
    "white space": (["--study", "  "], "name"),
    "a new line": (["--study", "a\nb"], "name", r"\n"),
    "a database in memory": (["--storage", "sqlite:///:memory:"], "memory", "sqlite:///moeopt.db"),
    "a database in memory, in short": (["--storage", "sqlite://"], "memory"),
    "a named database in memory": (["--storage", "sqlite:///file:x?mode=memory&uri=true"], "memory"),
    "a device that is not here": (["--device-map", "cuda:99"], "'cuda:99'"),
    "a device that is none": (["--device-map", "gpu:0"], "'gpu:0'", "'cpu'"),
    "a device without weights": (["--device-map", "meta"], "'meta'"),
    "a sampler that is none": (["--sampler", "eepp"], "'eepp'"),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_a_bad_command_is_one_line_and_leaves_no_database(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    more, *named = BAD_COMMANDS[name]
    model = str(checkpoint / "model")
    task = ["--task", "text", "--data", str(checkpoint / "texts"), "--limit", "2"]
    assert main(["search", model, *task, "--study", "s", "--keep", "2", "--trials", "2", *more]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert all(text in err for text in named), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["select", "compare-methods", "lm-eval", "profile", "worker"])
def test_every_command_says_that_a_device_is_not_here(
    command: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, where = str(checkpoint / "model"), ["--storage", f"sqlite:///{checkpoint}/s.db", "--study", "s"]
    task = ["--task", "text", "--data", str(checkpoint / "texts")]
    searched = ["search", model, *task, *where, "--keep", "2", "--trials", "2", "--limit", "2", "--sampler", "random"]
    assert main(searched) == 0
    arguments = {
        "select": ["select", model, *task, *where],
        "compare-methods": ["compare-methods", model, *task, "--keep", "2"],
        "lm-eval": ["lm-eval", model, "--tasks", "arc_easy"],
        "profile": ["profile", model],
        "worker": ["worker", *where, "--model", model],
    }[command]
    capfd.readouterr()
    assert main([*arguments, "--device-map", "cuda:99"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert err.count("Error: ") == 1
    assert "cuda:99" in err


def test_devices_and_types() -> None:
    from moeopt.models import check_device_map, check_dtype

    for fine in (None, "auto", "balanced", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "disk"}):
        check_device_map(fine)
    for wrong in ("disk", "gpu", "cpu:x", 1.5, True, "", {"": "gpu"}, {"": None}, "cuda:99", 99):
        with pytest.raises(ModelError, match="device_map"):
            check_device_map(wrong)
    import torch

    for fine in ("auto", None, "bfloat16", torch.float32):
        check_dtype(fine)
    for wrong in ("float8", "int8", "nn", torch.int8, 16, "Float32"):
        with pytest.raises(ModelError, match="dtype"):
            check_dtype(wrong)


def test_refresh_prints_nothing(objective: moeopt.Objective, capfd: pytest.CaptureFixture[str]) -> None:
    study = moeopt.create_study(objective=objective, storage=None, sampler=get("local", objective.space, seed=0))
    refresh = moeopt.report.dashboard.Refresh(every=0.0)
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        study.optimize(objective, n_trials=2)
        capfd.readouterr()
        refresh(study)
        assert capfd.readouterr() == ("", "")
        optuna.create_study()
        assert "A new study created" in capfd.readouterr().err
    finally:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert "moeopt-1-progress" in str(moeopt.study.storage.attributes.study_attributes(study).keys())
