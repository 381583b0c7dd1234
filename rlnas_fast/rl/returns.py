"""What a decision turned out to be worth.  B sequences of T decisions, padded with zeros."""

from __future__ import annotations

import torch
from torch import Tensor


def final_rewards(rewards: Tensor, lengths: Tensor, steps: int) -> Tensor:
    """Places each sequence's one reward at its last decision: float [B], int64 [B] -> [B, T]."""
    placed = torch.zeros(len(rewards), steps, dtype=rewards.dtype)
    placed[torch.arange(len(rewards)), lengths - 1] = rewards
    return placed


def generalised_advantages(
    rewards: Tensor, values: Tensor, present: Tensor, *, discount: float, trace: float
) -> Tensor:
    """Exponentially weighted sums of temporal differences.

    With trace 1 it is the discounted return minus the value, with trace 0 the one-step difference.

    Source: Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation
    (2016), eq. 16.

    Args:
        rewards: float [B, T].
        values: float [B, T], estimates before each decision; 0 for padding, as after the end.
        present: float [B, T], 1 where a decision was made.
        discount: of later rewards, 0 to 1.
        trace: lambda, 0 to 1.
    Returns:
        Float [B, T]; 0 for padding.
    """
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    differences = (rewards + discount * after - values) * present
    advantage = torch.zeros_like(values[:, 0])
    columns = []
    for difference in reversed(differences.unbind(dim=1)):
        advantage = difference + discount * trace * advantage
        columns.append(advantage)
    return torch.stack(columns[::-1], dim=1) * present
