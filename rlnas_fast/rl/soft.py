"""Soft actor-critic for categorical decisions.  B sequences, T decisions, C choices."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_values(log_probs: Tensor, first: Tensor, second: Tensor, temperature: Tensor) -> Tensor:
    """What a prefix is worth to the policy, its entropy included.

    sum over choices of probability x (the lesser of two estimates - temperature x log-probability).

    Source: Christodoulou, Soft Actor-Critic for Discrete Action Settings (2019), eq. 10.

    Args:
        log_probs: float [..., C], the lowest finite number where a choice is invalid.
        first, second: float [..., C], two estimates of each choice's value.
        temperature: scalar, what a nat of entropy is worth.
    Returns:
        Float [...].
    """
    probabilities = log_probs.exp()
    entropies = -(probabilities * log_probs).sum(dim=-1)
    return (probabilities * torch.minimum(first, second)).sum(dim=-1) + temperature * entropies


def temperature_loss(log_temperature: Tensor, entropies: Tensor, wanted: Tensor, present: Tensor) -> Tensor:
    """Grows the temperature where decisions have less entropy than wanted, shrinks it where they have more.

    Source: Haarnoja et al., Soft Actor-Critic Algorithms and Applications (2018), eq. 18.

    Args:
        log_temperature: scalar; the gradient goes there alone.
        entropies: float [B, T], of the policy in nats.
        wanted: float [B, T].
        present: float [B, T], 1 where a decision was made.
    Returns:
        Scalar, mean over the decisions that were made.
    """
    excess = ((entropies - wanted).detach() * present).sum() / present.sum()
    return log_temperature.exp() * excess
