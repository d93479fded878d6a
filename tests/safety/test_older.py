"""What moeopt 0.1.0 wrote before there was a format number opens, gives the same plans, and goes on as it would have.

`data/moeopt-0.1.0.json` holds two studies of that version with a selection, attribute by attribute, and plan files.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import json_to_distribution
from optuna.storages import InMemoryStorage

import moeopt
from moeopt import samplers
from moeopt.errors import PlanError, StudyError
from moeopt.report.terminal import study_record, study_view
from moeopt.results.selection import on_test, selected_trial
from moeopt.study import check_same, space_of
from moeopt.study.storage import attributes
from moeopt.trials import genome
from moeopt.trials.description import DESCRIPTION, FORMAT

STORED = json.loads((Path(__file__).parent / "data" / "moeopt-0.1.0.json").read_text())


def restored(name: str) -> optuna.Study:
    storage, held = InMemoryStorage(), STORED[name]
    study = optuna.create_study(study_name="old", storage=storage)
    for key, value in held["user"].items():
        study.set_user_attr(key, value)
    attributes.write_study(study, held["system"])
    for trial in held["trials"]:
        study.add_trial(
            optuna.trial.create_trial(
                value=trial["value"],
                params=trial["params"],
                distributions={key: json_to_distribution(text) for key, text in trial["distributions"].items()},
                system_attrs=trial["system"],
                user_attrs=trial["user"],
            )
        )
    return moeopt.load_study("old", storage)


@pytest.mark.parametrize("name", ["eep", "active"])
def test_an_older_study_opens_and_goes_on(name: str) -> None:
    study, held = restored(name), STORED[name]
    description = study.user_attrs[DESCRIPTION]
    assert "format" not in description
    space = space_of(study)
    assert [space.plan(trial).fingerprint for trial in study.trials] == [trial["plan"] for trial in held["trials"]]
    assert selected_trial(study).number == held["user"]["selection"]["winner"]
    assert on_test(study)["winner"].loss == pytest.approx(
        held["user"]["selection"]["scores"]["test"]["winner"]["loss"], rel=1e-5
    )
    assert study_view(study_record(study), None)
    check_same(study, {**description, "version": moeopt.__version__, "format": FORMAT})
    study.sampler = samplers.get("eep", space, seed=0, initial=3, prune_until=5)
    study.ask()
    assert genome.origin(study.trials[-1])["plan"] == held["next"]


@pytest.mark.parametrize("name", STORED["plans"])
def test_an_older_plan_file_opens(name: str, tmp_path: Path) -> None:
    (tmp_path / "plan.safetensors").write_bytes(base64.b64decode(STORED["plans"][name]["file"]))
    assert moeopt.Plan.load(tmp_path / "plan.safetensors").fingerprint == STORED["plans"][name]["fingerprint"]


def test_what_is_newer_is_refused_naming_both_versions(tmp_path: Path) -> None:
    study = restored("eep")
    study.set_user_attr(DESCRIPTION, {**study.user_attrs[DESCRIPTION], "version": "7.8.9", "format": FORMAT + 1})
    named = rf"7\.8\.9.*format {FORMAT + 1}.*moeopt {moeopt.__version__}"
    for call in (space_of, lambda study: check_same(study, {}), study_record):
        with pytest.raises(StudyError, match=named):
            call(study)
    with pytest.raises(StudyError, match=named):
        moeopt.load_study("old", study._storage)
    selected = restored("eep")
    selected.set_user_attr("selection", {"moeopt": "7.8.9", "format": 2})
    with pytest.raises(StudyError, match=r"7\.8\.9.*format 2"):
        selected_trial(selected)
    from safetensors.numpy import save_file

    facts = {"format": "moeopt-plan", "version": "4", "moeopt": "7.8.9", "layers": "[]"}
    save_file({}, tmp_path / "plan.safetensors", metadata=facts)
    with pytest.raises(PlanError, match=rf"moeopt '7\.8\.9', .*version '4'.*moeopt {moeopt.__version__}"):
        moeopt.Plan.load(tmp_path / "plan.safetensors")


def test_new_studies_say_their_format(make_mixtral: Any, tiny_tokenizer: Any) -> None:
    model = make_mixtral(layers=2, experts=4, hidden=16, intermediate=16)
    texts = [f"the {a} cat sat" for a in ("red", "old", "big", "fat")]
    task = moeopt.tasks.TextTask("toy", search=texts[:2], dev=texts[2:3], test=texts[3:], window=16)
    objective = moeopt.Objective(model, tiny_tokenizer, task, moeopt.EEPSpace.of(model, keep=2))
    study = moeopt.create_study("s", objective=objective, storage=None)
    assert study.user_attrs[DESCRIPTION]["version"] == moeopt.__version__
    assert study.user_attrs[DESCRIPTION]["format"] == FORMAT
