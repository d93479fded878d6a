"""Hypervolume so far, held against the hypervolume of every prefix; bounds that several studies share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moeopt.trials.hypervolume import Bounds, curve

POINTS = st.integers(1, 3).flatmap(
    lambda m: arrays(
        np.float64, st.tuples(st.integers(1, 14), st.just(m)), elements=st.sampled_from([0, 1, 2, 3, 5, 9, np.nan])
    )
)


@given(POINTS)
def test_the_curve_is_the_hypervolume_of_every_prefix(at: np.ndarray) -> None:
    rows = np.isfinite(at).all(axis=1)
    if not rows.any():
        return
    bounds = Bounds.of(at[rows])
    grown = curve(at, bounds)
    first = int(rows.argmax())
    assert np.isnan(grown[:first]).all()
    expected = [bounds.hypervolume(at[: i + 1][rows[: i + 1]]) for i in range(first, len(at))]
    np.testing.assert_allclose(grown[first:], expected, atol=1e-12)
    assert (np.diff(grown[first:]) >= 0).all()
    assert 0 < grown[-1] <= 1


@given(POINTS)
def test_bounds_hold_the_front_and_no_more(at: np.ndarray) -> None:
    at = at[np.isfinite(at).all(axis=1)]
    if not len(at):
        return
    bounds = Bounds.of(at)
    worse = np.vstack([at, at.max(axis=0) + 1.0])
    assert Bounds.of(worse) == bounds
    assert (np.array(bounds.ideal) == at.min(axis=0)).all()
    assert (np.array(bounds.reference) > np.array(bounds.ideal)).all()


def test_a_single_point_has_a_box() -> None:
    bounds = Bounds.of(np.array([[2.0, 0.0]]))
    assert bounds == Bounds((2.0, 0.0), (pytest.approx(4.2), pytest.approx(1.1)))
    assert bounds.hypervolume(np.array([[2.0, 0.0]])) == pytest.approx(1.0)


def test_the_largest_numbers_overflow_nowhere() -> None:
    at = np.array([[1e308, -1e308], [-1e308, 1e308], [0.0, 0.0]])
    with np.errstate(all="raise"):
        assert 0 < curve(at, Bounds.of(at))[-1] <= 1


def test_ten_thousand_trials_take_one_pass() -> None:
    """Along a front that every point joins, which costs most."""
    x = np.random.default_rng(0).permutation(10_000) / 10_000.0
    at = np.stack([x, 1 - x], axis=1)
    bounds = Bounds.of(at)
    assert curve(at, bounds)[-1] == pytest.approx(bounds.hypervolume(at))
