# mypy: ignore-errors
"""Softmax attention of wide heads and many keys by vendor libraries: SDPA forward, cuBLAS products backward.

Where N and d are large the core is bound by its products, and the libraries' kernels set the pace: SDPA's fused
forward, and five batched products a chunk of queries backward (its fused backward is slow at 256 channels).
The chunk has a fixed number of rows, so that extra memory grows with M, not with N x M.

All tensors are [B, positions, channels], channels innermost.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from rlnas_fast.ops.triton_launch import Launch, current_stream

__all__ = ["attention_backward", "attention_forward"]

QUERIES = 512  # rows of a chunk, all samples together make a few waves of product tiles


def attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean [B, N, E] in query's dtype and the log-sum-exp [B, N] in float32."""
    heads = [tensor.unsqueeze(1) for tensor in (query, key, value)]
    if torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(query.device) >= (9, 0):
        mean, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True, scale=1.0)[:2]
    else:
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention(*heads, scale=1.0)[:2]
    return mean.squeeze(1), lse.view(query.shape[:2])


def attention_backward(
    grad_mean: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mean: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value; sums over chunks are in float32."""
    batch, queries, depth = query.shape
    keys, width = value.shape[1:]
    gquery = torch.empty_like(query)
    gkey = key.new_zeros(key.shape, dtype=torch.float32)
    gvalue = value.new_zeros(value.shape, dtype=torch.float32)
    stream = current_stream(query.get_device())
    for start in range(0, queries, QUERIES):
        chunk = slice(start, min(start + QUERIES, queries))
        rows, grads = query[:, chunk], grad_mean[:, chunk]
        scores = torch.bmm(rows, key.mT, out_dtype=torch.float32)
        grad_weights = torch.bmm(grads, value.mT)
        weights = torch.empty_like(grad_weights)
        count = rows.shape[1]
        launch = _gradient_launch(batch, count, queries, keys, width)
        launch(stream, scores, grad_weights, weights, grads, mean[:, chunk], lse[:, chunk])
        gquery[:, chunk] = torch.bmm(grad_weights, key)
        gvalue = torch.baddbmm(gvalue, weights.mT, grads, out_dtype=torch.float32)
        gkey = torch.baddbmm(gkey, grad_weights.mT, rows, out_dtype=torch.float32)
    return gquery, gkey.to(key.dtype), gvalue.to(value.dtype)


@functools.lru_cache(maxsize=256)
def _gradient_launch(batch: int, count: int, queries: int, keys: int, width: int) -> Launch:
    return Launch(
        _softmax_gradient_kernel,
        (batch * count, 1, 1),
        (count, queries, keys, width),
        {"BLOCK_M": 1024, "BLOCK_E": triton.next_power_of_2(width)},
        warps=4,
        stages=2,
    )


# fmt: off
@triton.jit
def _softmax_gradient_kernel(scores, grad_weights, weights, grad_mean, mean, lse, count, queries, keys, width,
                             BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """One row: weights = exp(scores - lse); grad_weights becomes weights * (grad_weights - grad_mean . mean)."""
    sample = (tl.program_id(0) // count).to(tl.int64)
    row = tl.program_id(0) % count
    channel = tl.arange(0, BLOCK_E)
    place = (sample * queries + row) * width + channel
    delta = tl.sum(tl.load(grad_mean + place, channel < width,
                           other=0.0).to(tl.float32) * tl.load(mean + place, channel < width,
                                                               other=0.0).to(tl.float32), 0)
    log_sum = tl.load(lse + sample * queries + row)
    base = tl.program_id(0).to(tl.int64) * keys
    for start in range(0, keys, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        inside = column < keys
        weight = tl.exp2((tl.load(scores + base + column, inside, other=0.0) - log_sum) * 1.4426950408889634)
        grad = tl.load(grad_weights + base + column, inside, other=0.0).to(tl.float32)
        tl.store(weights + base + column, weight.to(weights.dtype.element_ty), inside)
        tl.store(grad_weights + base + column, (weight * (grad - delta)).to(weights.dtype.element_ty), inside)
