"""Losses of policy gradient methods.  B sequences of T decisions; padding carries zeros."""

from __future__ import annotations

from torch import Tensor


def reinforce_loss(
    log_probs: Tensor, advantages: Tensor, entropies: Tensor, *, entropy_weight: float
) -> Tensor:
    """-(advantage x log-probability of the sequence) - entropy_weight x its entropy, mean over B.

    Source: Williams, Simple Statistical Gradient-Following Algorithms (1992); the entropy bonus as in
    Mnih et al. (2016), section 4.

    Args:
        log_probs: float [B, T].
        advantages: float [B], constants.
        entropies: float [B, T] in nats.
    Returns:
        Scalar.
    """
    gain = advantages.detach() * log_probs.sum(dim=1) + entropy_weight * entropies.sum(dim=1)
    return -gain.mean()
