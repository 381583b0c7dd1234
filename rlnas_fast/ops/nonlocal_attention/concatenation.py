"""Concatenation attention in O(N log N + N E): ReLU(a_i + b_j) is piecewise linear in a_i.

Source: Wang et al., Non-local Neural Networks (2018), eq. 6.  Deviation: where a or b is infinite, signs of
infinite terms are not told apart (the definition has NaN where they differ).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rlnas_fast.ops import native
from rlnas_fast.ops.nonlocal_attention.dispatch import kernels_name

__all__ = ["concatenation_attention", "sorted_attention"]


def concatenation_attention(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """Computes y_i = (1/M) sum_j ReLU(a_i + b_j) g_j for theta = a [B, 1, N], phi = b [B, 1, M], g [B, E, M].

    On a CPU in C++, with sums in float64; elsewhere the same algebra in plain PyTorch.
    """
    a, b = theta[:, 0], phi[:, 0]
    if kernels_name(backend, theta.device.type, theta.dtype) != "cpu":
        return sorted_attention(a, b, g)
    y: torch.Tensor = _Concatenation.apply(a.float(), b.float(), g.mT.float())
    return y.mT.to(g.dtype)


def sorted_attention(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The algebra in plain PyTorch: sort b, prefix sums of g and b g, binary search for each a_i.

    With k_i keys above -a_i, y_i = (a_i G(k_i) + H(k_i)) / M.  A tie is not above:
    ReLU's subgradient at 0 is 0.
    """
    falling, order = torch.sort(b, dim=1, descending=True)
    active = torch.searchsorted(-falling, a.contiguous())
    ordered = torch.gather(g, 2, order.unsqueeze(1).expand_as(g))
    pick = active.unsqueeze(1).expand(-1, g.shape[1], -1)

    def prefix(values: torch.Tensor) -> torch.Tensor:
        sums = torch.nn.functional.pad(
            values.cumsum(2, dtype=torch.promote_types(g.dtype, torch.float32)), (1, 0)
        )
        return torch.gather(sums, 2, pick)

    total = a.unsqueeze(1) * prefix(ordered) + prefix(falling.unsqueeze(1) * ordered)
    return (total / g.shape[2]).to(g.dtype)


class _Concatenation(torch.autograd.Function):
    """On float32 a [B, N], b [B, M] and rows g [B, M, E], to rows [B, N, E]."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b, g)
        return _forward_op(a, b, g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _backward_op(grad_y, *ctx.saved_tensors)
        return gradients


def _forward(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    y = g.new_empty((a.shape[0], a.shape[1], g.shape[2]))
    _sweep(a, b, g, out=y)
    return y


def _backward(
    grad_y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_a, grad_b = torch.empty_like(a, memory_format=torch.contiguous_format), b.new_empty(b.shape)
    grad_g = g.new_empty(g.shape)
    _sweep(a, b, g, weight=grad_y, slope=grad_a)
    _sweep(b, a, grad_y, out=grad_g, weight=g, slope=grad_b)  # queries and keys change places
    return grad_a, grad_b, grad_g


def _sweep(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    slope: torch.Tensor | None = None,
) -> None:
    """See csrc/cpu/concatenation.h; the divisor is the number of the forward's keys, in both directions."""
    keys = key.shape[1] if weight is None or out is None else query.shape[1]
    tensors = [
        None if each is None else each.contiguous() for each in (query, key, value, out, weight, slope)
    ]
    native.cpu().concatenation_sweep(
        (query.shape[0], query.shape[1], key.shape[1], value.shape[2]),
        1.0 / keys,
        [0 if each is None else each.data_ptr() for each in tensors],
        torch.get_num_threads(),
    )


_library = torch.library.Library("rlnas_fast", "FRAGMENT")
_library.define("concatenation_attention(Tensor a, Tensor b, Tensor g) -> Tensor")
_library.define(
    "concatenation_attention_backward(Tensor grad_y, Tensor a, Tensor b, Tensor g)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("concatenation_attention", _forward, "CPU")
_library.impl("concatenation_attention_backward", _backward, "CPU")


@torch.library.register_fake("rlnas_fast::concatenation_attention", lib=_library)
def _forward_fake(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return g.new_empty((a.shape[0], a.shape[1], g.shape[2]))


@torch.library.register_fake("rlnas_fast::concatenation_attention_backward", lib=_library)
def _backward_fake(
    grad_y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape), g.new_empty(g.shape)


_forward_op = torch.ops.rlnas_fast.concatenation_attention.default
_backward_op = torch.ops.rlnas_fast.concatenation_attention_backward.default


def _register_flops() -> None:
    """The sweeps alone: two multiply-adds a key and channel and a query and channel; sorting has none."""
    from torch.utils.flop_counter import register_flop_formula

    def forward_flops(a: list[int], b: list[int], g: list[int], *_: object, **__: object) -> int:
        return 4 * g[0] * g[2] * (a[1] + b[1])

    def backward_flops(grad_y: list[int], a: list[int], b: list[int], *_: object, **__: object) -> int:
        return 10 * grad_y[0] * grad_y[2] * (a[1] + b[1])

    register_flop_formula(torch.ops.rlnas_fast.concatenation_attention)(forward_flops)
    register_flop_formula(torch.ops.rlnas_fast.concatenation_attention_backward)(backward_flops)


_register_flops()
