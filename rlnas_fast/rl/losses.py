"""Losses of policy gradient methods.  B sequences of T decisions; padding carries zeros."""

from __future__ import annotations

from torch import Tensor


def reinforce_loss(
    log_probs: Tensor, advantages: Tensor, entropies: Tensor, *, entropy_weight: float
) -> Tensor:
    """-(advantages x log-probabilities) - entropy_weight x entropies, sum over T, mean over B.

    Source: Williams, Simple Statistical Gradient-Following Algorithms (1992); the entropy bonus as in
    Mnih et al. (2016), section 4.

    Args:
        log_probs: float [B, T].
        advantages: float [B, T], constants.
        entropies: float [B, T] in nats.
    Returns:
        Scalar.
    """
    gain = advantages.detach() * log_probs + entropy_weight * entropies
    return -gain.sum(dim=1).mean()


def clipped_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, present: Tensor, *, clip: float
) -> Tensor:
    """PPO's pessimistic surrogate, mean over the decisions that were made.

    -min(ratio x advantage, clip(ratio, 1 - clip, 1 + clip) x advantage), where ratio is that of the new
    to the old probability of the decision.

    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), eq. 7.

    Args:
        log_probs: float [B, T], of the policy that learns.
        old_log_probs: float [B, T], of the policy that decided; constants.
        advantages: float [B, T], constants.
        present: float [B, T], 1 where a decision was made.
    Returns:
        Scalar.
    """
    advantages = advantages.detach()
    ratio = (log_probs - old_log_probs.detach()).exp()
    gain = (ratio * advantages).minimum(ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(gain * present).sum() / present.sum()


def value_loss(values: Tensor, returns: Tensor, present: Tensor) -> Tensor:
    """Half the squared error, mean over the decisions that were made: three float [B, T] -> scalar."""
    return 0.5 * ((values - returns.detach()) ** 2 * present).sum() / present.sum()
