"""What the GPU tests of non-local attention share: references, layouts, weights and gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from rlnas_fast.ops.nonlocal_attention.triton_block import Projections

Tensors = tuple[torch.Tensor, ...]


def attention(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The textbook form, [B, channels, positions] in and out."""
    return (torch.softmax(theta.mT @ phi, -1) @ g.mT).mT


def block(
    x: torch.Tensor, weights: Projections, pool: tuple[int, ...] | None, residual: bool
) -> torch.Tensor:
    """The block of the paper, written with convolutions."""
    dims = x.dim() - 2
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    maximum = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]

    def project(tensor: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return convolve(tensor, weight.reshape(*weight.shape, *[1] * dims), bias)

    theta = project(x, weights.theta, weights.theta_bias)
    phi = project(x, weights.phi, weights.phi_bias)
    g = project(x, weights.g, weights.g_bias)
    if pool:
        phi, g = maximum(phi, pool), maximum(g, pool)
    y = attention(theta.flatten(2), phi.flatten(2), g.flatten(2)).reshape(x.shape[0], -1, *x.shape[2:])
    z = project(y, weights.out, weights.out_bias)
    return z + x if residual else z


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random [B, channels, *positions]: channels first or last, sliced, misaligned or expanded memory."""
    if layout == "channels_last":
        return torch.randn(shape[0], *shape[2:], shape[1], device=device).to(dtype).movedim(-1, 1)
    if layout == "sliced":
        wide = torch.randn(*shape[:-1], 2 * shape[-1] + 1, device=device).to(dtype)
        return wide[..., 1::2]
    if layout == "misaligned":
        flat = torch.randn(torch.Size(shape).numel() + 1, device=device).to(dtype)
        return flat[1:].view(shape)
    if layout == "expanded":
        return torch.randn(1, *shape[1:], device=device).to(dtype).expand(shape)
    return torch.randn(shape, device=device).to(dtype)


def projections(
    channels: int, depth: int, width: int, bias: bool, dtype: torch.dtype, device: str
) -> Projections:
    """Random weights that keep logits of order 1."""
    shapes = [(depth, channels), (depth, channels), (width, channels), (channels, width)]
    matrices = [torch.randn(shape, device=device) / shape[1] ** 0.5 for shape in shapes]
    biases = [torch.randn(shape[0], device=device) if bias else None for shape in shapes]
    return Projections(*(None if each is None else each.to(dtype) for each in (*matrices, *biases)))


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error in the Euclidean norm; NaN stays NaN."""
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def gradients(output: torch.Tensor, inputs: Iterable[torch.Tensor], grad: torch.Tensor) -> Tensors:
    """Returns output and its gradients."""
    return (output.detach(), *torch.autograd.grad(output, tuple(inputs), grad))


def leaves(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> Tensors:
    """Copies that record gradients."""
    return tuple(tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors)
