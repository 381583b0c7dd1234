# mypy: disable-error-code="misc,no-untyped-call,no-untyped-def"
"""Masked product in Triton over tile lists on the device: forward, gradient to x, sampled gradient to W.

One kernel serves both directions.  It makes O out-features from I in-features: O, I = N, K forward, and K, N
for the gradient to x, where the weight is read transposed and the lists run by column.  The live tiles of a
row are read as one long axis, BLOCK_I positions at a time, so that several small tiles share one tensor-core
product.  The host never learns how many tiles live: a captured CUDA graph follows the mask.

Source: Gray et al., GPU Kernels for Block-Sparse Weights (2017), for products that skip blocks; here weights
stay dense and only lists change.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from rlnas_fast.ops.masked_matmul.tile_mask import TileTensors
from rlnas_fast.ops.triton_launch import Launch, current_stream, dot_precision

__all__ = ["Blocks", "effective_weight", "forward", "grad_input", "grad_weight", "unavailable_reason"]


class Blocks(NamedTuple):
    """How a product is cut: rows of x, out-features and in-features that a program holds at a time."""

    batch: int
    outs: int
    ins: int
    warps: int
    stages: int


def unavailable_reason() -> str | None:
    """Returns why these kernels cannot run here, or None when they can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability()[0] < 8:
        return "Triton kernels need compute capability 8.0 or newer"
    return None


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: TileTensors,
    bias: torch.Tensor | None,
    int8_activations: bool = False,
    *,
    blocks: Blocks | None = None,
) -> torch.Tensor:
    """Computes y = x (W o M)^T + b; the dispatch contract in ``op`` gives shapes.

    Args:
        x: [B, K], stride 1 in its last dimension.
        weight: [N, K], contiguous.
        mask: what to read of the weight.
        bias: [N] or None, added in y's own order of features.
        int8_activations: int8 tiles see x rounded to 127 steps of its row's largest magnitude.
        blocks: how to cut the work, for measurements; chosen by shape otherwise.
    """
    y = x.new_empty((x.shape[0], mask.shape[0]))
    rounded = None
    if int8_activations and mask.payload is not None:
        x = x.contiguous()
        rounded = _rounded_rows(x)
    _product(x, rounded, weight, mask, bias, y, False, blocks)
    return y


def grad_input(
    grad_y: torch.Tensor, weight: torch.Tensor, mask: TileTensors, *, blocks: Blocks | None = None
) -> torch.Tensor:
    """Computes gx = gy (W o M) over the column lists."""
    grad_x = grad_y.new_empty((grad_y.shape[0], mask.shape[1]))
    _product(grad_y, None, weight, mask, None, grad_x, True, blocks)
    return grad_x


def grad_weight(
    grad_y: torch.Tensor, x: torch.Tensor, mask: TileTensors, *, blocks: Blocks | None = None
) -> torch.Tensor:
    """Computes gW = (gy^T x) o M, exactly 0 off the mask."""
    (N, K), batch = mask.shape, x.shape[0]
    grad = x.new_empty((N, K))
    if grad.numel() == 0:
        return grad
    if batch == 0:
        return grad.zero_()
    launch = _sampled_launch(
        mask.shape, mask.tile, batch, (grad_y.stride(0), x.stride(0)), x.dtype, dot_precision(x.dtype),
        tuple(tensor is not None for tensor in (mask.bits, mask.input_permutation, mask.output_permutation)),
        blocks,
    )  # fmt: skip
    launch(
        current_stream(x.device.index or 0), grad_y, x, mask.state, mask.bits, mask.row_count, mask.row_tiles,
        mask.input_permutation, mask.output_permutation, grad,
    )  # fmt: skip
    return grad


def effective_weight(weight: torch.Tensor, mask: TileTensors) -> torch.Tensor:
    """Computes W o M with int8 tiles dequantised, in weight's dtype: one pass over the weight."""
    result = torch.empty_like(weight)
    if result.numel() == 0:
        return result
    (N, K), (rows, columns) = mask.shape, mask.tile
    block = min(2048, triton.next_power_of_2(K))
    _effective_kernel[(N, triton.cdiv(K, block))](
        weight, mask.bits, mask.state, mask.payload, mask.scale, result, K, triton.cdiv(K, 32),
        triton.cdiv(K, columns), TILE_ROWS=rows, TILE_COLUMNS=columns, BLOCK=block,
    )  # fmt: skip
    return result


def _rounded_rows(x: torch.Tensor) -> torch.Tensor:
    largest = x.abs().amax(dim=1, keepdim=True).float() if x.shape[1] else x.new_ones((x.shape[0], 1)).float()
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return ((x * inverse).round() * (largest / 127)).to(x.dtype)


def _product(
    source: torch.Tensor,
    rounded: torch.Tensor | None,
    weight: torch.Tensor,
    mask: TileTensors,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    transposed: bool,
    blocks: Blocks | None,
) -> None:
    if out.numel() == 0:
        return
    count, tiles = (mask.col_count, mask.col_tiles) if transposed else (mask.row_count, mask.row_tiles)
    gather, scatter = mask.input_permutation, mask.output_permutation
    if transposed:
        gather, scatter = scatter, gather
    optional = (rounded, mask.bits, mask.payload, gather, scatter, bias)
    launch = _product_launch(
        mask.shape, mask.tile, transposed, source.shape[0], source.stride(0), source.dtype,
        dot_precision(source.dtype), tuple(tensor is not None for tensor in optional), blocks,
    )  # fmt: skip
    launch(
        current_stream(source.device.index or 0), source, rounded, weight, mask.bits, mask.payload,
        mask.scale, count, tiles, gather, scatter, bias, out,
    )  # fmt: skip


def product_blocks(batch: int, tile_outs: int, tile_ins: int, dtype: torch.dtype, exact: bool) -> Blocks:
    """Chooses how to cut a product."""
    outs = min(128, max(16, triton.next_power_of_2(tile_outs)))
    rows = min(128, max(16, triton.next_power_of_2(batch)))
    if dtype is torch.float32:
        return (
            Blocks(min(64, rows), min(64, outs), 32, 4, 2) if exact else Blocks(rows, min(64, outs), 32, 4, 3)
        )
    return Blocks(rows, outs, 64, 8 if outs * rows > 8192 else 4, 4)


def sampled_blocks(batch: int, tile: tuple[int, int], dtype: torch.dtype, exact: bool) -> Blocks:
    """Chooses how to cut the sampled product: ``batch`` is the axis that is summed."""
    outs = min(128, max(16, triton.next_power_of_2(tile[0])))
    ins = min(128, max(64, triton.next_power_of_2(tile[1])))
    if dtype is torch.float32:
        return Blocks(32, min(64, outs), 64, 4, 2 if exact else 3)
    return Blocks(64, outs, ins, 8 if outs * ins > 8192 else 4, 3)


@functools.lru_cache(maxsize=4096)
def _product_launch(
    shape: tuple[int, int],
    tile: tuple[int, int],
    transposed: bool,
    batch: int,
    source_stride: int,
    dtype: torch.dtype,
    precision: str,
    present: tuple[bool, ...],
    blocks: Blocks | None,
) -> Launch:
    # The kernel is compiled for the tensors that there are, so which they are is part of the key.
    _, has_bits, has_int8, *_ = present
    (N, K), (rows, columns) = shape, tile
    row_tiles, column_tiles = triton.cdiv(N, rows), triton.cdiv(K, columns)
    outs, ins, tile_outs, tile_ins, capacity = N, K, rows, columns, column_tiles
    weight_strides, scale_strides = (K, 1), (column_tiles, 1)
    if transposed:
        outs, ins, tile_outs, tile_ins, capacity = K, N, columns, rows, row_tiles
        weight_strides, scale_strides = (1, K), (1, column_tiles)
    blocks = blocks or product_blocks(batch, tile_outs, tile_ins, dtype, precision == "ieee")
    constants: dict[str, Any] = {
        "TILE_O": tile_outs,
        "TILE_I": tile_ins,
        "BLOCK_B": blocks.batch,
        "BLOCK_O": blocks.outs,
        "BLOCK_I": blocks.ins,
        "EVEN_O": outs % tile_outs == 0 and tile_outs % blocks.outs == 0,
        "EVEN_I": ins % tile_ins == 0,
        "TRANSPOSED": transposed,
        # An operand that passes through registers must be the left one, which needs 64 rows there.
        "WEIGHT_LEFT": blocks.outs >= 64 and (has_bits or has_int8),
        "PRECISION": precision,
    }
    programs = (
        triton.cdiv(outs, tile_outs) * triton.cdiv(tile_outs, blocks.outs) * triton.cdiv(batch, blocks.batch)
    )
    sizes = (batch, outs, ins, source_stride, *weight_strides, *scale_strides, triton.cdiv(K, 32), capacity)
    return Launch(
        _product_kernel, (programs, 1, 1), sizes, constants, warps=blocks.warps, stages=blocks.stages
    )


@functools.lru_cache(maxsize=4096)
def _sampled_launch(
    shape: tuple[int, int],
    tile: tuple[int, int],
    batch: int,
    strides: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    present: tuple[bool, ...],
    blocks: Blocks | None,
) -> Launch:
    del present
    (N, K), (rows, columns) = shape, tile
    capacity = triton.cdiv(K, columns)
    blocks = blocks or sampled_blocks(batch, tile, dtype, precision == "ieee")
    group = max(1, blocks.ins // columns)
    constants = {
        "TILE_O": rows,
        "TILE_I": columns,
        "BLOCK_B": blocks.batch,
        "BLOCK_O": blocks.outs,
        "BLOCK_I": blocks.ins,
        "GROUP": group,
        "EVEN_B": batch % blocks.batch == 0,
        "PRECISION": precision,
    }
    grid = (
        triton.cdiv(capacity, group) * triton.cdiv(group * columns, blocks.ins),
        triton.cdiv(N, rows) * triton.cdiv(rows, blocks.outs),
        1,
    )
    sizes = (batch, N, K, *strides, triton.cdiv(K, 32), capacity)
    return Launch(_sampled_kernel, grid, sizes, constants, warps=blocks.warps, stages=blocks.stages)


# fmt: off
@triton.jit
def _kept(bits, rows, columns, words):
    """Reads the bits of weights [rows, columns], given as two tensors that broadcast."""
    word = tl.load(bits + rows.to(tl.int64) * words + columns // 32)
    return (word >> (columns % 32)) & 1


@triton.jit
def _effective_kernel(weight, bits, state, payload, scale, result, columns, words, column_tiles,
                      TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = row.to(tl.int64) * columns + column
    tile = (row // TILE_ROWS).to(tl.int64) * column_tiles + column // TILE_COLUMNS
    kind = tl.load(state + tile, inside, other=0)
    value = tl.load(weight + place, inside, other=0)
    if payload is not None:
        integer = tl.load(payload + place, inside & (kind == 2), other=0).to(tl.float32)
        factor = tl.load(scale + tile, inside & (kind == 2), other=0)
        value = tl.where(kind == 2, (integer * factor).to(value.dtype), value)
    kept = kind != 0
    if bits is not None:
        kept = kept & (_kept(bits, row, tl.where(inside, column, 0), words) != 0)
    tl.store(result + place, tl.where(kept, value, tl.zeros_like(value)), inside)


@triton.jit
def _add_tiles(accumulator, source, batch_offsets, weight, bits, scale, tiles, gather, outs, start, live,
               ins, weight_o, weight_i, scale_i, words, TILE_I: tl.constexpr, BLOCK_I: tl.constexpr,
               MASKED: tl.constexpr, TRANSPOSED: tl.constexpr, WEIGHT_LEFT: tl.constexpr, INT8: tl.constexpr,
               PRECISION: tl.constexpr):
    """Adds the product with BLOCK_I positions of the live tiles, from position ``start``."""
    position = start + tl.arange(0, BLOCK_I)
    if TILE_I % BLOCK_I == 0:
        tile = tl.load(tiles + start // TILE_I)
        columns = tile * TILE_I + start % TILE_I + tl.arange(0, BLOCK_I)
    else:
        if MASKED:
            tile = tl.load(tiles + position // TILE_I, position < live, other=0)
        else:
            tile = tl.load(tiles + position // TILE_I)
        columns = tile * TILE_I + position % TILE_I
        if BLOCK_I % TILE_I == 0:
            columns = tl.max_contiguous(tl.multiple_of(columns, TILE_I), TILE_I)
    if gather is None:
        read = columns
    else:
        read = tl.load(gather + columns, columns < ins, other=0) if MASKED else tl.load(gather + columns)
    inside = (position < live) & (columns < ins)
    if WEIGHT_LEFT:
        rows, columns, inside_weight = outs[:, None], columns[None, :], inside[None, :]
        values = source + batch_offsets[None, :] + read[:, None]
        inside_source = inside[:, None]
    else:
        rows, columns, inside_weight = outs[None, :], columns[:, None], inside[:, None]
        values = source + batch_offsets[:, None] + read[None, :]
        inside_source = inside[None, :]
    weights = weight + rows.to(tl.int64) * weight_o + columns.to(tl.int64) * weight_i
    if MASKED:
        right = tl.load(values, inside_source, other=0)
        left = tl.load(weights, inside_weight, other=0)
        safe = tl.where(inside_weight, columns, 0)
    else:
        right = tl.load(values)
        left = tl.load(weights)
        safe = columns
    if INT8:
        if TILE_I % BLOCK_I == 0:
            factor = tl.load(scale + tile * scale_i)
        else:
            factor = tl.load(scale + tile * scale_i, position < live, other=0)
            factor = factor[None, :] if WEIGHT_LEFT else factor[:, None]
        left = (left.to(tl.float32) * factor).to(right.dtype)
    if bits is not None:
        kept = _kept(bits, safe, rows, words) if TRANSPOSED else _kept(bits, rows, safe, words)
        left = tl.where(kept != 0, left, tl.zeros_like(left))
    if WEIGHT_LEFT:
        product = tl.dot(left, right, accumulator, input_precision=PRECISION)
    else:
        product = tl.dot(right, left, accumulator, input_precision=PRECISION)
    return product


@triton.jit
def _add_list(accumulator, source, batch_offsets, weight, bits, scale, tiles, gather, outs, live, ins,
              weight_o, weight_i, scale_i, words, TILE_I: tl.constexpr, BLOCK_I: tl.constexpr,
              EVEN_I: tl.constexpr, TRANSPOSED: tl.constexpr, WEIGHT_LEFT: tl.constexpr, INT8: tl.constexpr,
              PRECISION: tl.constexpr):
    """Adds the product with ``live`` positions: whole blocks without conditions, then what is left."""
    WHOLE: tl.constexpr = EVEN_I and TILE_I % BLOCK_I == 0
    full = live // BLOCK_I * BLOCK_I if EVEN_I else 0
    for start in range(0, full, BLOCK_I):
        accumulator = _add_tiles(accumulator, source, batch_offsets, weight, bits, scale, tiles, gather,
                                 outs, start, live, ins, weight_o, weight_i, scale_i, words, TILE_I, BLOCK_I,
                                 False, TRANSPOSED, WEIGHT_LEFT, INT8, PRECISION)
    if not WHOLE:
        for start in range(full, live, BLOCK_I):
            accumulator = _add_tiles(accumulator, source, batch_offsets, weight, bits, scale, tiles, gather,
                                     outs, start, live, ins, weight_o, weight_i, scale_i, words, TILE_I,
                                     BLOCK_I, True, TRANSPOSED, WEIGHT_LEFT, INT8, PRECISION)
    return accumulator


@triton.jit
def _product_kernel(source, rounded, weight, bits, payload, scale, count, tiles, gather, scatter, bias, out,
                    batch, out_count, ins, source_stride, weight_o, weight_i, scale_o, scale_i, words,
                    capacity, TILE_O: tl.constexpr, TILE_I: tl.constexpr, BLOCK_B: tl.constexpr,
                    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, EVEN_O: tl.constexpr, EVEN_I: tl.constexpr,
                    TRANSPOSED: tl.constexpr, WEIGHT_LEFT: tl.constexpr, PRECISION: tl.constexpr):
    PARTS: tl.constexpr = (TILE_O + BLOCK_O - 1) // BLOCK_O
    batch_blocks = tl.cdiv(batch, BLOCK_B)
    part = tl.program_id(0) // batch_blocks
    row_tile = part // PARTS
    samples = tl.program_id(0) % batch_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    within = part % PARTS * BLOCK_O + tl.arange(0, BLOCK_O)
    outs = row_tile * TILE_O + within
    real = (within < TILE_O) & (outs < out_count)
    # Rows past an end repeat the last one: what they give is not stored, and no load needs a condition.
    rows = outs if EVEN_O else tl.minimum(outs, out_count - 1)
    offsets = tl.minimum(samples, batch - 1).to(tl.int64) * source_stride
    keep = tl.load(count + 2 * row_tile)
    tiles += row_tile.to(tl.int64) * capacity
    if WEIGHT_LEFT:
        accumulator = tl.zeros([BLOCK_O, BLOCK_B], tl.float32)
    else:
        accumulator = tl.zeros([BLOCK_B, BLOCK_O], tl.float32)
    accumulator = _add_list(accumulator, source, offsets, weight, bits, scale, tiles, gather, rows, keep *
                            TILE_I, ins, weight_o, weight_i, scale_i, words, TILE_I, BLOCK_I, EVEN_I,
                            TRANSPOSED, WEIGHT_LEFT, False, PRECISION)
    if payload is not None:
        int8 = tl.load(count + 2 * row_tile + 1)
        seen = source if rounded is None else rounded
        accumulator = _add_list(accumulator, seen, offsets, payload, bits, scale + row_tile * scale_o, tiles
                                + keep, gather, rows, int8 * TILE_I, ins, weight_o, weight_i, scale_i, words,
                                TILE_I, BLOCK_I, EVEN_I, TRANSPOSED, WEIGHT_LEFT, True, PRECISION)
    features = outs if scatter is None else tl.load(scatter + outs, real, other=0)
    if bias is not None:
        added = tl.load(bias + features, real, other=0).to(tl.float32)
        accumulator += added[:, None] if WEIGHT_LEFT else added[None, :]
    if not WEIGHT_LEFT:
        targets = out + samples.to(tl.int64)[:, None] * out_count + features[None, :]
        tl.store(targets, accumulator.to(out.dtype.element_ty), (samples[:, None] < batch) & real[None, :])
    else:
        targets = out + features[:, None] + samples.to(tl.int64)[None, :] * out_count
        tl.store(targets, accumulator.to(out.dtype.element_ty), real[:, None] & (samples[None, :] < batch))


@triton.jit
def _sampled_kernel(grad_y, x, state, bits, count, tiles, gather, scatter, grad, batch, outs, ins,
                    grad_stride, x_stride, words, capacity, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
                    BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
                    GROUP: tl.constexpr, EVEN_B: tl.constexpr, PRECISION: tl.constexpr):
    """Program (g, i) owns GROUP tiles of row i twice over: list slots, and places, to clear those pruned."""
    OUT_PARTS: tl.constexpr = (TILE_O + BLOCK_O - 1) // BLOCK_O
    IN_PARTS: tl.constexpr = (GROUP * TILE_I + BLOCK_I - 1) // BLOCK_I
    row_tile = tl.program_id(1) // OUT_PARTS
    within = tl.program_id(1) % OUT_PARTS * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = row_tile * TILE_O + within
    real = (within < TILE_O) & (rows < outs)
    group = tl.program_id(0) // IN_PARTS * GROUP
    position = tl.program_id(0) % IN_PARTS * BLOCK_I + tl.arange(0, BLOCK_I)
    slot = group + position // TILE_I
    owned = (position < GROUP * TILE_I) & (slot < capacity)
    targets = grad + rows.to(tl.int64)[:, None] * ins

    places = slot * TILE_I + position % TILE_I
    pruned = tl.load(state + row_tile.to(tl.int64) * capacity + slot, owned, other=1) == 0
    zeros = tl.zeros([BLOCK_O, BLOCK_I], grad.dtype.element_ty)
    tl.store(targets + places[None, :], zeros, real[:, None] & (pruned & (places < ins))[None, :])

    live = tl.load(count + 2 * row_tile) + tl.load(count + 2 * row_tile + 1)
    if group < live:
        used = owned & (slot < live)
        tile = tl.load(tiles + row_tile.to(tl.int64) * capacity + slot, used, other=0)
        columns = tile * TILE_I + position % TILE_I
        if BLOCK_I % TILE_I == 0 or TILE_I % BLOCK_I == 0:
            SPAN: tl.constexpr = TILE_I if TILE_I < BLOCK_I else BLOCK_I
            columns = tl.max_contiguous(tl.multiple_of(columns, SPAN), SPAN)
        used = used & (columns < ins)
        read = columns if gather is None else tl.load(gather + columns, used, other=0)
        made = rows if scatter is None else tl.load(scatter + rows, real, other=0)
        accumulator = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for start in range(0, batch, BLOCK_B):
            samples = start + tl.arange(0, BLOCK_B)
            gradients = grad_y + samples.to(tl.int64)[None, :] * grad_stride + made[:, None]
            values = x + samples.to(tl.int64)[:, None] * x_stride + read[None, :]
            if EVEN_B:
                left = tl.load(gradients, real[:, None], other=0)
                right = tl.load(values, used[None, :], other=0)
            else:
                left = tl.load(gradients, real[:, None] & (samples[None, :] < batch), other=0)
                right = tl.load(values, (samples[:, None] < batch) & used[None, :], other=0)
            accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
        result = accumulator.to(grad.dtype.element_ty)
        if bits is not None:
            kept = _kept(bits, tl.where(real, rows, 0)[:, None], tl.where(used, columns, 0)[None, :], words)
            result = tl.where(kept != 0, result, zeros)
        tl.store(targets + columns[None, :], result, real[:, None] & used[None, :])
# fmt: on
