# mypy: ignore-errors
"""The whole softmax block on a GPU in two launches forward and six backward.

Forward: (1) theta, phi and g from one reading of x, with the key pooling in the epilogue; (2) attention with
W_z, bias and residual in the epilogue.  Backward: W_z; queries; keys; input; weights; their reduction.
Any strides of x, pooled windows of any size, bitwise reproducible.

Sizes: B batch, C channels, D inner channels of theta and phi, E of g, N positions, M keys.
Source: Wang et al., Non-local Neural Networks (2018), eq. 1-6, figure 2.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from rlnas_fast.ops.nonlocal_attention import library_core
from rlnas_fast.ops.nonlocal_attention.triton_kernels import (
    LARGEST_CHUNK,
    Tiles,
    attend,
    attention_backward,
    chunk,
    forward_tiles,
    load_tile,
    place,
    tile_pointers,
)
from rlnas_fast.ops.triton_launch import Launch, current_stream, dot_precision

__all__ = ["Projections", "Saved", "block_backward", "block_forward", "supports"]

PROGRAMS = 264  # two a multiprocessor of an H200


class Projections(NamedTuple):
    """The 1x1 convolutions as matrices; a bias may be None, but theta, phi and g must agree on having one."""

    theta: torch.Tensor  # [D, C]
    phi: torch.Tensor  # [D, C]
    g: torch.Tensor  # [E, C]
    out: torch.Tensor  # [C, E]
    theta_bias: torch.Tensor | None = None  # [D]
    phi_bias: torch.Tensor | None = None  # [D]
    g_bias: torch.Tensor | None = None  # [E]
    out_bias: torch.Tensor | None = None  # [C]


class Saved(NamedTuple):
    """What the backward needs beside x and the weights; O(N)."""

    query: torch.Tensor  # [B, N, D]
    key: torch.Tensor  # [B, M, D]
    value: torch.Tensor  # [B, M, E]
    mean: torch.Tensor  # [B, N, E]
    lse: torch.Tensor  # [B, N] float32
    key_choice: torch.Tensor | None  # [B, M, D] uint8: which position of its window was the largest
    value_choice: torch.Tensor | None  # [B, M, E] uint8


def supports(x: torch.Tensor, weights: Projections) -> bool:
    """Says whether the fused block fits: tensor cores, one chunk of inner channels, one rule of bias."""
    inner = max(weights.theta.shape[0], weights.g.shape[0])
    biases = {bias is None for bias in weights[4:7]}
    return x.numel() > 0 and dot_precision(x.dtype) == "tf32" and inner <= LARGEST_CHUNK["tf32"] and len(biases) == 1


def block_forward(
    x: torch.Tensor, weights: Projections, *, pool: tuple[int, ...] | None, residual: bool, save: bool
) -> tuple[torch.Tensor, Saved | None]:
    """Computes z = W_z y + bias (+ x) for softmax attention y between the positions of x.

    Args:
        x: [B, C, *spatial] with 1 to 3 spatial dimensions, any strides.
        weights: in x's dtype, contiguous.
        pool: the max-pooling window of the keys, one size a spatial dimension; None pools nothing.
        residual: whether x is added.
        save: whether the backward will follow.

    Returns:
        z, shaped and laid out as x; and what the backward needs, if ``save``.
    """
    plan = _forward_plan(*_signature(x, weights, pool), residual, save)
    z = torch.empty_like(x)
    if plan.library:
        return z, _library_forward(x, weights, z, plan)
    query, key, value = (x.new_empty(shape) for shape in plan.shapes[:3])
    mean = lse = key_choice = value_choice = None
    if save:
        mean, lse = x.new_empty(plan.shapes[3]), x.new_empty(plan.shapes[3][:2], dtype=torch.float32)
        if plan.pooled:
            key_choice, value_choice = (x.new_empty(shape, dtype=torch.uint8) for shape in plan.shapes[1:3])
    stream = current_stream(x.get_device())
    plan.project(stream, x, *weights[:3], *weights[4:7], query, key, value, key_choice, value_choice)
    plan.attend(stream, query, key, value, weights.out, weights.out_bias, x, z, mean, lse)
    return z, Saved(query, key, value, mean, lse, key_choice, value_choice) if save else None


def _library_forward(x: torch.Tensor, weights: Projections, z: torch.Tensor, plan: _Forward) -> Saved:
    rows = x.flatten(2).mT
    query, key, value = (F.linear(rows, weights[index], weights[index + 4]) for index in range(3))
    mean, lse = library_core.attention_forward(query, key, value)
    plan.finish(current_stream(x.get_device()), weights.out, weights.out_bias, x, z, mean)
    return Saved(query, key, value, mean, lse, None, None)


def block_backward(
    grad_z: torch.Tensor,
    x: torch.Tensor,
    weights: Projections,
    saved: Saved,
    *,
    pool: tuple[int, ...] | None,
    residual: bool,
) -> tuple[torch.Tensor, Projections]:
    """Computes the gradients of x and of every weight from what the forward saved."""
    plan = _backward_plan(*_signature(x, weights, pool), grad_z.stride(), grad_z.data_ptr() % 16 == 0, residual)
    stream = current_stream(x.get_device())
    choices = saved.key_choice, saved.value_choice
    gx, grad_mean = torch.empty_like(x), torch.empty_like(saved.mean)
    plan.back(stream, grad_z, weights.out, grad_mean)
    if plan.library:
        gradients = library_core.attention_backward(grad_mean, *saved[:5])
    else:
        rows = (each.mT for each in (grad_mean, saved.query, saved.key, saved.value, saved.mean))
        gradients = [gradient.mT for gradient in attention_backward(*rows, saved.lse)]
    plan.spread(stream, grad_z, *gradients, *choices, *weights[:3], gx)
    partial = x.new_empty((plan.splits, sum(plan.pieces)), dtype=torch.float32)
    plan.contribute(stream, x, grad_z, *gradients, *choices, saved.mean, partial)
    total = x.new_empty(partial.shape[1])
    plan.reduce(stream, partial, total)
    pieces = total.split(plan.pieces)
    return gx, Projections(
        *(None if weight is None else piece.view_as(weight) for piece, weight in zip(pieces, weights, strict=True))
    )


class _Forward(NamedTuple):
    project: Launch
    attend: Launch
    finish: Launch
    shapes: tuple[tuple[int, int, int], ...]  # of query, key, value, mean
    pooled: bool
    library: bool


class _Backward(NamedTuple):
    back: Launch
    spread: Launch
    contribute: Launch
    reduce: Launch
    splits: int
    library: bool
    pieces: list[int]  # of the reduced weight gradients, in the order of Projections


class _Geometry(NamedTuple):
    spatial: tuple[int, int, int]
    pool: tuple[int, int, int]
    strides: tuple[int, int, int, int, int]

    @property
    def positions(self) -> int:
        return math.prod(self.spatial)

    @property
    def pooled(self) -> tuple[int, int, int]:
        return tuple(size // window for size, window in zip(self.spatial, self.pool, strict=True))

    @property
    def keys(self) -> int:
        return math.prod(self.pooled)

    @property
    def flat(self) -> bool:
        """Whether one stride leads from each position to the next."""
        _, rows, columns = self.spatial
        _, _, slab, row, stride = self.strides
        return (rows == 1 or row == columns * stride) and (self.spatial[0] == 1 or slab == rows * columns * stride)


def _geometry(shape, strides, pool) -> _Geometry:
    """Widens to three spatial dimensions; a missing one spans what its inner ones do."""
    spatial, inner = list(shape[2:]), list(strides[2:])
    window = list(pool) if pool else [1] * len(spatial)
    while len(spatial) < 3:
        inner.insert(0, inner[0] * spatial[0])
        spatial.insert(0, 1)
        window.insert(0, 1)
    return _Geometry(tuple(spatial), tuple(window), (*strides[:2], *inner))


def _dense_like(shape, strides) -> tuple[int, ...]:
    """The strides that ``empty_like`` gives."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def _signature(x, weights, pool):
    """All that a launch depends on, apart from addresses."""
    return (
        x.shape, x.stride(), x.dtype, dot_precision(x.dtype), weights.theta.shape[0], weights.g.shape[0], pool,
        weights.theta_bias is not None, weights.out_bias is not None,
        x.data_ptr() % 16 == 0 and all(w is None or w.data_ptr() % 16 == 0 for w in weights),
        x.get_device(),
    )  # fmt: skip


def use_library(depth: int, width: int, queries: int, keys: int, dtype: torch.dtype) -> bool:
    """Says where vendor libraries make the faster core (measured on an H200): wide heads, many keys."""
    return min(depth, width) > 128 and min(queries, keys) >= 1024 and dtype is not torch.float32


class Gemm(NamedTuple):
    """How a product is cut: the tile of the result a program owns, and how much of the sum it takes at a time."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


def gemm_tiles(stage: str, columns: int, dtype: torch.dtype, precision: str, pooled: bool) -> Gemm:
    """Chooses the tiles of ``project``, ``back``, ``spread`` or ``contribute`` (measured on an H200)."""
    if precision == "ieee" and dtype is torch.float32:
        return Gemm(32, 32, 16, 4, 1)
    if dtype is torch.float32:
        return Gemm(64, min(64, chunk(columns)), 32, 4, 2)
    wide = min(128, chunk(columns))
    if stage == "contribute":
        side = max(64, wide)
        return Gemm(side, side, 64, side // 16, 3)
    if stage == "project" and pooled and wide == 128:
        return Gemm(64, wide, 64, 8, 3)  # the largest value so far and its index live beside the sum
    return Gemm(128, wide, 32, 8, 3) if stage == "spread" and wide == 128 else Gemm(64, wide, 32, 4, 3)


def attention_tiles(depth: int, width: int, queries: int, dtype: torch.dtype, precision: str) -> tuple[Tiles, int]:
    """Chooses the tiles of the attention, and how many channels of W_z y it makes at a time."""
    tiles = forward_tiles(depth, width, queries, dtype, precision)
    return tiles, 16 if precision == "ieee" else 32 if dtype is torch.float32 else 64


@functools.lru_cache(maxsize=4096)
def _forward_plan(
    shape, strides, dtype, precision, depth, width, pool, has_bias, has_out_bias, aligned, device, residual, save
) -> _Forward:
    batch, channels = shape[:2]
    geometry = _geometry(shape, strides, pool)
    output = _geometry(shape, _dense_like(shape, strides), pool)
    positions, keys, pooled = geometry.positions, geometry.keys, math.prod(geometry.pool) > 1
    tiles = gemm_tiles("project", max(depth, width), dtype, precision, pooled)
    sizes = (channels, depth, width, positions, keys, *geometry.spatial[1:], *geometry.pooled[1:])
    query_rows, key_rows = triton.cdiv(positions, tiles.rows), triton.cdiv(keys, tiles.rows)
    depth_tiles, width_tiles = triton.cdiv(depth, tiles.columns), triton.cdiv(width, tiles.columns)
    project = Launch(
        _project_kernel,
        ((query_rows * depth_tiles + key_rows * (depth_tiles + width_tiles)) * batch, 1, 1),
        (*sizes, *geometry.strides),
        {
            "BLOCK_P": tiles.rows, "BLOCK_C": tiles.step, "BLOCK_O": tiles.columns, "POOL_T": geometry.pool[0],
            "POOL_H": geometry.pool[1], "POOL_W": geometry.pool[2], "FLAT": geometry.flat,
            "HAS_BIAS": has_bias, "SAVE": save and pooled, "PRECISION": precision,
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )  # fmt: skip
    cut, part = attention_tiles(depth, width, positions, dtype, precision)
    block_d, block_e = chunk(depth, precision), chunk(width, precision)
    attention = Launch(
        _attention_kernel,
        (triton.cdiv(positions, cut.rows) * batch, 1, 1),
        (positions, keys, depth, width, channels, *geometry.spatial[1:], *geometry.strides, *output.strides),
        {
            "BLOCK_N": cut.rows, "BLOCK_M": cut.columns, "BLOCK_D": block_d, "BLOCK_E": block_e, "BLOCK_C": part,
            "EVEN_D": depth == block_d, "EVEN_E": width == block_e, "FLAT": geometry.flat, "Z_FLAT": output.flat,
            "HAS_BIAS": has_out_bias, "RESIDUAL": residual, "SAVE": save, "PRECISION": precision,
        },
        warps=cut.warps,
        stages=cut.stages,
    )  # fmt: skip
    finish_rows = Launch(
        _finish_kernel,
        (triton.cdiv(positions, 64) * batch, 1, 1),
        (positions, width, channels, *geometry.spatial[1:], *geometry.strides, *output.strides),
        {
            "BLOCK_N": 64, "BLOCK_E": block_e, "BLOCK_C": part, "FLAT": geometry.flat, "Z_FLAT": output.flat,
            "HAS_BIAS": has_out_bias, "RESIDUAL": residual, "PRECISION": precision,
        },
        warps=4,
        stages=2,
    )  # fmt: skip
    shapes = (batch, positions, depth), (batch, keys, depth), (batch, keys, width), (batch, positions, width)
    library = use_library(depth, width, positions, keys, dtype) and geometry.flat and strides[1] == 1
    return _Forward(project, attention, finish_rows, shapes, pooled, library)


@functools.lru_cache(maxsize=4096)
def _backward_plan(
    shape, strides, dtype, precision, depth, width, pool, has_bias, has_out_bias, aligned, device, grad_strides,
    grad_aligned, residual,
) -> _Backward:  # fmt: skip
    batch, channels = shape[:2]
    geometry, grad = (_geometry(shape, each, pool) for each in (strides, grad_strides))
    output = _geometry(shape, _dense_like(shape, strides), pool)
    positions, keys = geometry.positions, geometry.keys
    where = (*geometry.spatial, *geometry.pooled)
    pool_constants = dict(zip(("POOL_T", "POOL_H", "POOL_W"), geometry.pool, strict=True))

    def tiles_of(stage: str, columns: int) -> Gemm:
        return gemm_tiles(stage, columns, dtype, precision, math.prod(geometry.pool) > 1)

    tiles = tiles_of("back", width)
    back = Launch(
        _grad_mean_kernel,
        (triton.cdiv(positions, tiles.rows) * batch, triton.cdiv(width, tiles.columns), 1),
        (positions, channels, width, *geometry.spatial[1:], *grad.strides),
        {
            "BLOCK_P": tiles.rows, "BLOCK_C": tiles.step, "BLOCK_E": tiles.columns, "FLAT": grad.flat,
            "PRECISION": precision,
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )  # fmt: skip
    tiles = tiles_of("spread", channels)
    spread = Launch(
        _input_gradient_kernel,
        (triton.cdiv(positions, tiles.rows) * batch, triton.cdiv(channels, tiles.columns), 1),
        (positions, keys, channels, depth, width, *where, *grad.strides, *output.strides),
        {
            **pool_constants, "PRECISION": precision, "BLOCK_P": tiles.rows, "BLOCK_C": tiles.columns,
            "BLOCK_K": tiles.step, "RESIDUAL": residual, "FLAT": grad.flat, "X_FLAT": output.flat,
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )  # fmt: skip
    tiles = tiles_of("contribute", min(max(depth, width), channels))
    inner_tiles = 2 * triton.cdiv(depth, tiles.rows) + 2 * triton.cdiv(width, tiles.rows)
    programs = inner_tiles * triton.cdiv(channels, tiles.columns)
    steps = batch * triton.cdiv(positions, tiles.step)
    per_split = triton.cdiv(steps, max(1, min(steps, PROGRAMS // programs)))
    splits = triton.cdiv(steps, per_split)
    contribute = Launch(
        _weight_gradient_kernel,
        (programs, splits, 1),
        (batch, positions, keys, channels, depth, width, *where, per_split, *geometry.strides, *grad.strides),
        {
            **pool_constants, "PRECISION": precision, "BLOCK_P": tiles.step, "BLOCK_C": tiles.columns,
            "BLOCK_R": tiles.rows, "FLAT": geometry.flat and grad.flat,
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )  # fmt: skip
    pieces = [depth * channels] * 2 + [width * channels] * 2 + [depth, depth, width, channels]
    reduce = Launch(
        _reduce_kernel,
        (triton.cdiv(sum(pieces), 128), 1, 1),
        (splits, sum(pieces)),
        {"SPLITS": 16, "BLOCK": 128},
        warps=4,
        stages=2,
    )
    library = use_library(depth, width, positions, keys, dtype)
    return _Backward(back, spread, contribute, reduce, splits, library, pieces)


@triton.jit
def offset(position, height, width, stride_t, stride_h, stride_w, FLAT: tl.constexpr):
    """Where a position lies, in elements."""
    if FLAT:
        return position.to(tl.int64) * stride_w
    column = position % width
    row = position // width % height
    return ((position // width // height).to(tl.int64) * stride_t + row.to(tl.int64) * stride_h
            + column.to(tl.int64) * stride_w)


@triton.jit
def window_position(key, element, height, width, pooled_h, pooled_w, POOL_T: tl.constexpr, POOL_H: tl.constexpr,
                    POOL_W: tl.constexpr):
    """The position that is element ``element`` of the window of pooled position ``key``."""
    row = key // pooled_w % pooled_h * POOL_H + element // POOL_W % POOL_H
    column = key % pooled_w * POOL_W + element % POOL_W
    slab = key // pooled_w // pooled_h * POOL_T + element // POOL_W // POOL_H
    return (slab * height + row) * width + column


@triton.jit
def _project_kernel(x, theta, phi, g, theta_bias, phi_bias, g_bias, query, key, value, key_choice, value_choice,
                    channels, depth, width, positions, keys, height, columns, pooled_h, pooled_w, x_b, x_c, x_t,
                    x_h, x_w, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
                    POOL_T: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr, FLAT: tl.constexpr,
                    HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of theta, phi or g.  phi and g are the largest over each window, and remember which it was.

    One path serves all three: separate branches would each reserve their own shared memory.
    """
    WINDOW: tl.constexpr = POOL_T * POOL_H * POOL_W
    depth_tiles = tl.cdiv(depth, BLOCK_O)
    width_tiles = tl.cdiv(width, BLOCK_O)
    query_programs = tl.cdiv(positions, BLOCK_P) * depth_tiles
    key_programs = tl.cdiv(keys, BLOCK_P) * depth_tiles
    programs = query_programs + key_programs + tl.cdiv(keys, BLOCK_P) * width_tiles
    sample = (tl.program_id(0) // programs).to(tl.int64)
    pid = tl.program_id(0) % programs
    is_query = pid < query_programs
    is_value = pid >= query_programs + key_programs
    rows = tl.where(is_query, positions, keys)
    outputs = tl.where(is_value, width, depth)
    tiles = tl.where(is_value, width_tiles, depth_tiles)
    weight = tl.where(is_query, theta, tl.where(is_value, g, phi))
    out = tl.where(is_query, query, tl.where(is_value, value, key)) + sample * rows * outputs
    pid -= tl.where(is_query, 0, tl.where(is_value, query_programs + key_programs, query_programs))
    row = pid // tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    output = pid % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    x += sample * x_b
    largest = tl.full([BLOCK_P, BLOCK_O], float("-inf"), tl.float32)
    chosen = tl.zeros([BLOCK_P, BLOCK_O], tl.int32)
    for element in range(tl.where(is_query, 1, WINDOW) if WINDOW > 1 else 1):
        position = row
        if WINDOW > 1:
            pooled = window_position(row, element, height, columns, pooled_h, pooled_w, POOL_T, POOL_H, POOL_W)
            position = tl.where(is_query, row, pooled)
        where = x + offset(position, height, columns, x_t, x_h, x_w, FLAT)
        product = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
        for start in range(0, channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            left = tl.load(where[:, None] + channel.to(tl.int64)[None, :] * x_c,
                           (row[:, None] < rows) & (channel[None, :] < channels), other=0.0)
            right = load_tile(tile_pointers(weight, channel, output, 1, channels), channel, output, channels,
                              outputs, True, True)
            product = tl.dot(left, right, product, input_precision=PRECISION)
        if WINDOW == 1:
            largest = product
        else:
            take = (product > largest) | (product != product)  # NaN stays, as in torch's pooling
            largest = tl.where(take, product, largest)
            chosen = tl.where(take, element, chosen)
    if HAS_BIAS:
        bias = tl.where(is_query, theta_bias, tl.where(is_value, g_bias, phi_bias))
        largest += tl.load(bias + output, output < outputs, other=0.0).to(tl.float32)[None, :]
    mask = (row[:, None] < rows) & (output[None, :] < outputs)
    tl.store(tile_pointers(out, row, output, outputs, 1), largest.to(out.dtype.element_ty), mask)
    if SAVE:
        choice = tl.where(is_value, value_choice, key_choice) + sample * rows * outputs
        if not is_query:
            tl.store(tile_pointers(choice, row, output, outputs, 1), chosen.to(tl.uint8), mask)


@triton.jit
def _attention_kernel(query, key, value, weight, bias, x, z, mean_out, lse, positions, keys, depth, width, channels,
                      height, columns, x_b, x_c, x_t, x_h, x_w, z_b, z_c, z_t, z_h, z_w, BLOCK_N: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
                      EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, FLAT: tl.constexpr, Z_FLAT: tl.constexpr,
                      HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SAVE: tl.constexpr,
                      PRECISION: tl.constexpr):
    sample, row = place(positions, BLOCK_N)
    output = tl.arange(0, BLOCK_E)
    mean, log_sum = attend(query + sample * positions * depth, key + sample * keys * depth,
                           value + sample * keys * width, row, output, positions, keys, depth, width, 1, depth, 1,
                           depth, 1, width, BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_E, 1, EVEN_D, EVEN_E, PRECISION)
    mean = mean.to(query.dtype.element_ty)
    if SAVE:
        tl.store(tile_pointers(mean_out + sample * positions * width, row, output, width, 1), mean,
                 (row[:, None] < positions) & (output[None, :] < width))
        tl.store(lse + sample * positions + row, log_sum, row < positions)
    finish(mean, row, weight, bias, x + sample * x_b, z + sample * z_b, positions, width, channels, height, columns,
           x_c, x_t, x_h, x_w, z_c, z_t, z_h, z_w, BLOCK_E, BLOCK_C, FLAT, Z_FLAT, HAS_BIAS, RESIDUAL, PRECISION)


@triton.jit
def finish(mean, row, weight, bias, x, z, positions, width, channels, height, columns, x_c, x_t, x_h, x_w, z_c, z_t,
           z_h, z_w, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, Z_FLAT: tl.constexpr,
           HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr):
    """Stores z = W_z mean + bias + x for a tile of positions."""
    output = tl.arange(0, BLOCK_E)
    x_rows = x + offset(row, height, columns, x_t, x_h, x_w, FLAT)
    z_rows = z + offset(row, height, columns, z_t, z_h, z_w, Z_FLAT)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        part = load_tile(tile_pointers(weight, output, channel, 1, width), output, channel, width, channels, True,
                         True)
        result = tl.dot(mean, part, input_precision=PRECISION)
        if HAS_BIAS:
            result += tl.load(bias + channel, channel < channels, other=0.0).to(tl.float32)[None, :]
        mask = (row[:, None] < positions) & (channel[None, :] < channels)
        if RESIDUAL:
            result += tl.load(x_rows[:, None] + channel.to(tl.int64)[None, :] * x_c, mask, other=0.0).to(tl.float32)
        tl.store(z_rows[:, None] + channel.to(tl.int64)[None, :] * z_c, result.to(z.dtype.element_ty), mask)


@triton.jit
def _finish_kernel(weight, bias, x, z, mean_in, positions, width, channels, height, columns, x_b, x_c, x_t, x_h, x_w,
                   z_b, z_c, z_t, z_h, z_w, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
                   FLAT: tl.constexpr, Z_FLAT: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
                   PRECISION: tl.constexpr):
    sample, row = place(positions, BLOCK_N)
    output = tl.arange(0, BLOCK_E)
    mean = load_tile(tile_pointers(mean_in + sample * positions * width, row, output, width, 1), row, output, positions,
                     width, True, True)
    finish(mean, row, weight, bias, x + sample * x_b, z + sample * z_b, positions, width, channels, height, columns,
           x_c, x_t, x_h, x_w, z_c, z_t, z_h, z_w, BLOCK_E, BLOCK_C, FLAT, Z_FLAT, HAS_BIAS, RESIDUAL, PRECISION)


@triton.jit
def _grad_mean_kernel(grad_z, weight, grad_mean, positions, channels, width, height, columns, grad_b, grad_c, grad_t,
                      grad_h, grad_w, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
                      FLAT: tl.constexpr, PRECISION: tl.constexpr):
    sample, row = place(positions, BLOCK_P)
    output = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    where = grad_z + sample * grad_b + offset(row, height, columns, grad_t, grad_h, grad_w, FLAT)
    product = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        left = tl.load(where[:, None] + channel.to(tl.int64)[None, :] * grad_c,
                       (row[:, None] < positions) & (channel[None, :] < channels), other=0.0)
        right = load_tile(tile_pointers(weight, channel, output, width, 1), channel, output, channels, width, True,
                          True)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    tl.store(tile_pointers(grad_mean + sample * positions * width, row, output, width, 1),
             product.to(grad_mean.dtype.element_ty), (row[:, None] < positions) & (output[None, :] < width))


@triton.jit
def gather_gradient(gradient, choice, pooled, row, inner, positions, size, height, columns, pooled_t, pooled_h,
                    pooled_w, POOL_T: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr):
    """Gradient [rows, inner] at full resolution of a projection, which was pooled if ``pooled`` says so."""
    if POOL_T * POOL_H * POOL_W == 1:
        values = load_tile(tile_pointers(gradient, row, inner, size, 1), row, inner, positions, size, True, True)
    else:
        slab, line, column = row // columns // height, row // columns % height, row % columns
        element = (slab % POOL_T * POOL_H + line % POOL_H) * POOL_W + column % POOL_W
        slab, line, column = slab // POOL_T, line // POOL_H, column // POOL_W
        inside = (slab < pooled_t) & (line < pooled_h) & (column < pooled_w)
        key = tl.where(row * 0 + pooled > 0, (slab * pooled_h + line) * pooled_w + column, row)
        covered = (row < positions) & (inside.to(tl.int32) >= pooled)
        mask = covered[:, None] & (inner[None, :] < size)
        values = tl.load(tile_pointers(gradient, key, inner, size, 1), mask, other=0.0)
        winner = tl.load(tile_pointers(choice, key, inner, size, 1), mask & (row * 0 + pooled > 0)[:, None], other=0)
        won = (winner.to(tl.int32) == element[:, None]).to(tl.int32)
        values = tl.where(won >= pooled, values, 0.0)
    return values


@triton.jit
def _input_gradient_kernel(grad_z, gquery, gkey, gvalue, key_choice, value_choice, theta, phi, g, gx, positions, keys,
                           channels, depth, width, slabs, height, columns, pooled_t, pooled_h, pooled_w, grad_b,
                           grad_c, grad_t, grad_h, grad_w, x_b, x_c, x_t, x_h, x_w, BLOCK_C: tl.constexpr,
                           POOL_T: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr,
                           PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
                           RESIDUAL: tl.constexpr, FLAT: tl.constexpr, X_FLAT: tl.constexpr):
    POOLED: tl.constexpr = POOL_T * POOL_H * POOL_W > 1
    sample, row = place(positions, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row[:, None] < positions) & (channel[None, :] < channels)
    gquery += sample * positions * depth
    gkey += sample * keys * depth
    gvalue += sample * keys * width
    if POOLED:
        key_choice += sample * keys * depth
        value_choice += sample * keys * width
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = load_tile(tile_pointers(gquery, row, inner, depth, 1), row, inner, positions, depth, True, True)
        right = load_tile(tile_pointers(theta, inner, channel, channels, 1), inner, channel, depth, channels, True,
                          True)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    for start in range(0, depth, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = gather_gradient(gkey, key_choice, 1, row, inner, positions, depth, height, columns, pooled_t, pooled_h,
                               pooled_w, POOL_T, POOL_H, POOL_W)
        right = load_tile(tile_pointers(phi, inner, channel, channels, 1), inner, channel, depth, channels, True,
                          True)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = gather_gradient(gvalue, value_choice, 1, row, inner, positions, width, height, columns, pooled_t,
                               pooled_h, pooled_w, POOL_T, POOL_H, POOL_W)
        right = load_tile(tile_pointers(g, inner, channel, channels, 1), inner, channel, width, channels, True, True)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if RESIDUAL:
        rows = grad_z + sample * grad_b + offset(row, height, columns, grad_t, grad_h, grad_w, FLAT)
        total += tl.load(rows[:, None] + channel.to(tl.int64)[None, :] * grad_c, mask, other=0.0).to(tl.float32)
    rows = gx + sample * x_b + offset(row, height, columns, x_t, x_h, x_w, X_FLAT)
    tl.store(rows[:, None] + channel.to(tl.int64)[None, :] * x_c, total.to(gx.dtype.element_ty), mask)


@triton.jit
def _weight_gradient_kernel(x, grad_z, gquery, gkey, gvalue, key_choice, value_choice, mean, partial, batch,
                            positions, keys, channels, depth, width, slabs, height, columns, pooled_t, pooled_h,
                            pooled_w, per_split, x_b, x_c, x_t, x_h, x_w, grad_b, grad_c, grad_t, grad_h, grad_w,
                            POOL_T: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr,
                            PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                            BLOCK_R: tl.constexpr, FLAT: tl.constexpr):
    """Sums one tile of one weight's gradient over one split of the positions; row sums are the biases.

    theta, phi and g: gradient^T x.  W_z: the same with mean^T grad_z, stored transposed.
    """
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    depth_programs = tl.cdiv(depth, BLOCK_R) * channel_tiles
    width_programs = tl.cdiv(width, BLOCK_R) * channel_tiles
    pid = tl.program_id(0)
    is_theta = pid < depth_programs
    is_out = pid >= 2 * depth_programs + width_programs
    is_value = (pid >= 2 * depth_programs) & (pid < 2 * depth_programs + width_programs)
    is_wide = is_value | is_out
    index = tl.where(is_theta, 0, tl.where(is_value, 2, tl.where(is_out, 3, 1)))
    size = tl.where(is_wide, width, depth)
    inner_rows = tl.where(is_theta, gquery, tl.where(is_value, gvalue, tl.where(is_out, mean, gkey)))
    choice = key_choice
    if POOL_T * POOL_H * POOL_W > 1:
        choice = tl.where(is_value, value_choice, key_choice)
    pooled = tl.where(is_theta | is_out, 0, 1)
    inner_positions = tl.where(is_theta | is_out, positions, keys)
    wide = tl.where(is_out, grad_z, x)
    wide_b, wide_c = tl.where(is_out, grad_b, x_b), tl.where(is_out, grad_c, x_c)
    wide_t, wide_h, wide_w = (tl.where(is_out, grad_t, x_t), tl.where(is_out, grad_h, x_h),
                              tl.where(is_out, grad_w, x_w))
    pid -= tl.where(is_theta, 0, tl.where(is_out, 2 * depth_programs + width_programs, index * depth_programs))
    inner = pid // channel_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = tl.cdiv(positions, BLOCK_P)
    first = tl.program_id(1) * per_split
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    inner_sum = tl.zeros([BLOCK_R], tl.float32)
    channel_sum = tl.zeros([BLOCK_C], tl.float32)
    for step in range(first, tl.minimum(first + per_split, batch * tiles)):
        sample = (step // tiles).to(tl.int64)
        row = step % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        shift = sample * inner_positions * size
        left = gather_gradient(inner_rows + shift, choice + shift if POOL_T * POOL_H * POOL_W > 1 else choice,
                               pooled, row, inner, positions, size, height, columns, pooled_t, pooled_h, pooled_w,
                               POOL_T, POOL_H, POOL_W)
        where = wide + sample * wide_b + offset(row, height, columns, wide_t, wide_h, wide_w, FLAT)
        right = tl.load(where[:, None] + channel.to(tl.int64)[None, :] * wide_c,
                        (row[:, None] < positions) & (channel[None, :] < channels), other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        inner_sum += tl.sum(left.to(tl.float32), 0)
        channel_sum += tl.sum(right.to(tl.float32), 0)
    matrices = (2 * depth + 2 * width) * channels
    partial += tl.program_id(1).to(tl.int64) * (matrices + 2 * depth + width + channels)
    before = tl.where(is_out, 2 * depth + width, index * depth)
    tl.store(tile_pointers(partial + before * channels, inner, channel, tl.where(is_out, 1, channels),
                           tl.where(is_out, size, 1)), total, (inner[:, None] < size) & (channel[None, :] < channels))
    sums = partial + matrices + before
    if is_out:
        if pid // channel_tiles == 0:
            tl.store(sums + channel, channel_sum, channel < channels)
    elif pid % channel_tiles == 0:
        tl.store(sums + inner, inner_sum, inner < size)


@triton.jit
def _reduce_kernel(partial, total, splits, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums the splits in their order, so that runs are bitwise equal."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([SPLITS, BLOCK], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        sums += tl.load(tile_pointers(partial, split, column, size, 1),
                        (split[:, None] < splits) & (column[None, :] < size), other=0.0)
    tl.store(total + column, tl.sum(sums, 0).to(total.dtype.element_ty), column < size)
