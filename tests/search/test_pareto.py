"""The front and its volume against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlnas_fast.search import hypervolume, pareto_front

# Small integers, so that ties and equal rows are common.
POINTS = st.tuples(st.integers(0, 12), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(0, 4).map(float))
)


def dominates(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one >= other).all() and (one > other).any())


@given(POINTS)
@settings(max_examples=200, deadline=None)
def test_the_front_is_what_nothing_dominates(points: np.ndarray) -> None:
    expected = [i for i, row in enumerate(points) if not any(dominates(other, row) for other in points)]
    assert pareto_front(points).tolist() == expected


@given(POINTS)
@settings(max_examples=100, deadline=None)
def test_the_volume_is_the_number_of_unit_cells_below_the_points(points: np.ndarray) -> None:
    dimensions = points.shape[1]
    cells = np.stack(np.meshgrid(*[np.arange(4)] * dimensions, indexing="ij"), axis=-1).reshape(
        -1, dimensions
    )
    covered = sum(bool((points >= cell + 1).all(axis=1).any()) for cell in cells)
    assert hypervolume(points, [0.0] * dimensions) == pytest.approx(covered)


@given(POINTS)
@settings(max_examples=50, deadline=None)
def test_the_volume_is_that_of_the_front_alone(points: np.ndarray) -> None:
    reference = [1.0] * points.shape[1]
    assert hypervolume(points[pareto_front(points)], reference) == pytest.approx(
        hypervolume(points, reference)
    )


def test_rows_with_unknown_numbers_are_never_on_the_front() -> None:
    points = np.array([[np.nan, 9.0], [1.0, 2.0], [2.0, np.nan]])
    assert pareto_front(points).tolist() == [1]
    assert hypervolume(points, [0.0, 0.0]) == 2.0


def test_equal_points_all_stay() -> None:
    assert pareto_front(np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 2.0]])).tolist() == [0, 1]


def test_nothing_covers_nothing() -> None:
    assert pareto_front(np.empty((0, 2))).tolist() == []
    assert hypervolume(np.empty((0, 2)), [0.0, 0.0]) == 0.0
    assert hypervolume(np.array([[1.0, -1.0]]), [0.0, 0.0]) == 0.0
