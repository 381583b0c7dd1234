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


def v_trace(
    log_ratios: Tensor,
    rewards: Tensor,
    values: Tensor,
    present: Tensor,
    *,
    discount: float,
    largest_weight: float,
) -> tuple[Tensor, Tensor]:
    """Targets of the values and advantages of decisions that an older policy made.

    Each temporal difference counts by w = min(largest_weight, exp(log_ratio)), and reaches further back
    by min(1, exp(log_ratio)) a step.  Where both policies are one and w is not clipped, the targets are
    the returns.

    Source: Espeholt et al., IMPALA (2018), eq. 1 and section 4.2.

    Args:
        log_ratios: float [B, T], log-probability of each decision now minus that of then.
        rewards: float [B, T].
        values: float [B, T], estimates before each decision; 0 for padding, as after the end.
        present: float [B, T], 1 where a decision was made.
        discount: of later rewards, 0 to 1.
        largest_weight: above 0.
    Returns:
        Targets and advantages, two float [B, T]; 0 for padding.
    """
    ratios = log_ratios.exp()
    weights, traces = ratios.clamp(max=largest_weight), ratios.clamp(max=1.0)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    differences = weights * (rewards + discount * after - values) * present
    correction = torch.zeros_like(values[:, 0])
    columns = []
    for difference, trace in zip(
        reversed(differences.unbind(dim=1)), reversed(traces.unbind(dim=1)), strict=True
    ):
        correction = difference + discount * trace * correction
        columns.append(correction)
    targets = (values + torch.stack(columns[::-1], dim=1)) * present
    later = torch.cat([targets[:, 1:], torch.zeros_like(targets[:, :1])], dim=1)
    return targets, weights * (rewards + discount * later - values) * present
