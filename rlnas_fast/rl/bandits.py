"""Independent bandits, one for each decision of a space.  T decisions with at most C choices each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def arm_statistics(
    sequences: Sequence[Sequence[int]], rewards: np.ndarray, sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """How often each choice of each decision was made, and the sum of the rewards then.

    Args:
        sequences: n sequences of choices; a decision after the end of one was not made.
        rewards: float [n].
        sizes: [T], choices of each decision.
    Returns:
        counts and sums, two float [T, C].
    """
    counts, sums = np.zeros((2, len(sizes), max(sizes)))
    for choices, reward in zip(sequences, rewards, strict=True):
        steps = np.arange(len(choices))
        counts[steps, choices] += 1
        sums[steps, choices] += reward
    return counts, sums


def posterior_of_means(
    counts: np.ndarray, sums: np.ndarray, *, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each arm's expected reward, of which nothing known is N(0, 1).

    Source: Russo et al., A Tutorial on Thompson Sampling (2018), section 4.

    Args:
        counts, sums: float [..., C].
        noise: variance of one reward about its arm's mean, above 0.
    """
    precision = 1 + counts / noise
    return sums / noise / precision, precision**-0.5


def upper_bounds(counts: np.ndarray, sums: np.ndarray, *, width: float) -> np.ndarray:
    """Mean + width x sqrt(2 ln n / times chosen), infinite where never chosen: float [..., C].

    Source: Auer et al., Finite-time Analysis of the Multiarmed Bandit Problem (2002), UCB1; n is the sum
    of the counts of the row.
    """
    total = np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    chosen = np.maximum(counts, 1)
    bounds = sums / chosen + width * np.sqrt(2 * np.log(total) / chosen)
    return np.where(counts > 0, bounds, np.inf)
