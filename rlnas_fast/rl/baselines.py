"""Baselines: what a reward is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MovingAverage:
    """Exponential moving averages of a reward and of its squared deviation, corrected for their start.

    Attributes:
        total: sum of rewards, each weighted by (1 - decay) x decay^age.
        square: the same of squared deviations from the baseline of their time.
        weight: sum of the weights, 0 at the start and towards 1.
        square_weight: the same for ``square``, whose first term comes one reward later.
    """

    total: float = 0.0
    square: float = 0.0
    weight: float = 0.0
    square_weight: float = 0.0

    @property
    def mean(self) -> float:
        """The baseline: 0 before the first reward."""
        return self.total / self.weight if self.weight else 0.0

    @property
    def deviation(self) -> float:
        """Root of the mean squared deviation: 0 before the second reward."""
        return float((self.square / self.square_weight) ** 0.5) if self.square_weight else 0.0


def ema_advantages(rewards: Tensor, average: MovingAverage, *, decay: float) -> tuple[Tensor, MovingAverage]:
    """Reward minus the moving average of the rewards before it.

    As each baseline uses earlier rewards only, it does not bias the gradient; a batch of ten gives the
    same advantages as ten batches of one.  The very first reward has nothing before it: advantage 0.

    Source: Zoph and Le (2017), section 3.2; the correction for the start as in NATS-Bench (Dong et al.
    2021): sum of rewards over sum of weights.

    Args:
        rewards: float [B], in order.
        average: what is known of the rewards before.
        decay: weight of the past, from 0 to below 1.
    Returns:
        advantages [B], and the average after the batch.
    """
    advantages = []
    for reward in rewards.tolist():
        total, square = average.total, average.square
        weight, square_weight = average.weight, average.square_weight
        advantage = reward - average.mean if weight else 0.0
        if weight:
            square = decay * square + (1 - decay) * advantage**2
            square_weight = decay * square_weight + (1 - decay)
        average = MovingAverage(
            decay * total + (1 - decay) * reward, square, decay * weight + (1 - decay), square_weight
        )
        advantages.append(advantage)
    return torch.tensor(advantages, dtype=rewards.dtype), average
