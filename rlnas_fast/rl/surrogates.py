"""A learned model of the reward: Gaussian process regression over categorical decisions.  NumPy alone.

n architectures told, m candidates, T decisions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
NOISES = (1e-3, 1e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class Posterior:
    """A Gaussian process that has seen data.

    Attributes:
        choices: int [n, T] of what it has seen.
        mean: prior mean.
        scale: prior variance.
        length: length scale of the kernel, in fractions of the decisions.
        noise: variance of the noise, relative to ``scale``.
        inverse: float [n, n], of the kernel matrix with noise.
        weights: float [n], inverse @ (targets - mean).
    """

    choices: np.ndarray
    mean: float
    scale: float
    length: float
    noise: float
    inverse: np.ndarray
    weights: np.ndarray

    def predict(self, choices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, without noise, at ``choices`` int [m, T]: two float [m]."""
        kernel = hamming_kernel(choices, self.choices, self.length)
        explained = np.einsum("ij,ij->i", kernel @ self.inverse, kernel)
        return self.mean + kernel @ self.weights, np.sqrt(self.scale * np.maximum(1.0 - explained, 1e-9))


def hamming_kernel(one: np.ndarray, other: np.ndarray, length: float) -> np.ndarray:
    """exp(-fraction of decisions that differ / length): int [m, T], int [n, T] -> float [m, n].

    A product over decisions, so that it can express interactions of every order.
    """
    differ = np.zeros((len(one), len(other)))
    for column, other_column in zip(one.T, other.T, strict=True):
        differ += column[:, None] != other_column[None, :]
    return np.asarray(np.exp(-differ / (one.shape[1] * length)))


def condition(choices: np.ndarray, targets: np.ndarray, length: float, noise: float) -> Posterior:
    """The posterior under given hyper-parameters; mean and scale are the most likely ones.

    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), eq. 2.23-2.26.

    Args:
        choices: int [n, T].
        targets: float [n].
    """
    kernel = hamming_kernel(choices, choices, length)
    inverse = np.linalg.inv(kernel + noise * np.eye(len(targets)))
    mean, scale = _mean_and_scale(inverse, targets)
    return Posterior(choices, mean, scale, length, noise, inverse, inverse @ (targets - mean))


def most_likely(choices: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """The (length, noise) of a small grid under which ``targets`` are most likely.

    Source: Rasmussen and Williams (2006), eq. 5.8, with mean and scale at their best values.
    """
    best, found = -math.inf, (LENGTHS[0], NOISES[0])
    for length in LENGTHS:
        values, vectors = np.linalg.eigh(hamming_kernel(choices, choices, length))
        ones, rotated = vectors.T @ np.ones(len(targets)), vectors.T @ targets
        for noise in NOISES:
            spectrum = np.maximum(values, 0.0) + noise
            mean = (ones / spectrum @ rotated) / (ones / spectrum @ ones)
            scale = np.mean((rotated - mean * ones) ** 2 / spectrum)
            likelihood = -0.5 * (len(targets) * math.log(scale + 1e-12) + np.log(spectrum).sum())
            if likelihood > best:
                best, found = likelihood, (length, noise)
    return found


def expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """How much more than ``best`` to expect, where less counts as nothing: float [m].

    Source: Jones et al., Efficient Global Optimization (1998), eq. 15.
    """
    z = (mean - best) / deviation
    cumulative = 0.5 * (1.0 + np.array([math.erf(value / math.sqrt(2.0)) for value in z]))
    density = np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
    return np.asarray(deviation * (z * cumulative + density))


def half_rank(rewards: np.ndarray) -> np.ndarray:
    """Rewards on a scale where the good half keeps its distances and the bad half only its order.

    From the median up: (reward - median) / root mean square of those distances.  Below: the normal
    quantile of the rank, so that a network that failed outright does not bend the model.

    Source: Song et al., The Vizier Gaussian Process Bandit Algorithm (2024), "half-rank warping".
    Deviations: ties below the median keep one quantile each, in the order given.

    Args:
        rewards: float [n].
    """
    median = float(np.median(rewards))
    above = rewards >= median
    scale = math.sqrt(float(np.mean((rewards[above] - median) ** 2))) or 1.0
    warped = np.asarray((rewards - median) / scale, dtype=float)
    normal = NormalDist()
    order = np.argsort(rewards, kind="stable")
    for rank, index in enumerate(order[: int((~above).sum())]):
        warped[index] = normal.inv_cdf((rank + 0.5) / len(rewards))
    return warped


def advantage_weighted_frequencies(
    choices: np.ndarray, advantages: np.ndarray, sizes: np.ndarray, *, temperature: float, prior: float
) -> np.ndarray:
    """The per-decision policy that imitates what was tried, in proportion to exp(advantage / temperature).

    The closed form of advantage-weighted regression for independent decisions: every trial so far is
    used again, whichever policy proposed it.

    Source: Peng et al., Advantage-Weighted Regression (2019), eq. 4.

    Args:
        choices: int [n, T]; -1 for a decision that was not reached.
        advantages: float [n].
        sizes: int [T], choices of each decision.
        prior: weight of the uniform policy, against a total weight of 1 for the trials.
    Returns:
        Float [T, largest size]: probabilities; 0 where there is no such choice.
    """
    weights = np.exp((advantages - advantages.max()) / temperature)
    weights = weights / weights.sum()
    frequencies = np.zeros((len(sizes), int(sizes.max())))
    for step, size in enumerate(sizes):
        reached = choices[:, step] >= 0
        counts = np.bincount(choices[reached, step], weights=weights[reached], minlength=size)
        counts = counts + prior / size
        frequencies[step, :size] = counts / counts.sum()
    return frequencies


def _mean_and_scale(inverse: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    sums = inverse.sum(axis=0)
    mean = float(sums @ targets / sums.sum())
    residual = targets - mean
    return mean, max(float(residual @ inverse @ residual) / len(targets), 1e-12)
