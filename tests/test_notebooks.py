"""What notebooks show: plans, evaluations and results as HTML, and progress as one output.

A real notebook was executed by hand; its kernel is not among what CI installs.
"""

from __future__ import annotations

import math
import re
import sys
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest
from rich.console import Console

import moeopt
from moeopt import report
from moeopt.evaluation import Evaluation
from moeopt.plan import LayerPlan, Plan
from moeopt.report.plan import ALONE, GONE, LEADS, MIXED
from moeopt.report.terminal import SearchProgress, Steps, progress
from moeopt.results.front import Front
from moeopt.results.health import Health
from moeopt.results.method_comparison import MethodComparison
from moeopt.results.optimiser_comparison import OptimiserComparison, compare
from moeopt.results.profiling import Profile
from moeopt.results.selection import Selection
from moeopt.results.similarity import Similarity
from moeopt.showing import Shown

optuna.logging.set_verbosity(optuna.logging.ERROR)
KINDS = (
    Plan, LayerPlan, Evaluation, Front, Health, MethodComparison, OptimiserComparison, Profile, Selection, Similarity,
)  # fmt: skip
W_EM = np.float32([[0.5, 0, 0.5, 0, 0], [0, 1, 0, 0, 0]])
MERGED = LayerPlan(experts=5, k=1, w_em=W_EM, w_rm=W_EM > 0, router="prob")


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.styles = "", [], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.styles += dict(attrs).get("style") or ""

    def handle_data(self, data: str) -> None:
        self.text += data


def test_all_that_is_shown_knows_how() -> None:
    assert {kind for kind in Shown.__subclasses__() if kind.__module__.startswith("moeopt.")} == {*KINDS}
    for kind in KINDS:
        assert kind._repr_html_ is Shown._repr_html_
        assert callable(report._page_of(object.__new__(kind)).view)


def test_a_plan_is_a_picture_of_layers_and_experts() -> None:
    pruned = LayerPlan(experts=5, k=1, kept=(0, 4))
    page = Page(Plan((MERGED, MERGED, pruned))._repr_html_())
    rows = [text.split() for text in page.text.splitlines()]
    assert ["0-1", LEADS, ALONE, MIXED, GONE, GONE] in rows
    assert ["2", ALONE, GONE, GONE, GONE, ALONE] in rows
    assert ["0", LEADS, ALONE, MIXED, GONE, GONE] in [
        text.split() for text in Page(MERGED._repr_html_()).text.splitlines()
    ]
    many = Plan.one_hot([range(0, 128, 2)] * 2, experts=128, k=2)
    assert (ALONE + GONE) * 64 in Page(many._repr_html_()).text


def test_an_evaluation_tells_loss_and_accuracy_with_intervals_and_escapes_names() -> None:
    losses = np.linspace(0, 1, 50, dtype=np.float32)
    evaluation = Evaluation(
        losses, np.ones(50, np.float32), np.float32([1, 0] * 25), 1234, 5678, 0.5,
        metrics={"<script>alert(1)</script>\x1b[31m": 0.25},
    )  # fmt: skip
    html = evaluation._repr_html_()
    page = Page(html)
    assert "script" not in page.tags
    assert "<script>" in page.text
    assert "\x1b" not in html
    zero = Evaluation(losses * 0, evaluation.weights, evaluation.correct * 0, 0, 0, 0.0)
    loss = moeopt.paired_bootstrap(evaluation, zero)  # the same bootstrap, of a difference to 0
    assert f"[{loss.low:.4f}, {loss.high:.4f}]" in page.text
    assert re.search(r"accuracy +50\.0% +\[\d+\.\d%, \d+\.\d%\]", page.text)
    assert "5,678" in page.text


def test_a_comparison_takes_its_colours_from_the_page() -> None:
    studies = []
    for sampler in ("random", "tpe"):
        for seed in (0, 1):
            study = optuna.create_study(study_name=f"{sampler}-{seed}")
            study.set_user_attr("moeopt", described(sampler, seed))
            for number in range(4):
                attrs = {"layer_tokens": 10, "spent": 10 * number + 10}
                study.add_trial(optuna.trial.create_trial(value=1.0 / (number + seed + 1), user_attrs=attrs))
            studies.append(study)
    compared = compare(studies)
    page = Page(compared._repr_html_())
    assert page.tags[0] == "pre"
    assert "At least 6 common seeds are needed" in " ".join(page.text.split())
    colours = re.findall(r"(?<![-\w])(?:color|background(?:-color)?): *([^;\"]+)", page.styles)
    assert {*colours} <= {"#7f7f7f"}  # dimmed: as far from white as from black


def described(sampler: str, seed: int) -> dict[str, Any]:
    return {
        "version": "0", "format": 1,
        "model": {"name_or_path": "m", "architecture": "a", "config_hash": "c", "weights": "w"},
        "task": {"name": "t", "fingerprint": "f", "split": "search", "limit": None, "max_length": None},
        "space": {
            "kind": "prune", "keep": 1, "k": 1, "groups": [[0, 0]], "router": "rows",
            "shape": {"layers": 1, "experts": 2, "k": 1},
        },
        "sampler": {"name": sampler, "seed": seed},
    }  # fmt: skip


class Kernel:
    """What IPython offers of displays: outputs by id, each with all it ever showed."""

    def __init__(self) -> None:
        self.outputs: list[list[str]] = []

    def display(self, shown: str, *, display_id: bool) -> Kernel.Handle:
        assert display_id
        self.outputs.append([shown])
        return Kernel.Handle(self.outputs[-1])

    class Handle:
        def __init__(self, output: list[str]) -> None:
            self.output = output

        def update(self, shown: str) -> None:
            self.output.append(shown)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel, module = Kernel(), ModuleType("IPython.display")
    module.HTML, module.display = str, kernel.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return kernel


def test_progress_in_a_notebook_is_one_output(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAWN", math.inf)
    study, console = optuna.create_study(), Console(force_jupyter=True)
    with SearchProgress(console, trials=300) as shown:
        study.optimize(lambda trial: 1.0 + trial.number, n_trials=200, callbacks=[shown])
    (states,) = kernel.outputs
    assert len(states) == 2  # it is not redrawn more often than can be seen; what was last stays
    for number, state in zip((1, 200), states):
        assert state.startswith(f'<progress value="{number}" max="300"></progress> <code>trial {number}/300 · ')
    with Steps(console) as steps:
        steps(1, 3, "a <b> c")
    assert kernel.outputs[1] == ['<progress value="1" max="3"></progress> <code>1 of 3 steps · a &lt;b&gt; c</code>']
