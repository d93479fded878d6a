"""Names of objectives, fronts and hypervolumes, each against a slow, obvious way to the same."""

from __future__ import annotations

import itertools

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moeopt.errors import StudyError
from moeopt.statistics import hypervolume
from moeopt.trials import front, objectives

GRIDS = st.integers(1, 4).flatmap(
    lambda m: arrays(np.float64, st.tuples(st.integers(0, 9), st.just(m)), elements=st.integers(0, 5))
)


@given(GRIDS)
def test_front_is_what_no_other_dominates(at: np.ndarray) -> None:
    def beaten(i: int) -> bool:
        return any((at[j] <= at[i]).all() and ((at[j] < at[i]).any() or j < i) for j in range(len(at)) if j != i)

    chosen = front.nondominated(at)
    assert sorted(chosen) == [i for i in range(len(at)) if not beaten(i)]
    assert [tuple(at[i]) for i in chosen] == sorted(tuple(at[i]) for i in chosen)


@given(GRIDS)
def test_hypervolume_counts_dominated_cells(at: np.ndarray) -> None:
    reference = np.full(at.shape[1], 4.0)
    cells = itertools.product(range(4), repeat=at.shape[1])
    assert hypervolume(at, reference) == sum(any((row <= np.array(cell)).all() for row in at) for cell in cells)


@pytest.mark.parametrize("names", ["bites", ("loss", "loss"), (), ("bytes:a",), ("loss:",), (1,), None])
def test_names_that_are_none(names: object) -> None:
    with pytest.raises(StudyError, match="objective"):
        objectives.check_names(names)


def test_front_of_a_study_is_optunas() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    rng = np.random.default_rng(0)
    for values in rng.integers(0, 20, (60, 2)).tolist():
        study.add_trial(optuna.create_trial(values=values, system_attrs={"constraints:bytes": values[0] - 15.0}))
    chosen = front.front(study)
    assert {tuple(t.values) for t in chosen} == {tuple(t.values) for t in study.best_trials}
    assert [t.values[0] for t in chosen] == sorted(t.values[0] for t in chosen)
