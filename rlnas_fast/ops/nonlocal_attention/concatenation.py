"""Concatenation attention in O(N log N + N E): ReLU(a_i + b_j) is piecewise linear in a_i."""

from __future__ import annotations

import torch

__all__ = ["concatenation_attention", "sorted_attention"]


def concatenation_attention(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Computes y_i = (1/M) sum_j ReLU(a_i + b_j) g_j for theta = a [B, 1, N], phi = b [B, 1, M], g [B, E, M]."""
    return sorted_attention(theta[:, 0], phi[:, 0], g)


def sorted_attention(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The algebra in plain PyTorch: sort b, prefix sums of g and b g, binary search for each a_i.

    With k_i keys above -a_i, y_i = (a_i G(k_i) + H(k_i)) / M.  A tie is not above: ReLU's subgradient at 0 is 0.
    """
    falling, order = torch.sort(b, dim=1, descending=True)
    active = torch.searchsorted(-falling, a.contiguous())
    ordered = torch.gather(g, 2, order.unsqueeze(1).expand_as(g))
    pick = active.unsqueeze(1).expand(-1, g.shape[1], -1)

    def prefix(values: torch.Tensor) -> torch.Tensor:
        sums = torch.nn.functional.pad(values.cumsum(2, dtype=torch.promote_types(g.dtype, torch.float32)), (1, 0))
        return torch.gather(sums, 2, pick)

    total = a.unsqueeze(1) * prefix(ordered) + prefix(falling.unsqueeze(1) * ordered)
    return (total / g.shape[2]).to(g.dtype)
