"""Softmax non-local attention in CUDA C++: exact float32 products, no tensor cores, any GPU from sm_75 on."""

from __future__ import annotations

import torch

from rlnas_fast.ops import native
from rlnas_fast.ops.nonlocal_attention.cpu import like_queries
from rlnas_fast.ops.triton_launch import current_stream

__all__ = ["attention_backward", "attention_forward", "unavailable_reason"]


def unavailable_reason() -> str | None:
    """Returns why these kernels cannot run here, or None when they can."""
    return native.cuda_unavailable_reason()


def attention_forward(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes y_i = sum_j softmax_j(theta_i . phi_j) g_j and the log-sum-exp of its logits.

    Args:
        theta: [B, D, N], float32 | bfloat16 | float16, any strides.
        phi: [B, D, M], as theta.
        g: [B, E, M], as theta.

    Returns:
        y [B, E, N] in theta's dtype and order of strides; log-sum-exp [B, N] in float32.
    """
    batch, _, queries = theta.shape
    y = like_queries(theta, g.shape[1])
    lse = theta.new_empty((batch, queries), dtype=torch.float32)
    if lse.numel() > 0 and y.numel() > 0:
        native.cuda().nonlocal_attention_forward(
            *_problem(theta, g), *_arguments(theta, phi, g, y), lse.data_ptr(), _stream(theta)
        )
    return y, lse


def attention_backward(
    grad_y: torch.Tensor,
    theta: torch.Tensor,
    phi: torch.Tensor,
    g: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of theta, phi and g from what the forward returned; bitwise reproducible."""
    gtheta, gphi, gg = (like_queries(tensor, tensor.shape[1]) for tensor in (theta, phi, g))
    if lse.numel() == 0 or phi.numel() == 0 or g.numel() == 0:
        return gtheta.zero_(), gphi.zero_(), gg.zero_()
    delta = torch.empty_like(lse)
    native.cuda().nonlocal_attention_backward(
        *_problem(theta, g),
        *_arguments(theta, phi, g, grad_y, y),
        lse.data_ptr(),
        delta.data_ptr(),
        *_arguments(gtheta, gphi, gg),
        _stream(theta),
    )
    return gtheta, gphi, gg


def _problem(theta: torch.Tensor, g: torch.Tensor) -> tuple[str, int, tuple[int, int, int, int]]:
    batch, depth, queries = theta.shape
    return str(theta.dtype).removeprefix("torch."), batch, (depth, g.shape[1], queries, g.shape[2])


def _arguments(*tensors: torch.Tensor) -> list[int | tuple[int, ...]]:
    return [argument for tensor in tensors for argument in (tensor.data_ptr(), tensor.stride())]


def _stream(tensor: torch.Tensor) -> int:
    return current_stream(tensor.get_device())
