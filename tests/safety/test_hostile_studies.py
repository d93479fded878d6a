"""A study that others wrote to gives one clear error, or is shown as plain text, and nothing is harmed."""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import optuna
import pytest

import moeopt
from moeopt.cli import arguments, main
from moeopt.errors import MoeoptError
from moeopt.exporting.base import Base
from moeopt.exporting.card import Weights, card
from moeopt.exporting.trials import trial_record
from moeopt.report.dashboard.digest import digest
from moeopt.report.dashboard.note import note
from moeopt.report.terminal import study_record, study_summary, study_view
from moeopt.results.method_comparison.searched import searched
from moeopt.results.selection import SELECTION, on_test, selected_trial
from moeopt.showing import HIDDEN, public
from moeopt.study import finished, reclaim, space_of, stalled
from moeopt.trials import genome
from moeopt.trials.description import DESCRIPTION


def visible_only(text: str) -> bool:
    return all(unicodedata.category(c) not in HIDDEN or c in "\n\t" for c in text)


def tried(call: Any, *args: Any) -> Any:
    """What a call gives, or its MoeoptError; any other exception fails the test."""
    try:
        return call(*args)
    except MoeoptError as error:
        refusal = error
    assert visible_only(str(refusal)), str(refusal)
    assert "\n" not in str(refusal)
    assert len(str(refusal)) < 2000
    return refusal


def shown(study: optuna.Study) -> None:
    from moeopt.report.terminal import consoles

    plan = arguments.plan_of(study, "best")[1] if study.get_trials() else None
    record = study_record(study)
    json.dumps(record)
    consoles()[0].print(study_view(record, plan))


def short(text: str) -> None:
    assert len(text) < 10_000


def exported(study: optuna.Study) -> None:
    told = trial_record(study.get_trials(deepcopy=False)[0], study, hostile.RECORD["plans"]["winner"])
    record = public({"moeopt": "0.1.0", "form": "stock", **told})
    text = card("x", Base("m"), moeopt.Plan.identity(2, 4, 2), record, Weights(2, 2), Weights(1, 1))
    assert len(text) < 100_000
    assert visible_only(text)


READERS = {
    "show": shown,
    "list": study_summary,
    "space": space_of,
    "searched": searched,
    "selected": selected_trial,
    "on test": on_test,
    "best stock": lambda study: arguments.plan_of(study, "best-stock"),
    "reference": moeopt.study.reference.read,
    "note": lambda study: short(note(digest(study), None, "sqlite:///x.db")),
    "exported": exported,
    "resumed": lambda study: moeopt.study.check_same(study, hostile.Distance(hostile.SPACES["eep"]()).describe()),
}


def read_all(study: optuna.Study, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    results = {name: tried(reader, study) for name, reader in READERS.items()}
    out = capsys.readouterr()
    assert visible_only(out.out + out.err)
    assert len(out.out) < 100_000
    return results


def copied(study: optuna.Study, **attrs: Any) -> optuna.Study:
    """A study in memory with the same trials, and these user attributes in place of its own."""
    copy = optuna.create_study(study_name=study.study_name)
    copy.add_trials(study.get_trials())
    for key, value in {**study.user_attrs, **attrs}.items():
        copy.set_user_attr(key, value)
    return copy


def test_an_honest_study_reads(capsys: pytest.CaptureFixture[str]) -> None:
    for space in hostile.SPACES:
        results = read_all(hostile.honest(space=space), capsys)
        errors = {name: error for name, error in results.items() if isinstance(error, MoeoptError)}
        assert errors.keys() <= {"on test", "resumed", "best stock"}, errors


@pytest.mark.slow
@pytest.mark.parametrize("space", hostile.SPACES)
def test_descriptions_of_any_form(space: str, capsys: pytest.CaptureFixture[str]) -> None:
    study = hostile.honest(space=space)
    description = study.user_attrs[DESCRIPTION]
    part = description if space == "eep" else {"space": description["space"]}
    for what, mutated in hostile.mutations(part):
        whole = mutated if space == "eep" or not isinstance(mutated, dict) else {**description, **mutated}
        study.set_user_attr(DESCRIPTION, whole)
        try:
            read, _ = tried(space_of, study), tried(study_summary, study)
            if not isinstance(read, MoeoptError):
                tried(shown, study)
                tried(READERS["resumed"], study)
                assert visible_only(capsys.readouterr().out)
        except BaseException as error:
            raise AssertionError(what) from error


@pytest.mark.parametrize(
    ("key", "form", "readers"),
    [
        pytest.param(
            SELECTION,
            hostile.RECORD,
            ("show", "selected", "on test", "searched", "exported"),
            id="selection",
            marks=pytest.mark.slow,
        ),
        pytest.param("full_model", hostile.FULL_MODEL, ("show", "list", "reference", "note"), id="full model"),
    ],
)
def test_attributes_of_any_form(
    key: str, form: Any, readers: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    study = hostile.honest()
    for what, mutated in (("as written", form), *hostile.mutations(form)):
        study.set_user_attr(key, mutated)
        try:
            results = [tried(READERS[name], study) for name in readers]
            assert what != "as written" or not isinstance(results[0], MoeoptError)
            assert visible_only(capsys.readouterr().out)
        except BaseException as error:
            raise AssertionError(what) from error


def trial_attributes() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    trial = hostile.honest().trials[2]
    for key in (genome.ORIGIN, genome.GENOME, genome.SCORES):
        for what, mutated in hostile.mutations(trial.system_attrs[key]):
            yield f"{key} {what}", {**trial.system_attrs, key: mutated}, trial.user_attrs
    for key in (genome.RETRIES, "fixed_params", genome.NOT_FINITE):
        for value in hostile.VALUES:
            yield f"{key} {str(value)[:40]!r}", {**trial.system_attrs, key: value}, trial.user_attrs
    others = ("phase", "method", "active", "interrupted", "estimate", "calibration_layer_tokens")
    for i, key in enumerate((*trial.user_attrs, *others)):
        for value in [*hostile.VALUES, *hostile.NAMES.values()][i % 3 :: 3]:
            yield f"{key} {str(value)[:40]!r}", trial.system_attrs, {**trial.user_attrs, key: value}


@pytest.mark.slow
def test_trials_of_any_form(capsys: pytest.CaptureFixture[str]) -> None:
    study = hostile.honest()
    objective: Any = hostile.Distance(hostile.SPACES["eep"]())
    original = study.trials
    sampler = study.sampler
    for i, (what, system, user) in enumerate(trial_attributes()):
        changed = optuna.create_study(study_name="s", sampler=copy.deepcopy(sampler))
        changed.set_user_attr(DESCRIPTION, study.user_attrs[DESCRIPTION])
        fields = {"value": 0.0, "params": original[2].params, "distributions": original[2].distributions}
        damaged = optuna.trial.create_trial(system_attrs=system, user_attrs=user, **fields)
        changed.add_trials([*original[:2], damaged, original[3]])
        try:
            checked = tried(moeopt.study.check_same, changed, changed.user_attrs[DESCRIPTION])
            for reader in (finished, stalled, reclaim, READERS["show"], READERS["best stock"], READERS["searched"]):
                if checked is None or reader not in (finished, stalled, reclaim):  # those take checked studies
                    tried(reader, changed)
            if i % 5 == 0:
                tried(lambda study: study.optimize(objective, n_trials=1), changed)
            assert visible_only(capsys.readouterr().out)
        except BaseException as error:
            raise AssertionError(what) from error


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["eep", "local", "cmaes", "blockcmaes", "tpe", "random", "nevergrad:OnePlusOne"])
def test_samplers_survive_any_history(sampler: str) -> None:
    objective: Any = hostile.Distance(hostile.SPACES["eep"]())
    study = moeopt.create_study("s", objective=objective, storage=None, sampler=sampler, seed=0)
    study.optimize(objective, n_trials=8)
    trials = study.trials
    origin = trials[5].system_attrs[genome.ORIGIN]
    for what, mutated in hostile.mutations(origin):
        changed = optuna.create_study(study_name="s", sampler=moeopt.samplers.get(sampler, objective.space, seed=0))
        fields = {"value": trials[5].value, "params": trials[5].params, "distributions": trials[5].distributions}
        attrs = {**trials[5].system_attrs, genome.ORIGIN: mutated}
        changed.add_trials([*trials[:5], optuna.trial.create_trial(system_attrs=attrs, **fields), *trials[6:]])
        try:
            tried(lambda study: study.ask(), changed)
        except BaseException as error:
            raise AssertionError(what) from error


def test_a_genome_bomb_stays_small() -> None:
    import base64
    import tracemalloc
    import zlib

    bomb = base64.b64encode(zlib.compress(b"\0" * (1 << 28), 9)).decode()
    trial = hostile.honest().trials[0]
    for size in (32, 1 << 24, 1 << 40):
        attrs = {genome.GENOME: {"v": 1, "shape": [size], "dtype": "<f4", "z": bomb, "chunks": 1}}
        damaged = optuna.trial.create_trial(value=0.0, system_attrs={**trial.system_attrs, **attrs})
        tracemalloc.start()
        assert isinstance(tried(genome.read, damaged), MoeoptError)
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
        tracemalloc.stop()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("honest") / "study.db"
    hostile.honest(f"sqlite:///{path}")
    return path.read_bytes()


ROWS = {
    "not JSON": ("UPDATE study_user_attributes SET value_json = '{{{'",),
    "JSON bomb": ("UPDATE study_user_attributes SET value_json = ?", "[" * 100_000),
    "integer bomb": ("UPDATE study_user_attributes SET value_json = ?", '{"version": ' + "9" * 100_000 + "}"),
    "bytes": ("UPDATE study_user_attributes SET value_json = ?", b"\xff\xfe\x00"),
    "null": ("UPDATE trial_user_attributes SET value_json = 'null'",),
    "trial not JSON": ("UPDATE trial_system_attributes SET value_json = '\x1b[31m'",),
    "state": ("UPDATE trials SET state = 'OWNED\x1b[2J' WHERE number = 1",),
    "number": ("UPDATE trials SET number = -7 WHERE number = 1",),
    "numbers": ("UPDATE trials SET number = 1000000000000 WHERE number = 1",),
    "date": ("UPDATE trials SET datetime_start = 'yesterday'",),
    "distribution": ('UPDATE trial_params SET distribution_json = \'{"name": "Evil", "attributes": {}}\'',),
    "parameter": ("UPDATE trial_params SET param_value = 'many'",),
    "value": ("UPDATE trial_values SET value = 'none'",),
    "NaN": ("UPDATE trial_values SET value = NULL, value_type = 'FINITE'",),
    "infinity": ("UPDATE trial_values SET value = NULL, value_type = 'INF_NEG'",),
    "no values": ("DELETE FROM trial_values",),
    "two values": ("INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (1, 1, 0.0, 'FINITE')",),
    "direction": ("UPDATE study_directions SET direction = 'MAXIMIZE'",),
    "directions": ("INSERT INTO study_directions (study_id, objective, direction) VALUES (1, 1, 'MINIMIZE')",),
    "no direction": ("DELETE FROM study_directions",),
    "name": ("UPDATE studies SET study_name = ?", b"\xff\x00"),
    "no trials": ("DELETE FROM trials",),
    "version": ("UPDATE version_info SET schema_version = 99",),
}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(words)
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    assert visible_only(out.out + out.err)
    assert code in (0, 2), out.err
    assert code == 0 or (out.err.startswith("Error: ") and len(out.err.splitlines()) == 1), out.err
    return code, out.out + out.err


@pytest.mark.slow
@pytest.mark.parametrize("what", ROWS)
def test_rows_that_optuna_never_wrote(
    what: str, database: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.db"
    path.write_bytes(database)
    hostile.execute(path, *ROWS[what])
    place = ("--storage", f"sqlite:///{path}")
    for words in (("show",), ("show", "s"), ("show", "s", "--json"), ("show", "S"), ("plan", "--study", "s")):
        run(capsys, *words, *place)
    objective: Any = hostile.Distance(hostile.SPACES["eep"]())
    resumed = tried(lambda: moeopt.load_study("s", place[1]))
    if not isinstance(resumed, MoeoptError) and what != "no trials":  # whose heartbeats are left
        resumed.sampler = moeopt.samplers.get("eep", objective.space, initial=2, prune_until=3)
        tried(lambda: moeopt.optimize(resumed, objective, n_trials=5))
    assert {file.name for file in tmp_path.iterdir()} == {"study.db"}


def test_a_damaged_study_hides_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And MOEOPT_STORAGE names the storage of every command, so that none takes another database for it."""
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/studies.db"
    monkeypatch.setenv("MOEOPT_STORAGE", url)
    hostile.honest(url)
    whole = optuna.load_study(study_name="s", storage=url)
    optuna.copy_study(from_study_name="s", from_storage=url, to_storage=url, to_study_name="whole")
    hostile.execute(
        tmp_path / "studies.db",
        f"UPDATE study_user_attributes SET value_json = '{{' WHERE study_id = {whole._study_id}",
    )
    code, text = run(capsys, "show")
    assert code == 0
    assert "study 's' is damaged" in text
    assert "whole" in text
    assert run(capsys, "show", "whole")[0] == 0
    assert run(capsys, "show", "wholy")[1].startswith("Error: no study 'wholy'")
    assert run(capsys, "compare", "whole")[0] == 0
    assert run(capsys, "compare", "s", "whole")[1].startswith("Error: study 's' is damaged")
    code, text = run(capsys, "dashboard", "--once")
    assert code == 0
    assert "study 's' is not refreshed" in text
    assert "1 studies" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile.NAMES)
def test_names_are_only_text(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = hostile.NAMES[name]
    path = tmp_path / "study.db"
    study = hostile.honest(f"sqlite:///{path}")
    description = study.user_attrs[DESCRIPTION]
    for at in hostile.paths(description):
        value = description
        for key in at:
            value = value[key]
        if isinstance(value, str) and at[0] != "space":
            description = hostile.replaced(description, at, text)
    hostile.set_study_attribute(path, DESCRIPTION, description)
    for key in ("operator", "phase", "method"):
        study_trial = study.trials[0].user_attrs
        assert study_trial
        hostile.execute(path, "UPDATE trial_user_attributes SET value_json = ? WHERE key = ?", json.dumps(text), key)
    place = ("--storage", f"sqlite:///{path}")
    monkeypatch.delenv("FORCE_COLOR")
    code, shown = run(capsys, "show", "s", *place)
    assert code == 0
    assert len(shown) < 50_000
    if name == "markup":
        assert "[red]x[/red]" in shown
    hostile.execute(path, "UPDATE studies SET study_name = ?", text)
    code, listed = run(capsys, "show", *place)
    assert code == 0
    assert len(listed) < 50_000
    code, _ = run(capsys, "show", "--json", *place)
    assert code == 0
    code, _ = run(capsys, "show", text[:1000], *place)
    assert code == (0 if len(text) < 1000 else 2)
    assert {file.name for file in tmp_path.iterdir()} == {"study.db"}


def test_no_escape_reaches_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With colours on, rich's own codes are the only ones: they name colours and nothing else."""
    import re

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    study = hostile.honest()
    description = hostile.replaced(study.user_attrs[DESCRIPTION], ("task", "name"), hostile.NAMES["terminal"])
    study.set_user_attr(DESCRIPTION, description)
    shown(study)
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert visible_only(re.sub(r"\x1b\[[0-9;]*m", "", out))
