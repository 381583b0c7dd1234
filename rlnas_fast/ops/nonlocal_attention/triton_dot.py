# mypy: ignore-errors
"""The dot-product block on a GPU in three launches, linear in the number of positions, N x M never formed.

With k = phi x, v = g x, q = theta x (biases included), M keys:  z = W_z (sum_j v_j k_j^T / M) q + bias + x.
(1) Moments: sum_j k_j v_j^T, a D x E matrix a sample; k and v never leave the chip.  (2) Fold: that matrix
times W_z^T / M.  (3) Apply: two products a tile of positions, bias and residual in the epilogue.

Source: Wang et al., Non-local Neural Networks (2018), eq. 4, reassociated.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rlnas_fast.ops.nonlocal_attention.triton_block import (
    Projections,
    _dense_like,
    _geometry,
    _signature,
)
from rlnas_fast.ops.nonlocal_attention.triton_block_kernels import offset, window_position
from rlnas_fast.ops.nonlocal_attention.triton_kernels import chunk, load_tile, place, tile_pointers
from rlnas_fast.ops.triton_launch import Launch, current_stream

__all__ = ["block_forward"]

PROGRAMS = 264  # two a multiprocessor of an H200


class _Plan(NamedTuple):
    moments: Launch
    fold: Launch
    apply: Launch
    partial: tuple[int, int, int, int]
    folded: tuple[int, int, int]


def block_forward(
    x: torch.Tensor, weights: Projections, *, pool: tuple[int, ...] | None, residual: bool
) -> torch.Tensor:
    """Computes the dot-product block for x [B, C, *spatial] in bfloat16 or float16; no gradient.

    Args and result are those of ``triton_block.block_forward``.
    """
    plan = _plan(*_signature(x, weights, pool), residual)
    z = torch.empty_like(x)
    partial, folded = x.new_empty(plan.partial, dtype=torch.float32), x.new_empty(plan.folded)
    stream = current_stream(x.get_device())
    plan.moments(stream, x, weights.phi, weights.g, weights.phi_bias, weights.g_bias, partial)
    plan.fold(stream, partial, weights.out, folded)
    plan.apply(stream, x, weights.theta, weights.theta_bias, folded, weights.out_bias, z)
    return z


@functools.lru_cache(maxsize=4096)
def _plan(
    shape, strides, dtype, precision, depth, width, pool, has_bias, has_out_bias, aligned, device, residual
) -> _Plan:
    batch, channels = shape[:2]
    geometry = _geometry(shape, strides, pool)
    output = _geometry(shape, _dense_like(shape, strides), pool)
    positions, keys = geometry.positions, geometry.keys
    pooled = math.prod(geometry.pool) > 1  # the largest values so far need registers too
    block_d, block_e = min(128, chunk(depth)), min(64 if pooled else 128, chunk(width))
    warps = 8 if max(block_d, block_e) == 128 else 4
    tiles = triton.cdiv(keys, 64)
    pairs = triton.cdiv(depth, block_d) * triton.cdiv(width, block_e)
    per_split = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // (batch * pairs))))
    splits = triton.cdiv(tiles, per_split)
    moments = Launch(
        _moments_kernel,
        (batch * splits, triton.cdiv(depth, block_d), triton.cdiv(width, block_e)),
        (
            keys, channels, depth, width, splits, per_split, *geometry.spatial[1:], *geometry.pooled[1:],
            *geometry.strides,
        ),
        {
            "BLOCK_P": 64, "BLOCK_C": 64, "BLOCK_D": block_d, "BLOCK_E": block_e,
            "POOL_T": geometry.pool[0], "POOL_H": geometry.pool[1], "POOL_W": geometry.pool[2],
            "FLAT": geometry.flat, "HAS_BIAS": has_bias, "PRECISION": precision,
        },
        warps=warps,
        stages=2,
    )  # fmt: skip
    fold = Launch(
        _fold_kernel,
        (batch, triton.cdiv(depth, 64), triton.cdiv(channels, 64)),
        (splits, keys, channels, depth, width),
        {"BLOCK_D": 64, "BLOCK_C": 64, "BLOCK_E": min(64, block_e), "PRECISION": precision},
        warps=4,
        stages=2,
    )
    inner = max(16, triton.next_power_of_2(depth))
    apply = Launch(
        _apply_kernel,
        (triton.cdiv(positions, 64) * batch, 1, 1),
        (positions, channels, depth, *geometry.spatial[1:], *geometry.strides, *output.strides),
        {
            "BLOCK_P": 64, "BLOCK_C": 64, "BLOCK_D": inner, "FLAT": geometry.flat, "Z_FLAT": output.flat,
            "HAS_BIAS": has_bias, "HAS_OUT_BIAS": has_out_bias, "RESIDUAL": residual, "PRECISION": precision,
        },
        warps=4 if inner <= 128 else 8,
        stages=3,
    )  # fmt: skip
    return _Plan(moments, fold, apply, (batch, splits, depth, width), (batch, depth, channels))


# fmt: off
@triton.jit
def _moments_kernel(x, phi, g, phi_bias, g_bias, partial, keys, channels, depth, width, splits, per_split,
                    height, columns, pooled_h, pooled_w, x_b, x_c, x_t, x_h, x_w, BLOCK_P: tl.constexpr,
                    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, POOL_T: tl.constexpr,
                    POOL_H: tl.constexpr, POOL_W: tl.constexpr, FLAT: tl.constexpr, HAS_BIAS: tl.constexpr,
                    PRECISION: tl.constexpr):
    """Sums k v^T over one split of one sample's keys."""
    WINDOW: tl.constexpr = POOL_T * POOL_H * POOL_W
    sample = (tl.program_id(0) // splits).to(tl.int64)
    first = tl.program_id(0) % splits * per_split * BLOCK_P
    channel_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel_e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    x += sample * x_b
    total = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for start in range(first, tl.minimum(first + per_split * BLOCK_P, keys), BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        key = tl.full([BLOCK_P, BLOCK_D], float("-inf"), tl.float32)
        value = tl.full([BLOCK_P, BLOCK_E], float("-inf"), tl.float32)
        for element in range(WINDOW):
            position = row
            if WINDOW > 1:
                position = window_position(row, element, height, columns, pooled_h, pooled_w, POOL_T, POOL_H,
                                           POOL_W)
            where = x + offset(position, height, columns, x_t, x_h, x_w, FLAT)
            key_part = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
            value_part = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
            for begin in range(0, channels, BLOCK_C):
                channel = begin + tl.arange(0, BLOCK_C)
                left = tl.load(where[:, None] + channel.to(tl.int64)[None, :] * x_c,
                               (row[:, None] < keys) & (channel[None, :] < channels), other=0.0)
                right = load_tile(tile_pointers(phi, channel, channel_d, 1, channels), channel, channel_d,
                                  channels, depth, True, True)
                key_part = tl.dot(left, right, key_part, input_precision=PRECISION)
                right = load_tile(tile_pointers(g, channel, channel_e, 1, channels), channel, channel_e,
                                  channels, width, True, True)
                value_part = tl.dot(left, right, value_part, input_precision=PRECISION)
            if WINDOW == 1:
                key, value = key_part, value_part
            else:
                key = tl.where((key_part > key) | (key_part != key_part), key_part, key)
                value = tl.where((value_part > value) | (value_part != value_part), value_part, value)
        if HAS_BIAS:
            key += tl.load(phi_bias + channel_d, channel_d < depth, other=0.0).to(tl.float32)[None, :]
            value += tl.load(g_bias + channel_e, channel_e < width, other=0.0).to(tl.float32)[None, :]
        key = tl.where(row[:, None] < keys, key, 0.0).to(x.dtype.element_ty)
        value = tl.where(row[:, None] < keys, value, 0.0).to(x.dtype.element_ty)
        total = tl.dot(tl.trans(key), value, total, input_precision=PRECISION)
    partial += tl.program_id(0).to(tl.int64) * depth * width
    tl.store(tile_pointers(partial, channel_d, channel_e, width, 1), total,
             (channel_d[:, None] < depth) & (channel_e[None, :] < width))


@triton.jit
def _fold_kernel(partial, out, folded, splits, keys, channels, depth, width, BLOCK_D: tl.constexpr,
                 BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of (sum of the splits) W_z^T / M."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    for start in range(0, width, BLOCK_E):
        inner = start + tl.arange(0, BLOCK_E)
        moment = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
        for split in range(0, splits):
            source = partial + (sample * splits + split) * depth * width
            moment += load_tile(tile_pointers(source, row, inner, width, 1), row, inner, depth, width, True,
                                True)
        weight = load_tile(tile_pointers(out, inner, channel, 1, width), inner, channel, width, channels,
                           True, True)
        total = tl.dot((moment / keys).to(weight.dtype), weight, total, input_precision=PRECISION)
    tl.store(tile_pointers(folded + sample * depth * channels, row, channel, channels, 1),
             total.to(folded.dtype.element_ty), (row[:, None] < depth) & (channel[None, :] < channels))


@triton.jit
def _apply_kernel(x, theta, theta_bias, folded, out_bias, z, positions, channels, depth, height, columns, x_b,
                  x_c, x_t, x_h, x_w, z_b, z_c, z_t, z_h, z_w, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                  BLOCK_D: tl.constexpr, FLAT: tl.constexpr, Z_FLAT: tl.constexpr, HAS_BIAS: tl.constexpr,
                  HAS_OUT_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr):
    sample, row = place(positions, BLOCK_P)
    inner = tl.arange(0, BLOCK_D)
    x_rows = x + sample * x_b + offset(row, height, columns, x_t, x_h, x_w, FLAT)
    z_rows = z + sample * z_b + offset(row, height, columns, z_t, z_h, z_w, Z_FLAT)
    query = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        left = tl.load(x_rows[:, None] + channel.to(tl.int64)[None, :] * x_c,
                       (row[:, None] < positions) & (channel[None, :] < channels), other=0.0)
        right = load_tile(tile_pointers(theta, channel, inner, 1, channels), channel, inner, channels, depth,
                          True, True)
        query = tl.dot(left, right, query, input_precision=PRECISION)
    if HAS_BIAS:
        query += tl.load(theta_bias + inner, inner < depth, other=0.0).to(tl.float32)[None, :]
    query = query.to(x.dtype.element_ty)
    folded += sample * depth * channels
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        part = load_tile(tile_pointers(folded, inner, channel, channels, 1), inner, channel, depth, channels,
                         True, True)
        result = tl.dot(query, part, input_precision=PRECISION)
        if HAS_OUT_BIAS:
            result += tl.load(out_bias + channel, channel < channels, other=0.0).to(tl.float32)[None, :]
        mask = (row[:, None] < positions) & (channel[None, :] < channels)
        if RESIDUAL:
            result += tl.load(x_rows[:, None] + channel.to(tl.int64)[None, :] * x_c, mask,
                              other=0.0).to(tl.float32)
        tl.store(z_rows[:, None] + channel.to(tl.int64)[None, :] * z_c, result.to(z.dtype.element_ty), mask)
