"""Optimisers that know nothing of the numbers they choose but what reward these led to."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CrossEntropy", "Random", "Sampler"]


class Sampler(Protocol):
    """Proposes numbers, and is told how good they were before it proposes the next."""

    def act(self) -> Tensor:
        """The next numbers, float32 [D]."""
        ...

    def learn(self, reward: float) -> None:
        """Takes the reward of the last numbers."""
        ...


class Random:
    """Independent normal draws around 0.

    Args:
        deviation: of each number, float32 [D].
        seed: of every draw.
    """

    def __init__(self, deviation: Tensor, *, seed: int) -> None:
        self._deviation = deviation
        self._chance = torch.Generator().manual_seed(seed)

    def act(self) -> Tensor:
        """See ``Sampler``."""
        return self._deviation * torch.randn(len(self._deviation), generator=self._chance)

    def learn(self, reward: float) -> None:
        """Nothing is learned."""


class CrossEntropy:
    """Rubinstein's cross-entropy method (1999) with normal distributions.

    Args:
        deviation: of each number at first, float32 [D]; the means start at 0.
        seed: of every draw.
        population: draws between two updates.
        elite: how many of them, the best, the distributions move to.
        smoothing: how far.
    """

    def __init__(
        self, deviation: Tensor, *, seed: int, population: int = 12, elite: int = 4, smoothing: float = 0.7
    ) -> None:
        self._mean, self._deviation = torch.zeros_like(deviation), deviation.clone()
        self._chance = torch.Generator().manual_seed(seed)
        self._population, self._elite, self._smoothing = population, elite, smoothing
        self._drawn: list[Tensor] = []
        self._rewards: list[float] = []

    def act(self) -> Tensor:
        """See ``Sampler``."""
        noise = torch.randn(len(self._mean), generator=self._chance)
        self._drawn.append(self._mean + self._deviation * noise)
        return self._drawn[-1]

    def learn(self, reward: float) -> None:
        """Takes the reward of the last numbers, and moves the distributions after a whole population."""
        self._rewards.append(reward)
        if len(self._rewards) < self._population:
            return
        best = torch.tensor(self._rewards).topk(self._elite).indices
        chosen = torch.stack(self._drawn)[best]
        self._mean = torch.lerp(self._mean, chosen.mean(0), self._smoothing)
        self._deviation = torch.lerp(self._deviation, chosen.std(0), self._smoothing)
        self._drawn, self._rewards = [], []
