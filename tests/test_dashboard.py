"""The dashboard: what its notes and figures say, that they follow the study, and that no study does harm."""

from __future__ import annotations

import itertools
import json
import math
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from browser import Browser, browser  # noqa: F401
from optuna_dashboard import get_note, save_note
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

from moeopt.cli import main
from moeopt.errors import StudyError
from moeopt.plan import ModelShape
from moeopt.report.dashboard import Refresh, Refresher, attach, server
from moeopt.report.dashboard.digest import digest
from moeopt.report.dashboard.importance import importance
from moeopt.report.dashboard.note import MARK, code, note
from moeopt.samplers import get as get_sampler
from moeopt.spaces import ActiveSpace, EEPSpace, PruneSpace, Space
from moeopt.study import DESCRIPTION
from moeopt.study.storage import attributes, open_storage
from moeopt.trials import genome

SHAPE = ModelShape(layers=4, experts=6, k=2)
FIGURES = {
    "moeopt-1-progress", "moeopt-2-importance", "moeopt-3-experts", "moeopt-4-matrices", "moeopt-5-lineage",
}  # fmt: skip


def described(space: Space, sampler: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "version": "0",
        "model": {"name_or_path": "a/model", "architecture": "MixtralForCausalLM", "weights": "w", "config_hash": "c"},
        "task": {"name": "caesar", "fingerprint": "t", "split": "search", "limit": 48},
        "space": space.describe(),
        "evaluation": {"rungs": [1]},
        "sampler": sampler or {"name": "local", "seed": 3},
    }


def searched(
    name: str = "study", trials: int = 30, storage: Any = None, space: Space | None = None, sampler: str = "local"
) -> optuna.Study:
    """A study as moeopt makes it, its losses a function of how many of the first experts layer 1 keeps."""
    space = EEPSpace(SHAPE, keep=3) if space is None else space
    drawn = get_sampler(sampler, space, seed=3)
    study = optuna.create_study(study_name=name, storage=storage, sampler=drawn, load_if_exists=True)
    study.set_user_attr(DESCRIPTION, described(space, drawn.settings()))

    def loss(trial: optuna.Trial) -> float:
        plan = space.plan(trial)
        origin = genome.origin(attributes.frozen_trial(trial))
        attributes.write(study, trial, {}, {"operator": origin.get("operator", ""), "layer_tokens": 100})
        trial.set_user_attr("parents", origin.get("parents", []))
        trial.set_user_attr("accuracy", 0.5)
        trial.report(1.0, 8)
        if trial.number % 7 == 6:
            trial.set_user_attr(genome.ESTIMATE, 3.0)
            raise optuna.TrialPruned
        kept = sum(np.abs(plan.layers[1].expert_matrix)[:, :3].sum(axis=1) > 0.5)
        return float(2.0 - kept / 2 + 0.01 * np.abs(plan.layers[0].expert_matrix[:, 0]).sum())

    study.optimize(loss, n_trials=trials)
    return study


def shown(study: optuna.Study) -> dict[str, Any]:
    """The figures that a dashboard would draw, parsed."""
    texts = get_plotly_graph_objects(dict(attributes.study_attributes(study)))
    return {name: json.loads(text) for name, text in texts.items()}


def refreshed(study: optuna.Study) -> str:
    attach(study, digest(study), "sqlite:///x.db", {})
    return get_note(study)


def test_note_and_figures_tell_what_the_study_holds() -> None:
    study = searched()
    text = refreshed(study)
    best = study.best_trial
    said = ("`a/model (Mixtral", "`caesar, split search", "keep 3 of 6 experts", "`local: seed=3")
    for part in (*said, f"| trial | {best.number} |"):
        assert part in text
    assert f"| loss | {best.value:.4f} |" in text
    assert "| accuracy | 50.0% |" in text
    assert "load_if_exists=True" in text
    drawn = shown(study)
    assert set(drawn) == FIGURES
    assert sum(len(json.dumps(figure)) for figure in drawn.values()) < 60_000
    progress = {trace["name"]: trace for trace in drawn["moeopt-1-progress"]["data"]}
    assert progress["best so far"]["y"][-1] == pytest.approx(best.value, rel=1e-4)
    assert progress["best so far"]["x"][-1] == 30 * 100
    assert progress["trials"]["mode"] == "markers"
    space = EEPSpace(SHAPE, keep=3)
    heat, dots = drawn["moeopt-3-experts"]["data"]
    assert np.shape(heat["z"]) == (4, 6)
    leads = {(int(j), i) for i, layer in enumerate(space.plan(best).layers) for j in layer.expert_matrix.argmax(axis=1)}
    assert set(zip(dots["x"], dots["y"])) == leads
    w_em, w_rm = drawn["moeopt-4-matrices"]["data"]
    rows = [row for row in w_em["z"] if row[0] is not None]
    np.testing.assert_allclose(
        rows, np.concatenate([layer.expert_matrix for layer in _runs(space.plan(best))]), rtol=5e-3
    )
    assert np.shape(w_rm["z"]) == np.shape(w_em["z"])
    ancestors = drawn["moeopt-5-lineage"]["data"][0]["x"]
    assert ancestors[-1] == best.number
    assert ancestors == sorted(ancestors)


def _runs(plan: Any) -> list[Any]:
    return [layer for i, layer in enumerate(plan.layers) if i == 0 or layer != plan.layers[i - 1]]


def test_a_pruned_trial_is_drawn_as_an_estimate_and_is_never_the_best() -> None:
    study = searched(trials=8)
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.PRUNED, value=0.1, user_attrs={"estimate": -9.0, "layer_tokens": 5}
        )
    )
    refreshed(study)
    drawn = {trace["name"]: trace for trace in shown(study)["moeopt-1-progress"]["data"]}
    assert -9 in drawn["pruned, estimated"]["y"]
    assert min(drawn["best so far"]["y"]) == pytest.approx(study.best_value, rel=1e-4)


def test_what_a_user_writes_above_the_mark_stays() -> None:
    study = searched(trials=4)
    save_note(study, "my own words")
    first = refreshed(study)
    assert first.startswith("my own words\n\n" + MARK)
    assert refreshed(study) == first
    save_note(study, first.replace("my own", "other"))
    study.optimize(lambda trial: -1.0, n_trials=1)
    again = refreshed(study)
    assert again.startswith("other words\n\n" + MARK)
    assert again.count(MARK) == 1
    assert "-1.0000" in again


def test_nothing_is_written_where_nothing_changed_and_shorter_figures_leave_no_rest_of_longer_ones() -> None:
    study = searched(trials=40)
    refreshed(study)
    content, before = digest(study), dict(attributes.study_attributes(study))
    assert attach(study, content, "sqlite:///x.db", {}) == 0
    assert attributes.study_attributes(study) == before
    assert attach(study, replace(content, rows=content.rows[:2]), "sqlite:///x.db", {}) > 0
    assert set(shown(study)) == FIGURES


def test_importance_finds_the_group_that_decides_and_says_when_none_does() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (200, 12)).astype(np.float32)
    blocks = [slice(0, 4), slice(4, 8), slice(8, 12)]
    told = importance(x, 3 * x[:, 4] + x[:, 5] + 0.5 * rng.standard_normal(200), blocks)
    assert told is not None
    assert told.explained > 0.6
    assert told.shares[1] - told.errors[1] > 0.5
    assert (np.abs(told.shares[[0, 2]]) < 0.05).all()
    noise = importance(x, rng.standard_normal(200), blocks)
    assert noise is not None
    assert noise.explained < 0.1
    assert (np.abs(noise.shares) < 0.1).all()
    assert importance(x[:19], x[:19, 0].astype(float), blocks) is None
    assert importance(x, np.ones(200), blocks) is None
    assert importance(np.repeat(x[:5], 40, axis=0), rng.standard_normal(200), blocks) is None


def test_importance_is_the_expected_growth_of_the_error() -> None:
    """Against permutations drawn one by one, for a fit on all but a tenth."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 6)).astype(np.float32)
    losses = x[:, 0] + 0.5 * x[:, 3] + 0.1 * rng.standard_normal(300)
    measured = importance(x, losses, [slice(0, 3), slice(3, 6)])
    assert measured is not None
    ranks = np.argsort(np.argsort(losses)) / 299
    a = np.column_stack([np.ones(300), x.astype(float)])
    w = np.linalg.lstsq(a, ranks, rcond=None)[0]
    error = np.mean((ranks - a @ w) ** 2)
    for g, columns in enumerate(([1, 2, 3], [4, 5, 6])):
        grown = []
        for _ in range(200):
            b = a.copy()
            b[:, columns] = b[rng.permutation(300)][:, columns]
            grown.append(np.mean((ranks - b @ w) ** 2) - error)
        assert measured.shares[g] == pytest.approx(np.mean(grown) / ranks.var(), abs=0.05)


@pytest.mark.parametrize(
    "space",
    [
        PruneSpace(SHAPE, keep=3, groups=2, encoding="scores"),
        ActiveSpace(SHAPE, k=(1, 2), groups=2),
        ActiveSpace(PruneSpace(SHAPE, keep=3, groups=2), k=(1, 2), skip=True, groups=4),
    ],
)
def test_every_kind_of_space_is_drawn(space: Space) -> None:
    study = searched(space=space, trials=30, sampler="random")
    read = digest(study)
    assert read.problems == ()
    assert read.best is not None
    assert read.best.features is not None
    assert read.best.features.size == max(block.stop for _, block in read.blocks)
    refreshed(study)
    texts = json.dumps([figure["layout"] for figure in shown(study).values()])
    assert "cannot be drawn" not in texts


HOSTILE_NAME = "x](http://evil) | <script>alert(1)</script> `tick` \n# big"


def hostile(storage: Any) -> list[str]:
    """Studies that claim to be of moeopt and are not what it writes; their names."""
    good = described(EEPSpace(SHAPE, keep=3))
    shape = {"layers": 10**9, "experts": 10**9, "k": 2}
    descriptions: dict[str, Any] = {
        HOSTILE_NAME: {
            **good,
            "task": {"name": HOSTILE_NAME},
            "model": {"name_or_path": "<img src=x onerror=alert(1)>"},
        },
        "text": "a description",
        "empty": {},
        "nested": {"space": [[[]]], "model": 3, "task": "x", "sampler": ["a"], "evaluation": 1.5},
        "giant": {**good, "space": {**good["space"], "shape": shape, "groups": [[0, 10**9 - 1]]}},
        "wide": {**good, "space": {**good["space"], "keep": 10**6}},
        "negative": {**good, "space": {**good["space"], "shape": {"layers": -1, "experts": 0, "k": 0}}},
        "plot keys": good,
    }
    for name, about in descriptions.items():
        study = optuna.create_study(study_name=name, storage=storage)
        study.set_user_attr(DESCRIPTION, about)
        study.set_user_attr("command", "rm -rf ~; moeopt search")
        study.set_user_attr("selection", {"gain": {"search": math.nan, "test": "x"}, "sentences": [HOSTILE_NAME, 3]})
        for i in range(22 if name in (HOSTILE_NAME, "plot keys") else 3):
            attrs = {
                "layer_tokens": [math.nan, -5, "1", 10**400, 100][i % 5],
                "operator": HOSTILE_NAME * 50,
                "parents": [[i, -1, 10**30, "a"], "x", None][i % 3],
                "accuracy": "high",
                "estimate": {"a": 1},
            }
            system = {genome.GENOME: [{"v": 1}, "x", {"v": 1, "shape": [10**12], "dtype": "<f4", "z": "!"}][i % 3]}
            study.add_trial(
                optuna.trial.create_trial(
                    value=1e300 / (i + 1),
                    user_attrs=attrs,
                    system_attrs=system,
                    params={"drift": i / 30},
                    distributions={"drift": optuna.distributions.FloatDistribution(0, 1)},
                )
            )
        study.add_trial(optuna.trial.create_trial(value=math.inf))
    attributes.write_study(study, {"dashboard:note_ver": "seven", "dashboard:note_str:0": 3})
    study = optuna.create_study(study_name="two", storage=storage, directions=["minimize", "maximize"])
    study.set_user_attr(DESCRIPTION, good)
    study.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    return [*descriptions, "two"]


@dataclass(frozen=True)
class Refreshed:
    """A database with hostile studies, two good ones, `good` and `other`, and one of Optuna's, refreshed once."""

    path: Path
    hostile: list[str]
    done: list[str]
    said: list[str]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Refreshed:
    path = tmp_path_factory.mktemp("mixed") / "studies.db"
    url = f"sqlite:///{path}"
    names = hostile(url)
    searched("good", storage=url, trials=30)
    searched("other", storage=url, trials=10)
    foreign = optuna.create_study(study_name="foreign", storage=url)
    foreign.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    said: list[str] = []
    return Refreshed(path, names, Refresher(open_storage(url), url, report=said.append).refresh(), said)


@pytest.mark.slow
def test_hostile_studies_are_said_to_be_and_keep_no_other_from_its_figures(mixed: Refreshed) -> None:
    url = f"sqlite:///{mixed.path}"
    assert mixed.said == []
    assert set(mixed.done) == {*mixed.hostile, "good", "other"}
    foreign = optuna.load_study(study_name="foreign", storage=url)
    assert not any(key.startswith("dashboard:") for key in attributes.study_attributes(foreign))
    for name in mixed.hostile:
        study = optuna.load_study(study_name=name, storage=url)
        text = get_note(study)
        assert "rm -rf" not in text
        if name not in (HOSTILE_NAME, "plot keys"):
            assert "**Cannot be read in full:**" in text
        assert set(shown(study)) == FIGURES
    assert "Cannot be read" not in get_note(optuna.load_study(study_name="good", storage=url))


def test_text_of_a_study_is_inert_in_its_note() -> None:
    assert code("a|b") == "`a\\|b`"
    assert code("`") == "`` ` ``"
    assert code("a``b\n# c") == "```a``b\\n# c```"
    assert code("") == "`–`"
    study = searched(trials=3)
    text = note(digest(study), "moeopt search m --task 'a; rm -rf /' --study $(reboot)", "sqlite:///x.db")
    assert "moeopt search m --task 'a; rm -rf /' --study '$(reboot)'" in text
    for command in (
        "reboot",
        "moeopt export m",
        "moeopt search '",
        "moeopt search \n reboot",
        3,
        "moeopt search " * 999,
    ):
        assert "create_study" in note(digest(study), command, "sqlite:///x.db")


@pytest.mark.slow
def test_a_refresher_follows_a_study_and_does_not_repeat_itself(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    searched("a", storage=url, trials=5)
    refresher = Refresher(optuna.storages.get_storage(open_storage(url)), url, every=0.0)
    second = Refresher(open_storage(url), url, every=0.0)
    assert refresher.refresh() == ["a"]
    assert refresher.refresh() == []
    searched("b", storage=url, trials=5)
    study = searched("a", storage=url, trials=3)
    assert refresher.refresh() == ["a", "b"]
    assert second.refresh() == ["a", "b"]
    (line,) = [t for t in shown(study)["moeopt-1-progress"]["data"] if t["name"] == "best so far"]
    assert line["x"][-1] == 8 * 100
    names = [trace["name"] for trace in shown(study)["moeopt-1-progress"]["data"]]
    assert "other studies of the task" in names
    slow = Refresher(open_storage(url), url, every=3600)
    assert slow.refresh() == ["a", "b"]
    searched("a", storage=url, trials=1)
    assert slow.refresh() == []
    optuna.delete_study(study_name="b", storage=url)
    assert refresher.refresh() == ["a"]


@pytest.mark.slow
def test_refreshers_of_one_storage_at_once_leave_whole_figures(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    study = searched("a", storage=url, trials=2)
    stop = threading.Event()
    failed: list[str] = []

    def refresh() -> None:
        refresher = Refresher(open_storage(url), url, every=0.0, report=failed.append)
        while not stop.is_set():
            refresher.refresh()

    threads = [threading.Thread(target=refresh) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            searched("a", storage=url, trials=2)
            shown(study)  # whole at any time
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    Refresher(open_storage(url), url).refresh()
    assert failed == []
    assert set(shown(study)) == FIGURES
    assert f"| trial | {study.best_trial.number} |" in get_note(study)


def test_a_study_that_may_not_be_written_is_reported_once_without_its_password(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    searched("a", storage=f"sqlite:///{path}", trials=3)
    read_only = optuna.storages.RDBStorage(f"sqlite:///file:{path}?mode=ro&uri=true")
    said: list[str] = []
    refresher = Refresher(read_only, "postgresql://user:secret@host/name", every=0.0, report=said.append)
    assert refresher.refresh() == []
    assert len(said) == 1
    assert "'a' is not refreshed" in said[0]
    assert "readonly" in said[0]
    assert "secret" not in said[0]


def test_the_callback_writes_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    study = searched(trials=3)
    refresh = Refresh(every=0.0)
    study.optimize(lambda trial: -2.0, n_trials=1, callbacks=[refresh])
    assert "-2.0000" in get_note(study)
    Refresh()(optuna.create_study(), None)
    monkeypatch.setattr("moeopt.report.dashboard.refreshing.attach", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="no current figures: division by zero"):
        study.optimize(lambda trial: 0.0, n_trials=1, callbacks=[refresh])
    with pytest.raises(StudyError, match="every must be at least 0 seconds, got -1"):
        Refresh(every=-1)


def test_once_and_what_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    study = searched("a", storage=url, trials=3)
    assert main(["dashboard", url, "--once"]) == 0
    assert "1 studies written" in capsys.readouterr().out
    assert set(shown(study)) == FIGURES
    assert main(["dashboard", f"sqlite:///{tmp_path / 'none.db'}"]) == 2
    assert "no database at" in capsys.readouterr().err
    assert main(["dashboard", "postgresql+psycopg://user:secret@127.0.0.1:1/x", "--once"]) == 2
    assert "secret" not in capsys.readouterr().err
    taken = server(open_storage(url), port=0)
    try:
        assert main(["dashboard", url, "--port", str(taken.server_port)]) == 2
        assert f"port {taken.server_port} of 127.0.0.1 is taken" in capsys.readouterr().err
    finally:
        taken.server_close()
    assert main(["dashboard", url, "--host", "203.0.113.1"]) == 2
    assert "cannot listen on 203.0.113.1" in capsys.readouterr().err


@contextmanager
def serving(path: Path) -> Iterator[tuple[str, Any]]:
    """The address of a dashboard, and the storage that it serves."""
    storage = optuna.storages.get_storage(open_storage(f"sqlite:///{path}"))
    listening = server(storage, port=0)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", storage
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    with serving(tmp_path / "studies.db") as address_and_storage:
        yield address_and_storage


def test_only_this_machine_is_answered(served: tuple[str, Any]) -> None:
    address, _ = served
    assert urllib.request.urlopen(f"{address}/api/studies").status == 200
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(f"{address}/api/studies", headers={"Host": "evil.example"}))


def test_no_other_site_changes_or_frames_anything(served: tuple[str, Any]) -> None:
    address, storage = served
    body = json.dumps({"study_name": "made", "directions": ["minimize"]}).encode()
    headers = {"Content-Type": "application/json"}
    origins = ["http://evil.example", "http://localhost:1", "https://127.0.0.1", "null", ""]
    for method, origin in itertools.product(["POST", "PUT", "DELETE", "PATCH"], origins):
        here = urllib.request.Request(f"{address}/api/studies", body, headers | {"Origin": origin}, method=method)
        with pytest.raises(urllib.error.HTTPError, match="403") as refused:
            urllib.request.urlopen(here)
        assert refused.value.headers["Content-Security-Policy"] == "frame-ancestors 'none'", (method, origin)
        assert not storage.get_all_studies(), (method, origin)


def test_its_own_pages_and_clients_that_are_no_browser_change_it(served: tuple[str, Any]) -> None:
    address, storage = served
    for number, origin in enumerate(({}, {"Origin": address})):
        body = json.dumps({"study_name": f"made {number}", "directions": ["minimize"]}).encode()
        headers = {"Content-Type": "application/json", **origin}
        answer = urllib.request.urlopen(urllib.request.Request(f"{address}/api/studies", body, headers))
        assert answer.status == 201
        assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert answer.headers["X-Frame-Options"] == "DENY"
    assert len(storage.get_all_studies()) == 2
    read = urllib.request.urlopen(
        urllib.request.Request(f"{address}/api/studies", headers={"Origin": "http://evil.example"})
    )
    assert read.headers["Content-Security-Policy"] == "frame-ancestors 'none'"  # no page of evil.example gets to see it


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_every_page_draws_without_an_error(mixed: Refreshed, browser: Browser, dark: bool) -> None:  # noqa: F811
    with serving(mixed.path) as (address, storage):
        draws(address, storage, browser, dark)


def draws(address: str, storage: Any, browser: Browser, dark: bool) -> None:  # noqa: F811
    ids = {name: storage.get_study_id_from_name(name) for name in ("good", "other", HOSTILE_NAME)}
    root = f"{address}/dashboard"
    with browser.open(root, dark=dark, height=2600) as tab:
        page = tab.page
        page.get_by_text("good", exact=False).first.wait_for()
        page.get_by_text("<script>", exact=False).first.wait_for()
        for name in ("good", HOSTILE_NAME):
            page.goto(f"{root}/studies/{ids[name]}")
            for figure in FIGURES:
                page.wait_for_selector(f"[id='user-defined-plot:{figure}'] svg.main-svg", state="attached")
                if name == "good":
                    assert tab.traces(f"[id='user-defined-plot:{figure}']") >= 1, figure
            page.get_by_text("Best Trial").first.wait_for()
        page.goto(f"{root}/studies/{ids[HOSTILE_NAME]}/note")
        page.get_by_role("heading", name="What it searches").wait_for()
        assert page.locator("a", has_text="evil").count() == 0
        assert page.locator(".MuiCard-root script, .MuiCard-root img").count() == 0
        page.goto(f"{root}/studies/{ids['good']}/analytics")
        page.wait_for_selector("#plot-edf-0 svg.main-svg", state="attached")
        page.goto(f"{root}/studies/{ids['good']}/trials")
        page.get_by_text("Trial 0").first.wait_for()
        page.goto(f"{root}/compare-studies?ids={ids['good']},{ids['other']}")
        assert tab.traces("#plot-history") >= 4
        assert tab.traces("#plot-edf-0") == 2
