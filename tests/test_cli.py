"""The command line as a user meets it: one clear line for bad input, and searches that survive Ctrl-C and kill -9."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moeopt
from moeopt.cli import app, main
from moeopt.cli.arguments import for_trials, storage_again
from moeopt.cli.commands import COMMANDS
from moeopt.exporting import why_not_stock
from moeopt.plan import Plan
from moeopt.study import load_study, space_of
from moeopt.trials import genome

LAYERS, EXPERTS = 3, 6
TRIALS = 8
EEP = (
    "--warm-start", "none", "--sampler-option", "initial=3", "--sampler-option", "prune_until=5",
    "--trials", str(TRIALS),
)  # fmt: skip
SLOW = ("torch", "transformers", "nevergrad")


@dataclass(frozen=True)
class Place:
    """A folder with a checkpoint (3 layers, 6 experts, top-2), a task file, and a study of 8 EEP trials."""

    folder: Path
    model: Path
    data: Path
    storage: str

    def search(self, *more: str, study: str = "s", storage: str | None = None, keep: int = 3) -> list[str]:
        """Arguments of a search that runs as it is."""
        goal = ["--task", "multiple_choice", "--data", str(self.data), "--limit", "4"]
        where = ["--storage", storage or self.storage, "--study", study]
        kept = [] if {"--keep", "merge", "active"} & set(more) else ["--keep", str(keep)]
        return ["search", str(self.model), *goal, *where, *kept, *more]


@pytest.fixture(scope="module")
def place(make_mixtral: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("cli")
    make_mixtral(layers=LAYERS, experts=EXPERTS, hidden=16, intermediate=16).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} and 1 make", "options": [str(i + 1), str(i + 2)], "answer": i % 2} for i in range(60)]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = Place(folder, folder / "model", folder / "task.jsonl", f"sqlite:///{folder / 'studies.db'}")
    assert main(place.search(*EEP)) == 0
    return place


Refused = Callable[..., str]


BAD_SEARCH = {
    "more experts than there are": (["--keep", "9"], "keep=9", "6"),
    "fewer experts than active": (["--keep", "1"], "keep=1", "k=2"),
    "no expert active": (["--active", "0"], "--active", "'0'"),
    "more active than kept": (["--active", "4"], "keep=3", "k=4"),
    "no range of active experts": (["--active", "2-"], "--active", "'2-'"),
    "a range of one": (["--active", "2-2"], "(2, 2)", "low < high"),
    "a range beyond what is kept": (["--active", "1-4"], "(1, 4)", "the 3 that are kept"),
    "skipping more than all": (["--skip", "1.5"], "--skip", "1.5"),
    "groups of nothing searched": (["--active", "1", "--active-groups", "1"], "--active-groups", "--skip"),
    "too many active groups": (["--skip", "0.5", "--active-groups", "4"], "4", "3 MoE layers"),
    "active groups that are none": (["--skip", "0.5", "--active-groups", "x"], "--active-groups", "'x'"),
    "an active space of nothing": (["--space", "active"], "--space active", "--skip"),
    "a negative weight": (["--active-weight", "-1"], "--active-weight", "'-1'"),
    "more groups than layers": (["--groups", "5"], "5", "3 MoE layers"),
    "no group": (["--groups", "0"], "groups", "0"),
    "overlapping ranges": (["--groups", "0-1,1-2"], "1-2", "overlaps"),
    "a gap between ranges": (["--groups", "0-0,2-2"], "2-2", "leaves out layer 1"),
    "ranges beyond the model": (["--groups", "0-7"], "0, 7", "beyond layer 2"),
    "no ranges at all": (["--groups", "a-b"], "'a-b'", "0-7,8-31"),
    "no trial": (["--trials", "0"], "--trials", "'0'"),
    "half a trial": (["--trials", "1.5"], "--trials", "'1.5'"),
    "unknown score": (["--score", "klx"], "--score", "'klx'", "'kl'"),
    "no example": (["--limit", "0"], "--limit", "'0'"),
    "unknown dtype": (["--dtype", "float8"], "'float8'", "bfloat16"),
    "unknown sampler": (["--sampler", "eepp"], "'eepp'", "did you mean 'eep'"),
    "unknown hyperparameter": (["--sampler-option", "intial=3"], "'intial'", "'initial'"),
    "hyperparameter without a value": (["--sampler-option", "initial"], "'initial'", "NAME=VALUE"),
    "hyperparameter out of range": (["--sampler-option", "p_row=2"], "p_row", "2"),
    "unknown task": (["--task", "bolq"], "'bolq'", "did you mean 'boolq'"),
    "unknown option of a task": (["--task-option", "delimeter=x"], "'delimeter'", "'delimiter'"),
    "missing data": (["--data", "missing.jsonl"], "missing.jsonl", "does not exist"),
    "merging around nothing": (["--space", "merge"], "--around", "plan"),
    "encoding of another space": (["--encoding", "rows"], "--encoding rows", "prune"),
    "keep of a merge space": (["--space", "merge", "--keep", "3"], "--keep 3", "range"),
    "a total of one number": (["--keep", "3", "--total", "8"], "--total 8", "range"),
    "a total out of reach": (["--keep", "2-4", "--total", "40"], "total", "40"),
    "a range of experts that is none": (["--keep", "4-2"], "(4, 2)", "low < high"),
    "a method that does not rank": (["--space", "prune", "--keep", "2-4", "--order", "naee"], "naee"),
    "an objective that is none": (["--objectives", "loss,size"], "'size'", "bytes"),
    "a constraint that is none": (["--constraint", "bytes < 3"], "'bytes < 3'", "<="),
    "several objectives of one": (["--objectives", "loss,active", "--sampler", "cmaes"], "cmaes", "nsgaii"),
    "missing plan to start from": (["--warm-start", "missing.safetensors"], "missing.safetensors", "no plan file"),
    "unknown method to start from": (["--warm-start", "naee,repa"], "'repa'", "did you mean 'reap'"),
    "method that aliases": (["--warm-start", "m_smoe"], "m_smoe", "start from m_smoe_summed"),
    "method of novices": (["--warm-start", "mone"], "mone has novices", "no search space"),
    "misspelt option": (["--patients", "3"], "--patients", "--patience"),
    "storage that is no URL": (["--storage", "studies.db"], "'studies.db'", "sqlite:///"),
    "storage in no folder": (["--storage", "sqlite:////no/such/x.db"], "/no/such", "does not exist"),
    "study not to be resumed": (["--no-resume"], "'s'", "already exists"),
}


@pytest.mark.parametrize("name", BAD_SEARCH)
def test_a_search_that_cannot_be_names_the_value(name: str, place: Place, refused: Refused) -> None:
    options, *named = BAD_SEARCH[name]
    message = refused(place.search(*options))
    assert all(text in message for text in named), message


def test_a_space_without_keep_is_asked_for_it(place: Place, refused: Refused) -> None:
    arguments = [word for word in place.search() if word not in ("--keep", "3")]
    assert "--keep 4" in refused(arguments)


def test_what_is_not_a_moe_checkpoint_is_refused(place: Place, refused: Refused, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    arguments = place.search()
    assert "no config.json" in refused(["search", str(dense), *arguments[2:]])
    (dense / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    assert "dense" in refused(["search", str(dense), *arguments[2:]])
    assert "no checkpoint folder" in refused(["search", str(tmp_path / "nowhere"), *arguments[2:]])
    assert "is a file" in refused(["search", str(place.data), *arguments[2:]])


def test_plans_of_another_model_are_refused(place: Place, refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "plan.safetensors"
    Plan.one_hot([[0, 1, 2]] * 2, experts=EXPERTS, k=2).save(file)
    assert "2 layers" in refused(place.search("--warm-start", str(file)))
    assert "2 layers" in refused(place.search("--space", "merge", "--around", str(file)))
    assert "2 MoE layers" in refused(["export", str(place.model), str(tmp_path / "out"), "--plan", str(file)])
    assert not (tmp_path / "out").exists()


def test_a_study_is_not_resumed_with_something_else(place: Place, refused: Refused) -> None:
    message = refused(place.search(*EEP, "--keep", "4", "--seed", "3"))
    assert "space.keep: study has 3, now 4" in message
    assert "sampler.seed: study has 0, now 3" in message
    assert "task.limit: study has 4, now 5" in refused([*place.search(*EEP), "--limit", "5"])


def test_databases_that_cannot_serve_are_refused(place: Place, refused: Refused, tmp_path: Path) -> None:
    text, other, ours = tmp_path / "text.db", tmp_path / "other.db", tmp_path / "ours.db"
    text.write_text("not a database, but long enough to be read as the header of one " * 20)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE songs (title)")
    optuna.create_study(storage=f"sqlite:///{ours}", study_name="s").add_trial(optuna.create_trial(value=1.0))
    assert "not a database" in refused(place.search(storage=f"sqlite:///{text}"))
    assert "songs" in refused(place.search(storage=f"sqlite:///{other}"))
    assert "not made by moeopt" in refused(place.search(storage=f"sqlite:///{ours}"))
    assert "readonly" in refused(place.search(storage=f"sqlite:///file:{ours}?mode=ro&uri=true"))
    with sqlite3.connect(ours, isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        assert "locked" in refused(place.search(storage=f"sqlite:///{ours}?timeout=1"))
        connection.execute("ROLLBACK")
    assert "no database" in refused(["show", "--storage", f"sqlite:///{tmp_path / 'new.db'}"])
    assert "no study 'z'" in refused(["show", "z", "--storage", place.storage])


def test_passwords_are_not_repeated(place: Place, refused: Refused) -> None:
    message = refused(place.search(storage="postgresql+psycopg://me:secret@127.0.0.1:1/x"))
    assert "secret" not in message
    assert "127.0.0.1" in message


def test_output_folders_are_checked_before_anything_else(place: Place, refused: Refused, tmp_path: Path) -> None:
    missing = str(tmp_path / "no-model")
    assert "not empty" in refused(["export", missing, str(place.folder), "--plan", "missing"])
    assert "is a file" in refused(["export", missing, str(place.data), "--plan", "missing"])
    assert "cannot write" in refused(["export", missing, str(place.data / "below"), "--plan", "missing"])


def test_sources_of_plans_are_checked(place: Place, refused: Refused, tmp_path: Path) -> None:
    eep = tmp_path / "solution.pth"
    matrices = torch.eye(EXPERTS)[:3]
    torch.save({"others": matrices, "others_transfer": matrices}, eep)
    study = ["--study", "s", "--storage", place.storage]
    assert "--layers" in refused(["plan", str(eep)])
    assert "SOURCE" in refused(["plan"])
    assert "SOURCE" in refused(["plan", str(eep), *study])
    assert "not a plan" in refused(["plan", str(place.data)])
    assert "no trial 99" in refused(["plan", *study, "--trial", "99"])
    assert "'worst'" in refused(["plan", *study, "--trial", "worst"])
    assert "cannot write" in refused(["plan", str(eep), "--layers", "3", "--out", str(tmp_path / "no" / "x")])
    assert main(["plan", str(eep), "--layers", "3"]) == 0


@pytest.mark.slow
def test_help_versions_and_early_errors_import_nothing_slow(place: Place) -> None:
    plain = place.search()
    goal = ["compare-methods", str(place.model), "--task", "multiple_choice", "--data", str(place.data), "--keep", "3"]
    wrong = ["--methods nae", "--active 0", "--keep 4,1", "--calibration-task txt", "--calibration-option window=32"]
    early = [
        *([*goal, *options.split()] for options in wrong),
        *([command, "-h"] for command in COMMANDS),
        [],
        ["--version"],
        ["serch"],
        ["search", "/no/such/model", *plain[2:]],
        *(place.search(*options) for options, *_ in BAD_SEARCH.values()),
        ["demo", "--skill", "juggling"],
        ["plan", "missing"],
        ["export", "model", str(place.folder), "--plan", "x"],
        ["show", "z", "--storage", place.storage],
    ]
    code = (
        "import json, sys\nfrom moeopt.cli import main\n"
        "for given in json.loads(sys.argv[1]):\n    main(given)\n"
        f"    loaded = [name for name in {SLOW!r} if name in sys.modules]\n    assert not loaded, (given, loaded)\n"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(early)], capture_output=True, check=True, cwd=place.folder)


def test_help_shows_every_option_and_its_default() -> None:
    shown = CliRunner().invoke(app, ["search", "--help"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    for text in ("--keep", "--sampler-option", "default: 400", "sqlite:///moeopt.db", "Examples"):
        assert text in shown.output
    assert CliRunner().invoke(app, ["--version"]).output == f"moeopt {moeopt.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["search", "m", "--task", "t", "--study_name", "s", "--device", "cpu", "--n-trials", "0"], "--trials"),
        (["worker", "--study-name", "s", "--n_trials", "0"], "--trials"),
        (["lm-eval", "m", "--tasks", "t", "--num_fewshot", "-1"], "--num-fewshot"),
        (["lm_eval", "m", "--tasks", "t", "--apply_chat_template", "--confirm_run_unsafe_code", "--batch_size", "2",
          "--output_path", "/no/such/folder/x.json"], "/no/such/folder/x.json"),
        (["compare-methods", "m", "--task", "t", "--output_path", "x", "--keep", "none"], "--keep"),
    ],
)  # fmt: skip
def test_options_are_known_by_the_names_of_lm_eval_and_optuna(
    arguments: list[str], named: str, refused: Refused
) -> None:
    message = refused(arguments)
    assert named in message
    assert "No such option" not in message


def test_shells_complete_commands_options_and_values() -> None:
    for words, expected in {"moeopt sea": "search", "moeopt search --sampler-o": "--sampler-option"}.items():
        environment = {"_MOEOPT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert CliRunner().invoke(app, [], prog_name="moeopt", env=environment).output.split() == [expected]
    script = CliRunner().invoke(app, [], prog_name="moeopt", env={"_MOEOPT_COMPLETE": "source_bash"}).output
    assert "complete -o default -F" in script


DYING = """
import os, signal, sys
from moeopt.evaluation import Evaluator
whole, calls = Evaluator.race, 0
def dying(self, plan=None, known=None):
    global calls
    calls += 1
    if calls == 5:  # the first is of the full model
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return whole(self, plan, known)
Evaluator.race = dying
from moeopt.cli import main
sys.exit(main(sys.argv[2:]))
"""
"""Runs the command line, and sends itself a signal in the middle of its fourth trial."""


def dies(signal_name: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DYING, signal_name, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def by_slot(storage: str, study: str = "s") -> dict[int, tuple[Any, ...]]:
    """Loss, operator and genotype of every completed trial, by its place in the sequence of proposals."""
    trials = load_study(study, storage).get_trials()
    done = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    slots = {
        genome.slot(t, trials): (t.value, t.user_attrs["operator"], np.asarray(genome.read(t)).tobytes()) for t in done
    }
    assert len(slots) == len(done)
    return slots


@pytest.mark.slow
def test_a_raced_search_with_local(place: Place, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    arguments = place.search("--limit", "24", "--rungs", "2", "--sampler", "local", "--trials", "10", storage=storage)
    arguments = [*arguments, "--prefix-memory", "8"]
    assert main(arguments) == 0
    study = load_study("s", storage)
    assert study.user_attrs["noise_floor"] >= 0
    half, whole = study.user_attrs["moeopt"]["evaluation"]["rungs"]
    assert all(set(trial.intermediate_values) <= {half, whole} for trial in study.trials)
    pruned = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.PRUNED]
    assert all(list(trial.intermediate_values) == [half] and "estimate" in trial.user_attrs for trial in pruned)
    assert main(arguments) == 0
    assert main([*arguments, "--rungs", "3"]) == 2


def test_automatic_starts_are_those_that_the_space_holds_and_memory_allows() -> None:
    from moeopt.plan import ModelShape
    from moeopt.study import automatic

    assert automatic(moeopt.PruneSpace(ModelShape(2, 64, 2), keep=8)) == ("naee", "loss_aware")
    assert automatic(moeopt.EEPSpace(ModelShape(2, 128, 8), keep=64)) == ("loss_aware",)
    merging = moeopt.MergeSpace(ModelShape(2, 4, 2), around=moeopt.Plan.one_hot([[0, 1]] * 2, experts=4, k=2))
    assert automatic(merging) == ()


@pytest.mark.slow
def test_ctrl_c_while_dev_is_scored_loses_nothing(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    arguments = place.search("--sampler", "random", "--trials", "5", storage=f"sqlite:///{tmp_path / 'x.db'}")
    with monkeypatch.context() as patch:
        patch.setattr("moeopt.results.selection.held", interrupted)
        assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "5 trials done. Best: trial" in said
    assert "was interrupted; the same command again scores it" in said
    assert main(arguments) == 0
    assert "was interrupted" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "rungs"), [("guided", 4), ("random", 1)])
def test_what_races_by_default_goes_on_as_it_began(place: Place, tmp_path: Path, sampler: str, rungs: int) -> None:
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    arguments = place.search("--limit", "24", "--sampler", sampler, "--trials", "3", "--no-held", storage=storage)
    assert main(arguments) == 0
    study = load_study("s", storage)
    assert len(study.user_attrs["moeopt"]["evaluation"]["rungs"]) == rungs
    assert main([*arguments, "--trials", "4"]) == 0
    alone = [*place.search("--limit", "24", "--sampler", sampler, "--trials", "3", "--no-held"), "--study", "t"]
    assert main([*alone, "--rungs", "1", "--guide", "0.1", "--storage", storage]) == 0
    assert main([*alone, "--storage", storage, "--trials", "4"]) == 0
    study = load_study("t", storage)
    assert (len(study.user_attrs["moeopt"]["evaluation"]["rungs"]), len(study.trials)) == (1, 4)


def test_prompts_without_answers_are_searched(place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"a prompt of some length, number {i}"}) + "\n" for i in range(40))
    )
    storage = f"sqlite:///{tmp_path / 'new.db'}"
    task = ["--task", "text", "--data", str(prompts), "--task-option", "column=prompt", "--limit", "4"]
    more = [*task, "--sampler", "random", "--trials", "4", "--storage", storage, "--study", "u"]
    again = ["search", str(place.model), "--keep", "3", *more]
    assert main([*again, "--score", "kl"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"full model: \d+ positions in .* s, \d+ tokens of each kept in .* MiB", err)
    assert re.search(r"loss 0\.\d+, agreement \d+\.\d% on the search split", out)
    study = load_study("u", storage)
    assert all(trial.value > 0 for trial in study.trials)
    assert main(["show", "u", "--storage", storage]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"score +kl\b", shown)
    assert "agreement" in shown
    assert main([*again, "--score", "acceptance"]) == 2
    assert "'kl', now 'acceptance'" in capsys.readouterr().err


@pytest.mark.slow
def test_k_and_skipping_are_searched(place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    searched = ["--active", "1-3", "--skip", "0.5", "--active-groups", "2", "--active-weight", "0.25"]
    pruning = place.search("--space", "prune", *searched, "--sampler", "local", "--trials", "8", storage=storage)
    assert main(pruning) == 0
    assert "experts active" in capsys.readouterr().out
    study = load_study("s", storage)
    space = space_of(study)
    assert space.names[-4:] == ("k.L0", "k.L1-2", "skip.L0", "skip.L1-2")
    assert space.high[-4:].tolist() == [3, 3, 0.5, 0.5]
    assert study.user_attrs["moeopt"]["evaluation"]["active_weight"] == 0.25
    assert len({trial.user_attrs["active"] for trial in study.trials}) > 1
    assert "evaluation.active_weight: study has 0.25, now 0.5" in refused_late(
        [*pruning, "--active-weight", "0.5"], capsys
    )
    assert main(["show", "s", "--storage", storage]) == 0

    file = tmp_path / "plan.safetensors"
    assert main(["plan", "--study", "s", "--storage", storage, "--out", str(file)]) == 0
    alone = ["--space", "active", "--active", "1-2", "--around", str(file), "--sampler", "tpe", "--trials", "3"]
    assert main(place.search(*alone, storage=storage, study="around")) == 0
    opened = load_study("around", storage)
    plan = space_of(opened).plan(opened.trials[0])
    assert [layer.kept for layer in plan.layers] == [layer.kept for layer in Plan.load(file).layers]


def refused_late(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that is refused once the model is loaded."""
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_finishes_the_trial_and_says_how_to_go_on(place: Place, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    stopped = dies("SIGINT", place.search(*EEP, storage=storage))
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert len(by_slot(storage)) == 4
    command = shlex.split(stopped.stderr.splitlines()[-1])
    assert command[0] == "moeopt"
    assert main(command[1:]) == 0
    assert by_slot(storage) == by_slot(place.storage)


def test_what_follows_the_number_of_trials_and_stays_as_a_study_has_it() -> None:
    assert for_trials("nevergrad:DE", {}, 3, {}) == {"budget": 3}
    assert for_trials("nevergrad:DE", {}, 4, {"sampler": {"budget": 3}}) == {"budget": 3}
    assert for_trials("nevergrad:DE", {"budget": 7}, 3, {}) == {"budget": 7}
    assert for_trials("cmaes", {"sigma": 2}, 3, {}) == {"sigma": 2}
    sizes = {"initial": 2, "prune_until": 3}
    assert for_trials("eep", {}, 12, {}) == sizes
    assert for_trials("eep", {}, 400, {"sampler": {"name": "eep", **sizes}}) == sizes
    assert for_trials("eep", {"initial": 4}, 12, {"sampler": {"name": "eep", **sizes}}) == {**sizes, "initial": 4}


def test_eep_says_how_it_divides_a_small_number_of_trials(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = place.search("--warm-start", "none", "--no-reference", "--no-held", storage=f"sqlite:///{tmp_path / 'x.db'}")
    assert main([*few, "--trials", "2"]) == 0
    assert capsys.readouterr().err.count("EEP in 2 trials: initial=2, prune_until=3") == 1
    assert main([*few, "--trials", "3"]) == 0
    assert "EEP in" not in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_in_a_trial_loses_that_trial_only(place: Place, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    killed = dies("SIGKILL", place.search(*EEP, storage=storage))
    assert killed.returncode == -signal.SIGKILL
    states = [trial.state.name for trial in load_study("s", storage).get_trials()]
    assert states == ["COMPLETE"] * 3 + ["RUNNING"]
    assert main(place.search(*EEP, storage=storage)) == 0
    assert len(by_slot(storage)) == TRIALS
    assert by_slot(storage) == by_slot(place.storage)


def test_resuming_a_complete_study_runs_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before = by_slot(place.storage)
    assert main(place.search(*EEP)) == 0
    assert f"{TRIALS} of {TRIALS} trials done" in capsys.readouterr().err
    assert by_slot(place.storage) == before


def test_show_lists_and_describes(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--storage", place.storage]
    best = load_study("s", place.storage).best_trial
    capsys.readouterr()
    assert main(["show", *where]) == 0
    assert f"{best.value:.4f}" in capsys.readouterr().out
    assert main(["show", "s", *where]) == 0
    assert f"plan of the best trial, {best.number}" in capsys.readouterr().out
    assert main(["show", "s", *where, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["trials"]["done"] == TRIALS
    assert record["best"]["number"] == best.number
    assert record["best"]["loss"] == best.value
    assert [phase["phase"] for phase in record["phases"]] == ["prune", "merge"]
    assert [trial["loss"] for trial in record["top"]] == sorted(trial["loss"] for trial in record["top"])
    assert [row["layers"] for row in record["best_plan"]] == ["0", "1", "2"]
    assert main(["show", *where, "--json"]) == 0
    assert [study["name"] for study in json.loads(capsys.readouterr().out)] == ["s"]


def test_a_plan_goes_from_study_to_file_to_search_and_export(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    study, file = ["--study", "s", "--storage", place.storage], tmp_path / "plan.safetensors"
    assert main(["plan", *study, "--trial", "best-stock", "--out", str(file)]) == 0
    assert "An ordinary checkpoint can hold this plan" in capsys.readouterr().out
    plan = Plan.load(file)
    assert why_not_stock(plan) is None
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    merge = ["--space", "merge", "--around", str(file), "--router", "logit", "--sampler", "random", "--trials", "3"]
    assert main(place.search(*merge, "--warm-start", str(file), storage=storage, study="merge")) == 0
    opened = load_study("s", place.storage)
    space = space_of(opened)
    same = next(trial for trial in opened.trials if space.plan(trial) == plan)
    assert load_study("merge", storage).trials[0].value == pytest.approx(same.value, abs=1e-6)
    for i, arguments in enumerate((["--plan", str(file)], study, ["--study", "merge", "--storage", storage])):
        assert main(["export", str(place.model), str(tmp_path / f"out{i}"), *arguments]) == 0
        small = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{i}")
        assert small.config.num_local_experts == 3
        assert small.config.num_hidden_layers == LAYERS


@pytest.mark.slow
def test_a_search_starts_from_methods(place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    assert main(place.search("--sampler", "guided", "--trials", "6", storage=storage, study="auto")) == 0
    said = capsys.readouterr()
    assert said.err.count("starting from naee and loss_aware; --warm-start chooses others, or none") == 1
    study = load_study("auto", storage)
    assert [trial.user_attrs.get("method") for trial in study.trials[:3]] == ["naee", "loss_aware", None]
    assert "guide_layer_tokens" in study.trials[1].user_attrs
    gained = study.best_trial.number > 1
    assert ("of the gain held" in said.out, "held" in study.user_attrs) == (gained, gained)
    assert main(place.search("--sampler", "guided", "--trials", "7", storage=storage, study="auto")) == 0
    assert "starting from" not in capsys.readouterr().err
    assert len(load_study("auto", storage).trials) == 7
    search = place.search("--warm-start", "naee,reap", "--trials", "3", storage=storage, study="warm")
    assert main(search) == 0
    trials = load_study("warm", storage).trials
    assert [trial.user_attrs.get("method") for trial in trials] == ["naee", "reap", None]
    capsys.readouterr()
    assert main(["show", "warm", "--storage", storage, "--json"]) == 0
    top = json.loads(capsys.readouterr().out)["top"]
    assert {trial["method"] for trial in top} == {"naee", "reap", None}


def test_export_refuses_what_no_ordinary_checkpoint_holds(place: Place, refused: Refused, tmp_path: Path) -> None:
    opened = load_study("s", place.storage)
    space = space_of(opened)
    mapped = next(trial.number for trial in opened.trials if why_not_stock(space.plan(trial)) is not None)
    study = ["--study", "s", "--storage", place.storage, "--trial", str(mapped), "--form", "stock"]
    message = refused(["export", str(place.model), str(tmp_path / "out"), *study])
    assert "best-stock" in message
    assert not (tmp_path / "out").exists()


def test_what_is_printed_to_be_typed_again_needs_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql+psycopg://me:geheim@host/moeopt"
    assert storage_again(url) == ["--storage", "postgresql+psycopg://me:***@host/moeopt"]
    monkeypatch.setenv("MOEOPT_STORAGE", url)
    assert storage_again(url) == []
    assert storage_again("sqlite:///x.db") == ["--storage", "sqlite:///x.db"]


def test_a_search_ends_by_time_or_patience(place: Place, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'x.db'}"
    groups = ["--space", "prune", "--groups", "0-0,1-2", "--encoding", "subset", "--sampler", "random"]
    assert main(place.search(*groups, "--patience", "3", storage=storage)) == 0
    patient = load_study("s", storage)
    best = min(patient.trials, key=lambda trial: (trial.value, trial.number))
    assert len(patient.trials) == best.number + 4
    assert main(place.search(*groups, "--timeout", "0.2", storage=storage, study="t")) == 0
    assert 1 <= len(load_study("t", storage).trials) < 400


def test_a_front_over_numbers_of_experts(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--space", "prune", "--objectives", "loss,bytes", "--keep", "2-6", "--warm-start", "reap"]
    assert main(place.search(*more, "--trials", "6", "--no-held", study="front")) == 0
    assert "The front has" in (said := capsys.readouterr().out)
    assert "moeopt front front" in said
    study = load_study("front", place.storage)
    assert [t.user_attrs.get("method") for t in study.trials[:4]] == ["reap"] * 4
    assert [t.values[1] for t in study.trials[:4]] == sorted(t.values[1] for t in study.trials[:4])
    assert main(["show", "front", "--storage", place.storage]) == 0
    shown = capsys.readouterr().out
    assert "front, by its first objective" in shown
    assert "keep 2 to 6 of 6 experts" in shown
    assert main(["show", "--storage", place.storage]) == 0


def test_counts_alone_over_a_ranking_resume(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--space", "prune", "--keep", "2-6", "--total", "11", "--order", "reap", "--constraint", "bytes <= 1GB"]
    more += ["--sampler", "local", "--no-held"]
    assert main(place.search(*more, "--trials", "4", study="order")) == 0
    assert main(place.search(*more, "--trials", "6", study="order")) == 0
    study = load_study("order", place.storage)
    plans = [moeopt.spaces.space_of(study).plan(trial) for trial in study.trials]
    assert len(plans) == 6
    assert all(sum(layer.kept_experts for layer in plan.layers) <= 11 for plan in plans)
    assert all(t.constraints == {"bytes <= 1000000000": t.user_attrs["bytes"] - 1e9} for t in study.trials)
    assert "resuming" in capsys.readouterr().err
