"""Calls the C++ kernels: allocates results, passes pointers, strides and torch's thread count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from rlnas_fast.errors import KernelUnavailable
from rlnas_fast.ops import native

__all__ = [
    "Saved",
    "attention_backward",
    "attention_forward",
    "block_backward",
    "block_forward",
    "like_queries",
    "unavailable_reason",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"embedded_gaussian": 0, "dot_product": 1, "concatenation": 2}  # with a fused block
Weights = tuple[torch.Tensor, ...]  # theta, phi, g, out
Biases = tuple[torch.Tensor | None, ...]


class Saved(NamedTuple):
    """What the block's backward needs, float32: see ``BlockSaved`` in csrc/cpu/nonlocal_attention.h."""

    projections: torch.Tensor
    attention: torch.Tensor
    lse: torch.Tensor
    winners: torch.Tensor


def unavailable_reason() -> str | None:
    """Returns why the compiled kernels cannot run here, or None when they can."""
    try:
        native.cpu()
    except KernelUnavailable as error:
        return str(error)
    return None


def like_queries(theta: torch.Tensor, width: int) -> torch.Tensor:
    """Allocates [B, width, N] with channels innermost if theta's are, else positions innermost."""
    batch, _, queries = theta.shape
    if theta.stride(1) == 1 and theta.stride(2) != 1:
        return theta.new_empty((batch, queries, width)).transpose(1, 2)
    return theta.new_empty((batch, width, queries))


def attention_forward(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of theta [B, D, N], phi [B, D, M], g [B, E, M]: y [B, E, N], float32 lse [B, N]."""
    y = like_queries(theta, g.shape[1])
    lse = theta.new_empty((theta.shape[0], theta.shape[2]), dtype=torch.float32)
    tensors = (theta, phi, g, y)
    native.cpu().nonlocal_attention_forward(
        _attention_sizes(theta, g),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        DTYPES[theta.dtype],
        [tensor.data_ptr() for tensor in tensors],
        [tensor.stride() for tensor in tensors],
        lse.data_ptr(),
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
    """Gradients to theta, phi and g, recomputed from the saved log-sum-exp."""
    grads = tuple(like_queries(tensor, tensor.shape[1]) for tensor in (theta, phi, g))
    tensors = (theta, phi, g, y, grad_y, *grads)
    native.cpu().nonlocal_attention_backward(
        _attention_sizes(theta, g),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        DTYPES[theta.dtype],
        [tensor.data_ptr() for tensor in tensors],
        [tensor.stride() for tensor in tensors],
        lse.data_ptr(),
    )
    return grads[0], grads[1], grads[2]


def _attention_sizes(theta: torch.Tensor, g: torch.Tensor) -> tuple[int, ...]:
    return theta.shape[0], theta.shape[2], g.shape[2], theta.shape[1], g.shape[1]


def block_forward(
    kind: str, x: torch.Tensor, weights: Weights, biases: Biases, pool: list[int], residual: bool, save: bool
) -> tuple[torch.Tensor, Saved | None]:
    """The whole block of one of KINDS, and what its backward needs if ``save``."""
    z = torch.empty_like(x)
    saved = empty_saved(kind, x, weights, pool) if save else None
    native.cpu().nonlocal_block_forward(
        *_block_arguments(kind, x, weights, biases, pool, residual),
        x.data_ptr(),
        _strides(x),
        z.data_ptr(),
        _strides(z),
        _pointers(saved or (None,) * 4),
    )
    return z, saved


def block_backward(
    kind: str,
    grad_z: torch.Tensor,
    x: torch.Tensor,
    weights: Weights,
    biases: Biases,
    saved: Saved,
    pool: list[int],
    residual: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    """Gradients to x, to the four weights and, where there are biases, to them."""
    grad_x = torch.empty_like(x)
    grad_weights = [torch.empty_like(weight, dtype=torch.float32) for weight in weights]
    grad_biases = [None if bias is None else torch.empty_like(bias, dtype=torch.float32) for bias in biases]
    native.cpu().nonlocal_block_backward(
        *_block_arguments(kind, x, weights, biases, pool, residual),
        x.data_ptr(),
        _strides(x),
        grad_z.data_ptr(),
        _strides(grad_z),
        _pointers(saved),
        grad_x.data_ptr(),
        _strides(grad_x),
        _pointers((*grad_weights, *grad_biases)),
    )
    if x.dtype != torch.float32:
        grad_weights = [grad.to(x.dtype) for grad in grad_weights]
        grad_biases = [None if grad is None else grad.to(x.dtype) for grad in grad_biases]
    return grad_x, grad_weights, grad_biases


def empty_saved(kind: str, x: torch.Tensor, weights: Weights, pool: list[int]) -> Saved:
    """Allocates what the forward fills for the backward."""
    batch, space = x.shape[0], x.shape[2:]
    inner, value = weights[0].shape[0], weights[2].shape[0]
    positions = math.prod(space)
    keys = math.prod(size // window for size, window in zip(space, pool, strict=True))
    attention = (batch, value, inner) if kind == "dot_product" else (batch, positions, value)
    rows_with_lse = positions if kind == "embedded_gaussian" else 0
    pooled = keys if any(window > 1 for window in pool) else 0
    return Saved(
        x.new_empty((batch, positions, 2 * inner + value), dtype=torch.float32),
        x.new_empty(attention, dtype=torch.float32),
        x.new_empty((batch, rows_with_lse), dtype=torch.float32),
        x.new_empty((batch, pooled, inner + value), dtype=torch.uint8),
    )


def _pointers(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    """Addresses; 0 for what is absent or empty."""
    return [0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr() for tensor in tensors]


def _block_arguments(
    kind: str, x: torch.Tensor, weights: Weights, biases: Biases, pool: list[int], residual: bool
) -> tuple[object, ...]:
    theta, _, g, _ = weights
    missing = 5 - x.dim()
    return (
        KINDS[kind],
        (x.shape[0], x.shape[1], theta.shape[0], g.shape[0]),
        (1,) * missing + tuple(x.shape[2:]),
        (1,) * missing + tuple(pool),
        residual,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        DTYPES[x.dtype],
        _pointers((*weights, *biases)),
    )


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    strides = x.stride()
    return (*strides[:2], *(0,) * (5 - x.dim()), *strides[2:])
