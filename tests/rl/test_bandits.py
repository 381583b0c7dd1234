"""Bandits against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np

from rlnas_fast.rl.bandits import arm_statistics, posterior_of_means, upper_bounds


def test_statistics_by_hand() -> None:
    counts, sums = arm_statistics([(0, 2), (1,), (0, 2), (0, 1)], np.array([1.0, 2.0, 3.0, -1.0]), (2, 3))
    np.testing.assert_array_equal(counts, [[3, 1, 0], [0, 1, 2]])
    np.testing.assert_array_equal(sums, [[3, 2, 0], [0, -1, 4]])
    nothing, _ = arm_statistics([], np.zeros(0), (2, 3))
    assert nothing.shape == (2, 3)
    assert not nothing.any()


def test_posterior_by_hand_and_by_integration() -> None:
    means, deviations = posterior_of_means(np.array([0.0, 3.0]), np.array([0.0, 4.5]), noise=0.5)
    # precision 1 + 3 / 0.5 = 7, mean 9 / 7
    np.testing.assert_allclose(means, [0.0, 9 / 7])
    np.testing.assert_allclose(deviations, [1.0, 7**-0.5])
    grid = np.linspace(-6, 8, 20_001)
    density = np.exp(-0.5 * grid**2 - sum(0.5 * (reward - grid) ** 2 / 0.5 for reward in (1.0, 2.0, 1.5)))
    density /= density.sum()
    mean = (grid * density).sum()
    np.testing.assert_allclose(means[1], mean, rtol=1e-6)
    np.testing.assert_allclose(deviations[1] ** 2, ((grid - mean) ** 2 * density).sum(), rtol=1e-6)


def test_upper_bounds_by_hand() -> None:
    bounds = upper_bounds(np.array([[3.0, 1.0, 0.0]]), np.array([[6.0, 1.0, 0.0]]), width=0.5)
    expected = [2 + 0.5 * math.sqrt(2 * math.log(4) / 3), 1 + 0.5 * math.sqrt(2 * math.log(4)), math.inf]
    np.testing.assert_allclose(bounds[0], expected)
    assert np.isinf(upper_bounds(np.zeros((1, 2)), np.zeros((1, 2)), width=1.0)).all()
