"""Studies of several objectives are compared by what their fronts leave of a box that all share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from rich.console import Console

from moeopt.errors import StudyError
from moeopt.report import optimiser_comparison as report
from moeopt.results.optimiser_comparison import compare, read
from moeopt.statistics import hypervolume

Make = Callable[..., Any]
NAMES = ("loss", "bytes")


@pytest.fixture
def studies(make: Make) -> list[optuna.Study]:
    """Two optimisers on six seeds; the first's trials are nearer to the ideal."""
    made = []
    for name, distance in (("near", 1.0), ("far", 2.0)):
        for seed in range(6):
            x = np.random.default_rng([seed, int(distance)]).random(20)
            values = np.stack([x, 1e9 * distance / (1 + 4 * x)], axis=1)
            made.append(make(f"{name}-{seed}", values.tolist(), name, seed, objectives=NAMES))
    return made


def test_losses_are_what_fronts_leave_of_the_joint_box(studies: list[optuna.Study]) -> None:
    compared = compare(studies)
    assert (compared.measure, compared.objectives) == ("missing hypervolume", NAMES)
    everything = np.array([trial.values for study in studies for trial in study.trials])
    front = np.array([a for a in everything if not ((everything <= a).all(1) & (everything < a).any(1)).any()])
    ideal, worst = front.min(0), front.max(0)
    width = 1.1 * (worst - ideal)
    assert compared.bounds is not None
    np.testing.assert_allclose(compared.bounds.reference, ideal + width)
    for run in compared.runs:
        at = (
            np.array([t.values for t in next(s for s in studies if s.study_name == run.study).trials]) - ideal
        ) / width
        expected = [1 - hypervolume(at[: i + 1], np.ones(2)) for i in range(20)]
        np.testing.assert_allclose(run.curve, expected, atol=1e-12)
    assert [each.name for each in compared.optimisers] == ["near", "far"]
    assert compared.pairs[0].better == "near"
    assert compared.pairs[0].p == 2 / 2**6


def test_trials_that_break_constraints_failed_or_were_pruned_are_no_points(make: Make, trial: Make) -> None:
    states = optuna.trial.TrialState
    trials = [
        trial((0.1, 1.0), layer_tokens=1, system={"constraints:bytes <= 0.5": 0.5}),
        trial(state=states.FAIL, layer_tokens=1),
        trial(state=states.PRUNED, layer_tokens=1),
        trial((0.5, 2.0), layer_tokens=1, system={"constraints:bytes <= 3": -1.0}),
        trial((np.inf, 2.0), layer_tokens=1),
    ]
    run = read(make("a", trials, objectives=NAMES))
    rows = np.full((5, 2), np.nan)
    rows[3] = 0.5, 2.0
    np.testing.assert_array_equal(run.points, rows)


def test_metrics_are_maximised(make: Make) -> None:
    run = read(make("a", [(0.9, 5.0)], objectives=("metric", "bytes")))
    np.testing.assert_array_equal(run.points, [[-0.9, 5.0]])


def test_studies_of_other_objectives_are_not_compared(make: Make) -> None:
    studies = [make("a", [(0.1, 1.0)], objectives=NAMES), make("b", [(0.1, 1.0)], objectives=("loss", "active"))]
    with pytest.raises(StudyError, match=r"evaluation\.objectives"):
        compare(studies)
    with pytest.raises(StudyError, match=r"evaluation\.objectives"):
        compare([studies[0], make("c", [0.1])])


def test_the_report_names_measure_and_box(studies: list[optuna.Study], tmp_path: Path) -> None:
    compared = compare(studies)
    console = Console(width=200, record=True, quiet=True)
    console.print(report.view(compared))
    report.save(compared, tmp_path)
    page = (tmp_path / "index.html").read_text()
    for text in (" ".join(report.conclusions(compared)), page):
        assert "near reaches a lower missing hypervolume than far" in text
    assert "Best missing hypervolume against layer-tokens" in page
    assert "the share of the box (loss from " in page
    record = report.record(compared)
    assert (record["measure"], record["objectives"]) == ("missing hypervolume", [*NAMES])
    assert record["bounds"]["ideal"] == [*compared.bounds.ideal]  # type: ignore[union-attr]
