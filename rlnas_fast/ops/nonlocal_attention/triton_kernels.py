"""Softmax non-local attention in Triton: online softmax forward, recomputing backward, no N x M matrix.

Sizes: B batch, D channels of theta and phi, E channels of g, N query and M key positions.  A tensor
[B, channels, positions] is read through its strides, so no layout is copied.  Channels beyond 256 are
processed in chunks.  The backward has two passes, over query tiles for theta and over key tiles for phi
and g, neither with atomics, so it is bitwise reproducible.  float32 without TF32 has no tensor cores:
``library_core`` serves it.

Source: Wang et al., Non-local Neural Networks (2018), eq. 1-4; Milakov and Gimelshein, Online normalizer
calculation for softmax (2018); Dao, FlashAttention-2 (2023), algorithm 2.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rlnas_fast.ops.nonlocal_attention import library_core
from rlnas_fast.ops.nonlocal_attention.cpu import like_queries
from rlnas_fast.ops.triton_launch import Launch, current_stream, dot_precision

__all__ = ["Tiles", "attention_backward", "attention_forward", "unavailable_reason"]

LOG2E = tl.constexpr(1.4426950408889634)
# An exact fp32 product keeps its operands in registers, not in shared memory: it needs smaller pieces.
LARGEST_CHUNK = {"tf32": 256, "ieee": 32}


class Tiles(NamedTuple):
    """How one pass is cut: rows that a program owns, columns it visits at a time."""

    rows: int
    columns: int
    warps: int
    stages: int


@functools.cache
def unavailable_reason() -> str | None:
    """Returns why these kernels cannot run here, or None when they can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability()[0] < 8:
        return "Triton kernels need compute capability 8.0 or newer"
    return None


def attention_forward(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, *, tiles: Tiles | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes y_i = sum_j softmax_j(theta_i . phi_j) g_j and the log-sum-exp of its logits.

    Args:
        theta: [B, D, N], float32 | bfloat16 | float16, any strides.
        phi: [B, D, M], as theta.
        g: [B, E, M], as theta.
        tiles: how to cut the work, for measurements; chosen by shape otherwise.

    Returns:
        y [B, E, N] in theta's dtype and order of strides; log-sum-exp [B, N] in float32.
    """
    batch, _, queries = theta.shape
    width = g.shape[1]
    y = like_queries(theta, width)
    lse = theta.new_empty((batch, queries), dtype=torch.float32)
    if lse.numel() == 0 or width == 0:
        return y, lse
    precision = dot_precision(theta.dtype)
    if precision == "ieee" and tiles is None:
        library_core.exact_forward(theta.mT, phi.mT, g.mT, y.mT, lse)
        return y, lse
    launch = _forward_launch(
        _layout(theta), _layout(phi), _layout(g), _layout(y), theta.dtype, precision, tiles
    )
    launch(current_stream(theta.get_device()), theta, phi, g, y, lse)
    return y, lse


def attention_backward(
    grad_y: torch.Tensor,
    theta: torch.Tensor,
    phi: torch.Tensor,
    g: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    *,
    query_tiles: Tiles | None = None,
    key_tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of theta, phi and g from what the forward returned."""
    gtheta, gphi, gg = (like_queries(tensor, tensor.shape[1]) for tensor in (theta, phi, g))
    if lse.numel() == 0 or phi.numel() == 0 or g.numel() == 0:
        return gtheta.zero_(), gphi.zero_(), gg.zero_()
    precision = dot_precision(theta.dtype)
    if precision == "ieee" and query_tiles is None and key_tiles is None:
        rows = (tensor.mT for tensor in (grad_y, theta, phi, g, y))
        gradients = library_core.attention_backward(*rows, lse)
        for target, gradient in zip((gtheta, gphi, gg), gradients, strict=True):
            target.copy_(gradient.mT)
        return gtheta, gphi, gg
    delta = torch.empty_like(lse)
    layouts = tuple(_layout(tensor) for tensor in (theta, phi, g, grad_y, y))
    stream = current_stream(theta.get_device())
    query_pass = _query_launch(*layouts, _layout(gtheta), theta.dtype, precision, query_tiles)
    query_pass(stream, theta, phi, g, grad_y, y, lse, delta, gtheta)
    key_pass = _key_launch(*layouts[:4], _layout(gphi), _layout(gg), theta.dtype, precision, key_tiles)
    key_pass(stream, theta, phi, g, grad_y, lse, delta, gphi, gg)
    return gtheta, gphi, gg


class _Layout(NamedTuple):
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    aligned: bool


def _layout(tensor: torch.Tensor) -> _Layout:
    return _Layout(tuple(tensor.shape), tensor.stride(), tensor.data_ptr() % 16 == 0)


def chunk(channels: int, precision: str = "tf32") -> int:
    """Returns how many channels are held at a time: a power of two that Triton can multiply."""
    return min(LARGEST_CHUNK[precision], max(16, triton.next_power_of_2(channels)))


def _channel_constants(depth: int, width: int, precision: str) -> dict[str, int | bool | str]:
    block_d, block_e = chunk(depth, precision), chunk(width, precision)
    return {
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "D_CHUNKS": triton.cdiv(depth, block_d),
        "E_CHUNKS": triton.cdiv(width, block_e),
        "EVEN_D": depth % block_d == 0,
        "EVEN_E": width % block_e == 0,
        "PRECISION": precision,
    }


EXACT = Tiles(32, 16, 4, 1)
CHUNKED = Tiles(64, 32, 8, 1)  # more than one chunk of channels


def forward_tiles(depth: int, width: int, queries: int, dtype: torch.dtype, precision: str) -> Tiles:
    """Chooses the forward tiles (measured on an H200)."""
    if precision == "ieee":
        return EXACT
    if max(depth, width) > LARGEST_CHUNK[precision]:
        return CHUNKED
    channels = max(chunk(depth), chunk(width))
    if dtype is torch.float32:
        return Tiles(64, 32, 4, 2) if channels <= 64 else Tiles(64, 32, 8, 1)
    if queries <= 256 and channels <= 128:
        return Tiles(64, 64, 4, 3)
    return {256: Tiles(128, 64, 8, 2), 128: Tiles(64, 64, 4, 2)}.get(channels, Tiles(128, 64, 4, 3))


def query_tiles(depth: int, width: int, dtype: torch.dtype, precision: str) -> Tiles:
    """Chooses the tiles of the backward pass over queries (measured on an H200)."""
    if precision == "ieee":
        return EXACT
    if max(depth, width) > LARGEST_CHUNK[precision]:
        return CHUNKED
    channels = max(chunk(depth), chunk(width))
    if dtype is torch.float32:
        return Tiles(32, 32, 4, 1) if channels <= 128 else Tiles(32, 16, 8, 1)
    return {256: Tiles(128, 32, 8, 2), 128: Tiles(64, 64, 4, 2)}.get(channels, Tiles(64, 64, 4, 3))


def key_tiles(depth: int, width: int, dtype: torch.dtype, precision: str) -> Tiles:
    """Chooses the tiles of the backward pass over keys (measured on an H200)."""
    if precision == "ieee":
        return EXACT
    if max(depth, width) > LARGEST_CHUNK[precision]:
        return CHUNKED
    channels = max(chunk(depth), chunk(width))
    if dtype is torch.float32:
        return Tiles(32, 32, 4, 1) if channels <= 128 else Tiles(32, 16, 8, 1)
    return Tiles(64, 16, 8, 2) if channels == 256 else Tiles(64, 32, 4, 2)


@functools.lru_cache(maxsize=4096)
def _forward_launch(
    theta: _Layout,
    phi: _Layout,
    g: _Layout,
    y: _Layout,
    dtype: torch.dtype,
    precision: str,
    tiles: Tiles | None,
) -> Launch:
    batch, depth, queries = theta.shape
    width, keys = g.shape[1:]
    tiles = tiles or forward_tiles(depth, width, queries, dtype, precision)
    constants = _channel_constants(depth, width, precision)
    return Launch(
        _forward_kernel,
        (triton.cdiv(queries, tiles.rows) * batch, constants["E_CHUNKS"], 1),
        (queries, keys, depth, width, *theta.strides, *phi.strides, *g.strides, *y.strides),
        {"BLOCK_N": tiles.rows, "BLOCK_M": tiles.columns, **constants},
        warps=tiles.warps,
        stages=tiles.stages,
    )


@functools.lru_cache(maxsize=4096)
def _query_launch(
    theta: _Layout,
    phi: _Layout,
    g: _Layout,
    grad_y: _Layout,
    y: _Layout,
    gtheta: _Layout,
    dtype: torch.dtype,
    precision: str,
    tiles: Tiles | None,
) -> Launch:
    batch, depth, queries = theta.shape
    width, keys = g.shape[1:]
    tiles = tiles or query_tiles(depth, width, dtype, precision)
    constants = _channel_constants(depth, width, precision)
    strides = (layout.strides for layout in (theta, phi, g, grad_y, y, gtheta))
    return Launch(
        _query_gradient_kernel,
        (triton.cdiv(queries, tiles.rows) * batch, constants["D_CHUNKS"], 1),
        (queries, keys, depth, width, *(stride for triple in strides for stride in triple)),
        {"BLOCK_N": tiles.rows, "BLOCK_M": tiles.columns, **constants},
        warps=tiles.warps,
        stages=tiles.stages,
    )


@functools.lru_cache(maxsize=4096)
def _key_launch(
    theta: _Layout,
    phi: _Layout,
    g: _Layout,
    grad_y: _Layout,
    gphi: _Layout,
    gg: _Layout,
    dtype: torch.dtype,
    precision: str,
    tiles: Tiles | None,
) -> Launch:
    batch, depth, queries = theta.shape
    width, keys = g.shape[1:]
    tiles = tiles or key_tiles(depth, width, dtype, precision)
    constants = _channel_constants(depth, width, precision)
    strides = (layout.strides for layout in (theta, phi, g, grad_y, gphi, gg))
    return Launch(
        _key_gradient_kernel,
        (triton.cdiv(keys, tiles.rows) * batch, max(constants["D_CHUNKS"], constants["E_CHUNKS"]), 1),
        (queries, keys, depth, width, *(stride for triple in strides for stride in triple)),
        {"BLOCK_N": tiles.columns, "BLOCK_M": tiles.rows, **constants},
        warps=tiles.warps,
        stages=tiles.stages,
    )


# fmt: off
@triton.jit
def place(count, BLOCK: tl.constexpr):
    """Returns a program's sample and rows; tiles of one sample are neighbours, which share its keys in L2."""
    tiles = tl.cdiv(count, BLOCK)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    return sample, tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def tile_pointers(base, rows, columns, row_stride, column_stride):
    """Addresses [rows, columns] in 64 bits: a tensor may have more than 2^31 elements."""
    return base + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride


@triton.jit
def load_tile(pointers, rows, columns, row_count, column_count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Loads with zeros outside; ROWS and COLUMNS say which limits can be crossed."""
    if ROWS and COLUMNS:
        return tl.load(pointers, (rows[:, None] < row_count) & (columns[None, :] < column_count), other=0.0)
    if ROWS:
        return tl.load(pointers, rows[:, None] < row_count, other=0.0)
    if COLUMNS:
        return tl.load(pointers, columns[None, :] < column_count, other=0.0)
    return tl.load(pointers)


@triton.jit
def contract(tile, other, other_rows, row_base, rows, row_stride, channel_stride, other_base, other_stride,
             other_channel_stride, row_count, other_count, channels, BLOCK: tl.constexpr,
             CHUNKS: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Returns tile [rows, BLOCK] times other [BLOCK, columns], plus the chunks that are not held."""
    product = tl.dot(tile, other, input_precision=PRECISION)
    for index in tl.static_range(1, CHUNKS):
        within = index * BLOCK + tl.arange(0, BLOCK)
        left = load_tile(tile_pointers(row_base, rows, within, row_stride, channel_stride), rows, within,
                         row_count, channels, True, not EVEN)
        right = load_tile(tile_pointers(other_base, within, other_rows, other_channel_stride, other_stride),
                          within, other_rows, channels, other_count, not EVEN, MASKED)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    return product


@triton.jit
def attend_tile(accumulator, peak, total, query, theta, phi, g, rows, start, outputs, queries, keys, depth,
                width, theta_d, theta_n, phi_d, phi_m, g_e, g_m, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                D_CHUNKS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, MASKED: tl.constexpr,
                PRECISION: tl.constexpr):
    """Adds one tile of keys to the running softmax."""
    positions = start + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    key = load_tile(tile_pointers(phi, channels, positions, phi_d, phi_m), channels, positions, depth, keys,
                    not EVEN_D, MASKED)
    scores = contract(query, key, positions, theta, rows, theta_n, theta_d, phi, phi_m, phi_d, queries, keys,
                      depth, BLOCK_D, D_CHUNKS, EVEN_D, MASKED, PRECISION)
    if MASKED:
        scores = tl.where(positions[None, :] < keys, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * LOG2E)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a tile of -inf alone must not make NaN
    decay = tl.exp2(peak - shift)
    weights = tl.exp2(scores * LOG2E - shift[:, None])
    value = load_tile(tile_pointers(g, positions, outputs, g_m, g_e), positions, outputs, keys, width, MASKED,
                      not EVEN_E)
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator * decay[:, None],
                         input_precision=PRECISION)
    return accumulator, new_peak, total * decay + tl.sum(weights, 1)


@triton.jit
def attend(theta, phi, g, rows, outputs, queries, keys, depth, width, theta_d, theta_n, phi_d, phi_m, g_e,
           g_m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
           D_CHUNKS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr):
    """Returns y [BLOCK_N, BLOCK_E] and the log-sum-exp of one tile of queries, in float32."""
    channels = tl.arange(0, BLOCK_D)
    query = load_tile(tile_pointers(theta, rows, channels, theta_n, theta_d), rows, channels, queries, depth,
                      True, not EVEN_D)
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    accumulator = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    full = keys // BLOCK_M * BLOCK_M
    for start in range(0, full, BLOCK_M):
        accumulator, peak, total = attend_tile(accumulator, peak, total, query, theta, phi, g, rows, start,
                                               outputs, queries, keys, depth, width, theta_d, theta_n, phi_d,
                                               phi_m, g_e, g_m, BLOCK_M, BLOCK_D, D_CHUNKS, EVEN_D, EVEN_E,
                                               False, PRECISION)
    if full < keys:
        accumulator, peak, total = attend_tile(accumulator, peak, total, query, theta, phi, g, rows, full,
                                               outputs, queries, keys, depth, width, theta_d, theta_n, phi_d,
                                               phi_m, g_e, g_m, BLOCK_M, BLOCK_D, D_CHUNKS, EVEN_D, EVEN_E,
                                               True, PRECISION)
    return accumulator / total[:, None], (peak + tl.log2(total)) / LOG2E


@triton.jit
def _forward_kernel(theta, phi, g, y, lse, queries, keys, depth, width, theta_b, theta_d, theta_n, phi_b,
                    phi_d, phi_m, g_b, g_e, g_m, y_b, y_e, y_n, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, D_CHUNKS: tl.constexpr,
                    E_CHUNKS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr,
                    PRECISION: tl.constexpr):
    sample, rows = place(queries, BLOCK_N)
    outputs = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mean, log_sum = attend(theta + sample * theta_b, phi + sample * phi_b, g + sample * g_b, rows, outputs,
                           queries, keys, depth, width, theta_d, theta_n, phi_d, phi_m, g_e, g_m, BLOCK_N,
                           BLOCK_M, BLOCK_D, BLOCK_E, D_CHUNKS, EVEN_D, EVEN_E, PRECISION)
    tl.store(tile_pointers(y + sample * y_b, rows, outputs, y_n, y_e), mean.to(y.dtype.element_ty),
             (rows[:, None] < queries) & (outputs[None, :] < width))
    if tl.program_id(1) == 0:
        tl.store(lse + sample * queries + rows, log_sum, rows < queries)


@triton.jit
def _query_tile(gradient, query, grad, log_sum, delta, theta, phi, g, grad_y, rows, start, within, queries,
                keys, depth, width, theta_d, theta_n, phi_d, phi_m, g_e, g_m, grad_e, grad_n,
                BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, D_CHUNKS: tl.constexpr,
                E_CHUNKS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, MASKED: tl.constexpr,
                PRECISION: tl.constexpr):
    positions = start + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    outputs = tl.arange(0, BLOCK_E)
    key = load_tile(tile_pointers(phi, channels, positions, phi_d, phi_m), channels, positions, depth, keys,
                    not EVEN_D, MASKED)
    scores = contract(query, key, positions, theta, rows, theta_n, theta_d, phi, phi_m, phi_d, queries, keys,
                      depth, BLOCK_D, D_CHUNKS, EVEN_D, MASKED, PRECISION)
    weights = tl.exp2((scores - log_sum[:, None]) * LOG2E)
    value = load_tile(tile_pointers(g, outputs, positions, g_e, g_m), outputs, positions, width, keys,
                      not EVEN_E, MASKED)
    grad_weights = contract(grad, value, positions, grad_y, rows, grad_n, grad_e, g, g_m, g_e, queries, keys,
                            width, BLOCK_E, E_CHUNKS, EVEN_E, MASKED, PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None])
    if MASKED:
        grad_scores = tl.where(positions[None, :] < keys, grad_scores, 0.0)
    if D_CHUNKS > 1:
        key = load_tile(tile_pointers(phi, within, positions, phi_d, phi_m), within, positions, depth, keys,
                        not EVEN_D, MASKED)
    return tl.dot(grad_scores.to(key.dtype), tl.trans(key), gradient, input_precision=PRECISION)


@triton.jit
def _query_gradient_kernel(theta, phi, g, grad_y, y, lse, delta_out, gtheta, queries, keys, depth, width,
                           theta_b, theta_d, theta_n, phi_b, phi_d, phi_m, g_b, g_e, g_m, grad_b, grad_e,
                           grad_n, y_b, y_e, y_n, out_b, out_d, out_n, BLOCK_N: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
                           D_CHUNKS: tl.constexpr, E_CHUNKS: tl.constexpr, EVEN_D: tl.constexpr,
                           EVEN_E: tl.constexpr, PRECISION: tl.constexpr):
    sample, rows = place(queries, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    outputs = tl.arange(0, BLOCK_E)
    theta += sample * theta_b
    phi += sample * phi_b
    g += sample * g_b
    grad_y += sample * grad_b
    y += sample * y_b
    query = load_tile(tile_pointers(theta, rows, channels, theta_n, theta_d), rows, channels, queries, depth,
                      True, not EVEN_D)
    grad = load_tile(tile_pointers(grad_y, rows, outputs, grad_n, grad_e), rows, outputs, queries, width,
                     True, not EVEN_E)
    mean = load_tile(tile_pointers(y, rows, outputs, y_n, y_e), rows, outputs, queries, width, True,
                     not EVEN_E)
    delta = tl.sum(grad.to(tl.float32) * mean.to(tl.float32), 1)
    for index in tl.static_range(1, E_CHUNKS):
        others = index * BLOCK_E + outputs
        more = load_tile(tile_pointers(grad_y, rows, others, grad_n, grad_e), rows, others, queries, width,
                         True, not EVEN_E)
        mean = load_tile(tile_pointers(y, rows, others, y_n, y_e), rows, others, queries, width, True,
                         not EVEN_E)
        delta += tl.sum(more.to(tl.float32) * mean.to(tl.float32), 1)
    log_sum = tl.load(lse + sample * queries + rows, rows < queries, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(delta_out + sample * queries + rows, delta, rows < queries)
    within = tl.program_id(1) * BLOCK_D + channels
    gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    full = keys // BLOCK_M * BLOCK_M
    for start in range(0, full, BLOCK_M):
        gradient = _query_tile(gradient, query, grad, log_sum, delta, theta, phi, g, grad_y, rows, start,
                               within, queries, keys, depth, width, theta_d, theta_n, phi_d, phi_m, g_e, g_m,
                               grad_e, grad_n, BLOCK_M, BLOCK_D, BLOCK_E, D_CHUNKS, E_CHUNKS, EVEN_D, EVEN_E,
                               False, PRECISION)
    if full < keys:
        gradient = _query_tile(gradient, query, grad, log_sum, delta, theta, phi, g, grad_y, rows, full,
                               within, queries, keys, depth, width, theta_d, theta_n, phi_d, phi_m, g_e, g_m,
                               grad_e, grad_n, BLOCK_M, BLOCK_D, BLOCK_E, D_CHUNKS, E_CHUNKS, EVEN_D, EVEN_E,
                               True, PRECISION)
    tl.store(tile_pointers(gtheta + sample * out_b, rows, within, out_n, out_d),
             gradient.to(gtheta.dtype.element_ty), (rows[:, None] < queries) & (within[None, :] < depth))


@triton.jit
def _key_gradient_kernel(theta, phi, g, grad_y, lse, delta, gphi, gg, queries, keys, depth, width, theta_b,
                         theta_d, theta_n, phi_b, phi_d, phi_m, g_b, g_e, g_m, grad_b, grad_e, grad_n, gphi_b,
                         gphi_d, gphi_m, gg_b, gg_e, gg_m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, D_CHUNKS: tl.constexpr,
                         E_CHUNKS: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr,
                         PRECISION: tl.constexpr):
    sample, rows = place(keys, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    outputs = tl.arange(0, BLOCK_E)
    within_d = tl.program_id(1) * BLOCK_D + channels
    within_e = tl.program_id(1) * BLOCK_E + outputs
    theta += sample * theta_b
    phi += sample * phi_b
    g += sample * g_b
    grad_y += sample * grad_b
    key = load_tile(tile_pointers(phi, rows, channels, phi_m, phi_d), rows, channels, keys, depth, True,
                    not EVEN_D)
    value = load_tile(tile_pointers(g, rows, outputs, g_m, g_e), rows, outputs, keys, width, True, not EVEN_E)
    grad_key = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in range(0, queries, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        query = load_tile(tile_pointers(theta, channels, positions, theta_d, theta_n), channels, positions,
                          depth, queries, not EVEN_D, True)
        # A missing query has log-sum-exp inf: its weights are exactly 0.
        log_sum = tl.load(lse + sample * queries + positions, positions < queries, other=float("inf"))
        means = tl.load(delta + sample * queries + positions, positions < queries, other=0.0)
        scores = contract(key, query, positions, phi, rows, phi_m, phi_d, theta, theta_n, theta_d, keys,
                          queries, depth, BLOCK_D, D_CHUNKS, EVEN_D, True, PRECISION)
        weights = tl.exp2((scores - log_sum[None, :]) * LOG2E)
        grad = load_tile(tile_pointers(grad_y, outputs, positions, grad_e, grad_n), outputs, positions, width,
                         queries, not EVEN_E, True)
        grad_weights = contract(value, grad, positions, g, rows, g_m, g_e, grad_y, grad_n, grad_e, keys,
                                queries, width, BLOCK_E, E_CHUNKS, EVEN_E, True, PRECISION)
        grad_scores = weights * (grad_weights - means[None, :])
        if E_CHUNKS > 1:
            grad = load_tile(tile_pointers(grad_y, within_e, positions, grad_e, grad_n), within_e, positions,
                             width, queries, True, True)
        grad_value = tl.dot(weights.to(grad.dtype), tl.trans(grad), grad_value, input_precision=PRECISION)
        if D_CHUNKS > 1:
            query = load_tile(tile_pointers(theta, within_d, positions, theta_d, theta_n), within_d,
                              positions, depth, queries, True, True)
        grad_key = tl.dot(grad_scores.to(query.dtype), tl.trans(query), grad_key, input_precision=PRECISION)
    tl.store(tile_pointers(gphi + sample * gphi_b, rows, within_d, gphi_m, gphi_d),
             grad_key.to(gphi.dtype.element_ty), (rows[:, None] < keys) & (within_d[None, :] < depth))
    tl.store(tile_pointers(gg + sample * gg_b, rows, within_e, gg_m, gg_e),
             grad_value.to(gg.dtype.element_ty), (rows[:, None] < keys) & (within_e[None, :] < width))
