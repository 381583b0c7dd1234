"""The softmax block around SDPA's core, one node of autograd: for wide heads and many keys on a GPU.

One projection of width 2D + E, SDPA on its slices, W_z.  Against plain PyTorch: the slices' gradients are
joined once instead of being added into zeros, a bias's gradient is a product with ones, and the host meets
one autograd node instead of ten.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rlnas_fast.ops.nonlocal_attention.dispatch import kernels_name
from rlnas_fast.ops.nonlocal_attention.dot_product import joined

__all__ = ["library_block", "use_library"]

Tensor = torch.Tensor
Biases = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
LARGEST_HEAD = 256  # beyond it SDPA forms the N x N matrix


def use_library(
    device_type: str,
    dtype: torch.dtype,
    depth: int,
    width: int,
    positions: int,
    backend: str,
    *,
    pooled: bool,
) -> bool:
    """Says where SDPA's core beats our kernels: on an H200 from 128 channels and 512 positions on."""
    return (
        device_type == "cuda"
        and backend == "auto"
        and kernels_name(backend, device_type, dtype) == "triton"
        and dtype != torch.float32
        and not pooled
        and depth == width
        and 128 <= depth <= LARGEST_HEAD
        and depth % 8 == 0
        and positions >= 512
        and not torch.are_deterministic_algorithms_enabled()
    )


def library_block(
    x: Tensor, theta: Tensor, phi: Tensor, g: Tensor, out: Tensor, biases: Biases, residual: bool
) -> Tensor:
    """The block of x [B, C, *space], weights [D, C] three times and [C, D], SDPA in the middle."""
    rows = x.flatten(2).mT
    tensors = (rows, theta, phi, g, out, *biases)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        wide, wide_bias = joined((theta, phi, g), biases[:3])
        z = F.linear(_core(F.linear(rows, wide, wide_bias), theta.shape[0]), out, biases[3])
        z = z + rows if residual else z
    else:
        z = _LibraryBlock.apply(residual, *tensors)
    return z.mT.unflatten(2, x.shape[2:])


class _LibraryBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: bool, rows: Tensor, *parameters: Tensor | None) -> Tensor:
        theta, phi, g, out, *biases = parameters
        assert theta is not None
        assert phi is not None
        assert g is not None
        assert out is not None
        wide, wide_bias = joined((theta, phi, g), biases[:3])
        projected = F.linear(rows, wide, wide_bias)
        with torch.enable_grad():  # SDPA's backward has no public entry but autograd's
            ctx.projected = projected.detach().requires_grad_()
            ctx.mean = _core(ctx.projected, theta.shape[0])
        z = F.linear(ctx.mean.detach(), out, biases[3])
        ctx.save_for_backward(rows, wide, out)
        ctx.residual, ctx.sizes = residual, (theta.shape[0], phi.shape[0], g.shape[0])
        ctx.has_bias = [bias is not None for bias in biases]
        return z.add_(rows) if residual else z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        rows, wide, out = ctx.saved_tensors
        # Kept for a caller who keeps his graph; it goes when this node goes.
        (grad,) = torch.autograd.grad(ctx.mean, ctx.projected, grad_z @ out, retain_graph=True)
        grad_rows = grad @ wide
        if ctx.residual:
            grad_rows += grad_z
        flat, flat_z = grad.flatten(0, 1), grad_z.flatten(0, 1)
        grad_weights = (flat.mT @ rows.flatten(0, 1)).split(ctx.sizes)
        grad_out = flat_z.mT @ ctx.mean.detach().flatten(0, 1)
        ones = flat.new_ones((1, flat.shape[0]))
        grad_biases = (ones @ flat)[0].split(ctx.sizes) if any(ctx.has_bias[:3]) else (None, None, None)
        return (
            None,
            grad_rows,
            *grad_weights,
            grad_out,
            *(each if wanted else None for each, wanted in zip(grad_biases, ctx.has_bias[:3], strict=True)),
            (ones @ flat_z)[0] if ctx.has_bias[3] else None,
        )


def _core(projected: Tensor, depth: int) -> Tensor:
    """[B, N, 3D] to [B, N, D]."""
    query, key, value = (piece.unsqueeze(1) for piece in projected.split(depth, 2))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)
