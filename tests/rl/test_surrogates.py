"""The Gaussian process and its companions against formulas, hand-computed values and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlnas_fast.rl.surrogates import (
    LENGTHS,
    NOISES,
    advantage_weighted_frequencies,
    condition,
    expected_improvement,
    half_rank,
    hamming_kernel,
    most_likely,
)


def data(seed: int, count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    choices = np.unique(rng.integers(0, 3, size=(count, 4)), axis=0)
    return choices, np.sin(choices @ np.array([1.0, 0.5, 0.0, 2.0])) + 0.05 * rng.standard_normal(
        len(choices)
    )


def test_kernel_by_hand() -> None:
    one = np.array([[0, 1, 2, 3]])
    other = np.array([[0, 1, 2, 3], [0, 1, 0, 0], [1, 2, 3, 4]])
    expected = [[1.0, math.exp(-0.5 / 0.4), math.exp(-1 / 0.4)]]
    np.testing.assert_allclose(hamming_kernel(one, other, 0.4), expected)


def test_prediction_is_the_textbook_formula() -> None:
    choices, targets = data(0)
    model = condition(choices, targets, 0.4, 0.1)
    candidates = np.array([[0, 0, 0, 0], [2, 1, 0, 2]])
    kernel = hamming_kernel(choices, choices, 0.4) + 0.1 * np.eye(len(targets))
    across = hamming_kernel(candidates, choices, 0.4)
    ones = np.ones(len(targets))
    level = ones @ np.linalg.solve(kernel, targets) / (ones @ np.linalg.solve(kernel, ones))
    scale = (targets - level) @ np.linalg.solve(kernel, targets - level) / len(targets)
    mean, deviation = model.predict(candidates)
    np.testing.assert_allclose(mean, level + across @ np.linalg.solve(kernel, targets - level))
    variance = scale * (1 - np.einsum("ij,ji->i", across, np.linalg.solve(kernel, across.T)))
    np.testing.assert_allclose(deviation, np.sqrt(variance))


def test_almost_without_noise_it_interpolates() -> None:
    choices, targets = data(1)
    mean, deviation = condition(choices, targets, 0.8, 1e-6).predict(choices)
    # the error is noise x weights: 1e-6 x at most 1e2 here
    np.testing.assert_allclose(mean, targets, atol=1e-4)
    assert (deviation < 0.01).all()


def test_most_likely_is_what_scipy_finds_most_likely() -> None:
    for seed in range(5):
        choices, targets = data(seed)

        def likelihood(
            length: float, noise: float, choices: np.ndarray = choices, targets: np.ndarray = targets
        ) -> float:
            model = condition(choices, targets, length, noise)
            kernel = hamming_kernel(choices, choices, length) + noise * np.eye(len(targets))
            mean = np.full(len(targets), model.mean)
            return float(stats.multivariate_normal.logpdf(targets, mean, model.scale * kernel))

        grid = [(length, noise) for length in LENGTHS for noise in NOISES]
        assert most_likely(choices, targets) == max(grid, key=lambda pair: likelihood(*pair))


def test_constant_targets_are_no_trouble() -> None:
    choices, _ = data(0)
    targets = np.zeros(len(choices))
    mean, deviation = condition(choices, targets, *most_likely(choices, targets)).predict(choices)
    np.testing.assert_allclose(mean, 0.0, atol=1e-12)
    assert np.isfinite(deviation).all()


def test_expected_improvement_is_the_mean_of_what_exceeds_the_best() -> None:
    mean, deviation = np.array([0.0, 1.0, -0.5]), np.array([1.0, 0.5, 0.1])
    draws = np.random.default_rng(0).standard_normal((400_000, 3)) * deviation + mean
    simulated = np.maximum(draws - 0.7, 0.0).mean(axis=0)
    # standard error of 400,000 draws of deviation <= 1 is 0.0016; five of them
    np.testing.assert_allclose(expected_improvement(mean, deviation, 0.7), simulated, atol=0.008)


def test_half_rank_by_hand() -> None:
    warped = half_rank(np.array([5.0, -1e6, 3.0, 0.0, 4.0]))
    scale = math.sqrt((2**2 + 0 + 1**2) / 3)
    expected = [2 / scale, stats.norm.ppf(0.1), 0.0, stats.norm.ppf(0.3), 1 / scale]
    np.testing.assert_allclose(warped, expected)


def test_half_rank_keeps_the_order_and_bears_a_constant() -> None:
    rewards = np.random.default_rng(0).standard_normal(51)
    assert (np.argsort(half_rank(rewards)) == np.argsort(rewards)).all()
    np.testing.assert_array_equal(half_rank(np.full(4, 2.5)), np.zeros(4))


def test_policy_frequencies_by_hand() -> None:
    choices = np.array([[0, 1], [1, -1], [0, 0]])
    advantages = np.array(
        [1.0, 1.0 - 2 * math.log(2), 1.0]
    )  # weights 1, 1/4, 1 at temperature 1: 4/9, 1/9, 4/9
    policy = advantage_weighted_frequencies(choices, advantages, np.array([2, 3]), temperature=1.0, prior=0.6)
    first = np.array([8 / 9 + 0.3, 1 / 9 + 0.3, 0.0]) / 1.6
    second = np.array([4 / 9 + 0.2, 4 / 9 + 0.2, 0.2]) / (8 / 9 + 0.6)
    np.testing.assert_allclose(policy, [first, second])


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e6])
def test_policy_is_a_distribution_at_every_temperature(temperature: float) -> None:
    choices, targets = data(2)
    policy = advantage_weighted_frequencies(
        choices, targets, np.array([3, 3, 3, 3]), temperature=temperature, prior=0.1
    )
    np.testing.assert_allclose(policy.sum(axis=1), 1.0)
