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
import triton

from rlnas_fast.ops.nonlocal_attention import library_core
from rlnas_fast.ops.nonlocal_attention import triton_block_kernels as kernels
from rlnas_fast.ops.nonlocal_attention.triton_kernels import (
    LARGEST_CHUNK,
    Tiles,
    attention_backward,
    chunk,
    forward_tiles,
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
    return (
        x.numel() > 0
        and dot_precision(x.dtype) == "tf32"
        and inner <= LARGEST_CHUNK["tf32"]
        and len(biases) == 1
    )


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
    stream = current_stream(x.get_device())
    if plan.small is not None:
        plan.small(stream, x, *weights, z)
        return z, None
    query, key, value = (x.new_empty(shape) for shape in plan.shapes[:3])
    mean = lse = key_choice = value_choice = None
    if save and plan.fused:
        mean, lse = x.new_empty(plan.shapes[3]), x.new_empty(plan.shapes[3][:2], dtype=torch.float32)
    if save and plan.pooled:
        key_choice, value_choice = (x.new_empty(shape, dtype=torch.uint8) for shape in plan.shapes[1:3])
    plan.project(stream, x, *weights[:3], *weights[4:7], query, key, value, key_choice, value_choice)
    if plan.fused:
        plan.attend(stream, query, key, value, weights.out, weights.out_bias, x, z, mean, lse)
    else:
        mean, lse = library_core.attention_forward(query, key, value)
        plan.finish(stream, weights.out, weights.out_bias, x, z, mean)
    return z, Saved(query, key, value, mean, lse, key_choice, value_choice) if save else None


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
    plan = _backward_plan(
        *_signature(x, weights, pool), grad_z.stride(), grad_z.data_ptr() % 16 == 0, residual
    )
    stream = current_stream(x.get_device())
    choices = saved.key_choice, saved.value_choice
    gx, grad_mean = torch.empty_like(x), torch.empty_like(saved.mean)
    plan.back(stream, grad_z, weights.out, grad_mean)
    if plan.library and not torch.are_deterministic_algorithms_enabled():
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
        *(
            None if weight is None else piece.view_as(weight)
            for piece, weight in zip(pieces, weights, strict=True)
        )
    )


class _Forward(NamedTuple):
    project: Launch
    attend: Launch
    finish: Launch
    shapes: tuple[tuple[int, int, int], ...]  # of query, key, value, mean
    pooled: bool
    fused: bool
    small: Launch | None  # the whole block in one launch, where nothing is saved


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
        return (rows == 1 or row == columns * stride) and (
            self.spatial[0] == 1 or slab == rows * columns * stride
        )


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
        x.shape, x.stride(), x.dtype, dot_precision(x.dtype), weights.theta.shape[0], weights.g.shape[0],
        pool, weights.theta_bias is not None, weights.out_bias is not None,
        x.data_ptr() % 16 == 0 and all(w is None or w.data_ptr() % 16 == 0 for w in weights),
        x.get_device(),
    )  # fmt: skip


def use_fused(width: int, keys: int, dtype: torch.dtype) -> bool:
    """Says where W_z y in the attention's epilogue pays (measured on an H200).

    With 128 channels or more, and many keys, SDPA's core wins more than the epilogue saves.
    """
    return dtype is torch.float32 or chunk(width) < 128 or keys < 512


SMALL = Tiles(64, 64, 4, 2)


def use_small(channels: int, depth: int, width: int, keys: int, dtype: torch.dtype) -> bool:
    """Says where projecting the keys again for every tile of queries costs less than a second launch."""
    return dtype is not torch.float32 and channels <= 128 and max(depth, width) <= 64 and keys <= 256


def use_library_backward(depth: int, width: int, queries: int, keys: int, dtype: torch.dtype) -> bool:
    """Says where SDPA's backward is faster although its forward runs again (measured on an H200)."""
    return min(depth, width) > 128 and min(queries, keys) >= 256 and dtype is not torch.float32


class Gemm(NamedTuple):
    """How a product is cut: the tile a program owns, and the part of the sum it takes at a time."""

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
    if chunk(columns) < 128:
        narrow = {"spread": Gemm(64, 64, 32, 4, 3), "contribute": Gemm(64, 64, 64, 4, 2)}
        return narrow.get(stage, Gemm(64, chunk(columns), 64 if stage == "project" else 32, 4, 2))
    if stage == "project" and pooled:
        return Gemm(128, 128, 32, 8, 3)  # the largest value so far and its index live beside the sum
    wide = {
        "project": Gemm(64, 128, 64, 4, 3),
        "back": Gemm(128, 128, 32, 4, 3),
        "spread": Gemm(64, 128, 32, 4, 3),
        "contribute": Gemm(64, 128, 64, 4, 3),
    }
    return wide[stage]


def attention_tiles(
    depth: int, width: int, queries: int, dtype: torch.dtype, precision: str
) -> tuple[Tiles, int]:
    """Chooses the tiles of the attention, and how many channels of W_z y it makes at a time."""
    tiles = forward_tiles(depth, width, queries, dtype, precision)
    if dtype is not torch.float32 and max(chunk(depth), chunk(width)) == 128:
        tiles = Tiles(128, 32, 4, 2)
    if dtype is not torch.float32 and max(chunk(depth), chunk(width)) == 256:
        return Tiles(64, 64, 8, 2), 32
    return tiles, 16 if precision == "ieee" else 32 if dtype is torch.float32 else 64


@functools.lru_cache(maxsize=4096)
def _forward_plan(
    shape,
    strides,
    dtype,
    precision,
    depth,
    width,
    pool,
    has_bias,
    has_out_bias,
    aligned,
    device,
    residual,
    save,
) -> _Forward:
    batch, channels = shape[:2]
    geometry = _geometry(shape, strides, pool)
    output = _geometry(shape, _dense_like(shape, strides), pool)
    positions, keys, pooled = geometry.positions, geometry.keys, math.prod(geometry.pool) > 1
    pool_constants = dict(zip(("POOL_T", "POOL_H", "POOL_W"), geometry.pool, strict=True))
    tiles = gemm_tiles("project", max(depth, width), dtype, precision, pooled)
    sizes = (channels, depth, width, positions, keys, *geometry.spatial[1:], *geometry.pooled[1:])
    query_rows, key_rows = triton.cdiv(positions, tiles.rows), triton.cdiv(keys, tiles.rows)
    depth_tiles, width_tiles = triton.cdiv(depth, tiles.columns), triton.cdiv(width, tiles.columns)
    project = Launch(
        kernels.project_kernel,
        ((query_rows * depth_tiles + key_rows * (depth_tiles + width_tiles)) * batch, 1, 1),
        (*sizes, *geometry.strides),
        {
            "BLOCK_P": tiles.rows, "BLOCK_C": tiles.step, "BLOCK_O": tiles.columns, **pool_constants,
            "FLAT": geometry.flat, "HAS_BIAS": has_bias, "SAVE": save and pooled, "PRECISION": precision,
        },
        warps=tiles.warps,
        stages=tiles.stages,
    )  # fmt: skip
    cut, part = attention_tiles(depth, width, positions, dtype, precision)
    block_d, block_e = chunk(depth, precision), chunk(width, precision)
    attention = Launch(
        kernels.attention_kernel,
        (triton.cdiv(positions, cut.rows) * batch, 1, 1),
        (positions, keys, depth, width, channels, *geometry.spatial[1:], *geometry.strides, *output.strides),
        {
            "BLOCK_N": cut.rows, "BLOCK_M": cut.columns, "BLOCK_D": block_d, "BLOCK_E": block_e,
            "BLOCK_C": part, "EVEN_D": depth == block_d, "EVEN_E": width == block_e, "FLAT": geometry.flat,
            "Z_FLAT": output.flat, "HAS_BIAS": has_out_bias, "RESIDUAL": residual, "SAVE": save,
            "PRECISION": precision,
        },
        warps=cut.warps,
        stages=cut.stages,
    )  # fmt: skip
    finish_rows = Launch(
        kernels.finish_kernel,
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
    fused = use_fused(width, keys, dtype)
    small = None
    if use_small(channels, depth, width, keys, dtype) and not save:
        small = Launch(
            kernels.small_forward_kernel,
            (triton.cdiv(positions, SMALL.rows) * batch, 1, 1),
            (
                positions, keys, channels, depth, width, *geometry.spatial[1:], *geometry.pooled[1:],
                *geometry.strides, *output.strides,
            ),
            {
                "BLOCK_N": SMALL.rows, "BLOCK_M": SMALL.columns, "BLOCK_C": chunk(channels),
                "BLOCK_D": block_d, "BLOCK_E": block_e, **pool_constants, "FLAT": geometry.flat,
                "Z_FLAT": output.flat, "HAS_BIAS": has_bias, "HAS_OUT_BIAS": has_out_bias,
                "RESIDUAL": residual, "PRECISION": precision,
            },
            warps=SMALL.warps,
            stages=SMALL.stages,
        )  # fmt: skip
    return _Forward(project, attention, finish_rows, shapes, pooled, fused, small)


@functools.lru_cache(maxsize=4096)
def _backward_plan(
    shape, strides, dtype, precision, depth, width, pool, has_bias, has_out_bias, aligned, device,
    grad_strides, grad_aligned, residual,
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
        kernels.grad_mean_kernel,
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
        kernels.input_gradient_kernel,
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
        kernels.weight_gradient_kernel,
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
        kernels.reduce_kernel,
        (triton.cdiv(sum(pieces), 128), 1, 1),
        (splits, sum(pieces)),
        {"SPLITS": 16, "BLOCK": 128},
        warps=4,
        stages=2,
    )
    library = use_library_backward(depth, width, positions, keys, dtype)
    return _Backward(back, spread, contribute, reduce, splits, library, pieces)
