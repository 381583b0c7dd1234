# mypy: ignore-errors
"""Softmax attention by vendor libraries, where their products set the pace.

- bfloat16 and float16, wide heads, many keys: SDPA.
- float32 without TF32: no tensor cores, so cuBLAS's fp32 products, a chunk of queries at a time.

A chunk has a fixed number of rows, so that extra memory grows with M, not with N x M.  All tensors are
[B, positions, channels] with any strides; each product reads them where they are.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from rlnas_fast.ops.triton_launch import Launch, current_stream

__all__ = ["attention_backward", "attention_forward", "exact_forward"]

QUERIES = 512  # rows of a chunk; all samples together make a few waves of product tiles
LOG2E = tl.constexpr(1.4426950408889634)


def attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean [B, N, E] in query's dtype and the log-sum-exp [B, N] in float32; 16-bit operands."""
    heads = [tensor.unsqueeze(1) for tensor in (query, key, value)]
    if torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(query.device) >= (9, 0):
        mean, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True, scale=1.0)[:2]
    else:
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention(*heads, scale=1.0)[:2]
    return mean.squeeze(1), lse.view(query.shape[:2])


def exact_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mean: torch.Tensor, lse: torch.Tensor
) -> None:
    """Fills mean [B, N, E] and the log-sum-exp [B, N]; float32 operands, float32 products."""
    batch, queries, _ = query.shape
    stream = current_stream(query.get_device())
    for chunk in _chunks(queries):
        scores = torch.bmm(query[:, chunk], key.mT)
        _softmax_launch(batch, scores.shape[1], queries, key.shape[1])(stream, scores, lse[:, chunk])
        mean[:, chunk] = torch.bmm(scores, value)


def attention_backward(
    grad_mean: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mean: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value."""
    if query.dtype is torch.float32:
        return _exact_backward(grad_mean, query, key, value, mean, lse)
    with torch.enable_grad():  # SDPA's backward has no public entry of its own: its forward runs again
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        again = F.scaled_dot_product_attention(*(leaf.unsqueeze(1) for leaf in leaves), scale=1.0).squeeze(1)
        gquery, gkey, gvalue = torch.autograd.grad(again, leaves, grad_mean)
    return gquery.contiguous(), gkey.contiguous(), gvalue.contiguous()


def _exact_backward(
    grad_mean: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mean: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, queries, depth = query.shape
    keys, width = value.shape[1:]
    gquery = query.new_empty((batch, queries, depth))
    gkey = key.new_zeros((batch, keys, depth))
    gvalue = value.new_zeros((batch, keys, width))
    stream = current_stream(query.get_device())
    for chunk in _chunks(queries):
        rows, grads = query[:, chunk], grad_mean[:, chunk]
        scores = torch.bmm(rows, key.mT)
        grad_weights = torch.bmm(grads, value.mT)
        weights = torch.empty_like(grad_weights)
        means, sums = mean[:, chunk], lse[:, chunk]
        launch = _gradient_launch(batch, rows.shape[1], queries, keys, width, grads.stride(), means.stride())
        launch(stream, scores, grad_weights, weights, grads, means, sums)
        gquery[:, chunk] = torch.bmm(grad_weights, key)
        gvalue.baddbmm_(weights.mT, grads)
        gkey.baddbmm_(grad_weights.mT, rows)
    return gquery, gkey, gvalue


def _chunks(queries: int) -> list[slice]:
    return [slice(start, min(start + QUERIES, queries)) for start in range(0, queries, QUERIES)]


@functools.lru_cache(maxsize=256)
def _softmax_launch(batch: int, count: int, queries: int, keys: int) -> Launch:
    block = min(1024, triton.next_power_of_2(keys))
    return Launch(
        _softmax_kernel, (batch * count, 1, 1), (count, queries, keys), {"BLOCK_M": block}, warps=4, stages=2
    )


@functools.lru_cache(maxsize=256)
def _gradient_launch(
    batch: int, count: int, queries: int, keys: int, width: int, grad: tuple[int, ...], mean: tuple[int, ...]
) -> Launch:
    return Launch(
        _softmax_gradient_kernel,
        (batch * count, 1, 1),
        (count, queries, keys, width, *grad, *mean),
        {"BLOCK_M": min(1024, triton.next_power_of_2(keys)), "BLOCK_E": triton.next_power_of_2(width)},
        warps=4,
        stages=2,
    )


# fmt: off
@triton.jit
def _softmax_kernel(scores, lse, count, queries, keys, BLOCK_M: tl.constexpr):
    """One row: scores becomes softmax(scores), lse its log-sum-exp."""
    sample = (tl.program_id(0) // count).to(tl.int64)
    base = scores + tl.program_id(0).to(tl.int64) * keys
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        score = tl.load(base + column, column < keys, other=float("-inf")) * LOG2E
        new_peak = tl.maximum(peak, score)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - shift) + tl.exp2(score - shift)
        peak = new_peak
    largest = tl.max(peak, 0)
    total = tl.sum(total * tl.exp2(peak - tl.where(largest == float("-inf"), 0.0, largest)), 0)
    log_sum = largest + tl.log2(total)
    for start in range(0, keys, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        score = tl.load(base + column, column < keys, other=0.0) * LOG2E
        tl.store(base + column, tl.exp2(score - log_sum), column < keys)
    tl.store(lse + sample * queries + tl.program_id(0) % count, log_sum / LOG2E)


@triton.jit
def _softmax_gradient_kernel(scores, grad_weights, weights, grad_mean, mean, lse, count, queries, keys, width,
                             grad_b, grad_n, grad_e, mean_b, mean_n, mean_e, BLOCK_M: tl.constexpr,
                             BLOCK_E: tl.constexpr):
    """One row: p = exp(scores - lse) to weights; p * (grad_weights - grad_mean . mean) to grad_weights."""
    sample = (tl.program_id(0) // count).to(tl.int64)
    row = tl.program_id(0) % count
    channel = tl.arange(0, BLOCK_E)
    grad_row = tl.load(grad_mean + sample * grad_b + row.to(tl.int64) * grad_n + channel * grad_e,
                       channel < width, other=0.0).to(tl.float32)
    mean_row = tl.load(mean + sample * mean_b + row.to(tl.int64) * mean_n + channel * mean_e, channel < width,
                       other=0.0).to(tl.float32)
    delta = tl.sum(grad_row * mean_row, 0)
    log_sum = tl.load(lse + sample * queries + row)
    base = tl.program_id(0).to(tl.int64) * keys
    for start in range(0, keys, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        inside = column < keys
        weight = tl.exp2((tl.load(scores + base + column, inside, other=0.0) - log_sum) * LOG2E)
        grad = tl.load(grad_weights + base + column, inside, other=0.0).to(tl.float32)
        tl.store(weights + base + column, weight.to(weights.dtype.element_ty), inside)
        tl.store(grad_weights + base + column, (weight * (grad - delta)).to(weights.dtype.element_ty), inside)
