"""Calls the C++ kernels: allocates results, passes pointers, strides and torch's thread count."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from rlnas_fast.errors import KernelUnavailable
from rlnas_fast.ops import native

__all__ = [
    "attention_backward",
    "attention_forward",
    "block_backward",
    "block_forward",
    "block_kernel",
    "like_queries",
    "saved_size",
    "unavailable_reason",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"gaussian": 0, "embedded_gaussian": 0, "dot_product": 1, "concatenation": 2}  # the fused blocks
KEPT = 256  # most positions of an image whose softmax is kept for the backward, as kKept in nonlocal_core.h
# x, theta, phi, g, out, their biases, and the pair of concatenation
Tensors = tuple[torch.Tensor | None, ...]


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


def block_kernel(kind: str, tensors: Tensors, pool: Sequence[int], residual: bool) -> Any:
    """A fused block for tensors of one layout, made once: a ``BlockKernel`` of csrc/cpu/block_kernel.h.

    One of KINDS; x [B, C, *space] of any strides, contiguous weights, biases and pair of its dtype, as in
    ``nonlocal_block``; without pair, theta and phi of concatenation are [1, C].
    """
    x, theta, _, g = tensors[:4]
    assert x is not None
    assert g is not None
    inner = x.shape[1] if theta is None else theta.shape[0]  # the Gaussian kind compares x itself
    sizes = tuple(x.shape), x.stride(), inner, g.shape[0]
    return _block_kernel(kind, *sizes, tuple(pool), x.dtype, residual)


@functools.lru_cache(4096)
def _block_kernel(
    kind: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    inner: int,
    value: int,
    pool: tuple[int, ...],
    dtype: torch.dtype,
    residual: bool,
) -> Any:
    depth = 1 if kind == "concatenation" else inner
    missing = (1,) * (5 - len(shape))
    counts = _saved_counts(kind, shape, depth, value, pool)
    ends = list(itertools.accumulate(_rounded(count) for count in counts))
    z = torch.empty_like(torch.empty_strided(shape, strides, device="meta"))
    return native.cpu().BlockKernel(
        KINDS[kind],
        (*shape[:2], inner, value),
        missing + shape[2:],
        missing + pool,
        residual,
        DTYPES[dtype],
        _strides(strides),
        _strides(z.stride()),
        [4 * (end - _rounded(count)) if count else -1 for end, count in zip(ends, counts, strict=True)],
        ends[-1],
    )


def block_forward(
    kind: str, tensors: Tensors, pool: Sequence[int], residual: bool, save: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns z of a fused block and, if asked for, what its backward needs: float32, gaps within it 0."""
    kernel, x = block_kernel(kind, tensors, pool, residual), tensors[0]
    assert x is not None
    z = torch.empty_like(x)
    saved = _zeros(kernel.saved_size) if save else None
    addresses = _addresses(tensors)
    kernel.forward(addresses, z.data_ptr(), 0 if saved is None else saved.data_ptr(), *_manner())
    return z, saved


def block_backward(
    grad_z: torch.Tensor,
    kind: str,
    tensors: Tensors,
    saved: torch.Tensor,
    pool: Sequence[int],
    residual: bool,
) -> list[torch.Tensor | None]:
    """Gradients of the tensors, in their order; None for None."""
    gradients = [None if each is None else torch.empty_like(each) for each in tensors]
    block_kernel(kind, tensors, pool, residual).backward(
        _addresses(tensors),
        saved.data_ptr(),
        grad_z.data_ptr(),
        _strides(grad_z.stride()),
        _addresses(gradients),
        *_manner(),
    )
    return gradients


def _zeros(count: int) -> torch.Tensor:
    calls = native.torch_calls()
    if calls is None:
        return torch.zeros(count, dtype=torch.float32, device="cpu")
    return calls.lent(count).zero_()


def _addresses(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    return [0 if each is None else each.data_ptr() for each in tensors]


def _manner() -> tuple[bool, int]:
    return torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()


def saved_size(kind: str, shape: Sequence[int], inner: int, value: int, pool: Sequence[int]) -> int:
    """Number of float32 that the forward keeps for the backward of x of this shape."""
    return sum(_rounded(count) for count in _saved_counts(kind, shape, inner, value, pool))


def _saved_counts(
    kind: str, shape: Sequence[int], inner: int, value: int, pool: Sequence[int]
) -> tuple[int, ...]:
    """Numbers of float32 of each part of ``BlockSaved`` in csrc/cpu/nonlocal_attention.h."""
    batch, positions = shape[0], math.prod(shape[2:])
    keys = math.prod(size // window for size, window in zip(shape[2:], pool, strict=True))
    softmax = KINDS[kind] == KINDS["embedded_gaussian"]
    columns = (1 if kind == "gaussian" else 2) * inner + value
    terms = keys * _rounded(positions) if softmax and positions <= KEPT else 0
    mixed = shape[1] * inner if kind == "dot_product" else 0
    pooled = any(window > 1 for window in pool)
    return (
        batch * positions * columns,
        batch * (value * inner if kind == "dot_product" else positions * value),
        batch * positions if softmax else 0,
        (batch * keys * (inner + value) + 3) // 4 if pooled else 0,  # bytes
        batch * (terms + mixed),
    )


def _rounded(count: int) -> int:
    """Whole cache lines of float32."""
    return (count + 15) // 16 * 16


def _strides(strides: Sequence[int]) -> tuple[int, ...]:
    """Of [batch, channel, depth, height, width]; 0 for dimensions that there are not."""
    return (*strides[:2], *(0,) * (5 - len(strides)), *strides[2:])
