# mypy: ignore-errors
"""The launches of the non-local block; ``triton_block`` says which tensors they take and why they are these.

Sizes: B batch, C channels, D inner channels of theta and phi, E of g, N positions, M keys.  Strides of x-like
tensors are (batch, channel, slab, row, column).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlnas_fast.ops.nonlocal_attention.triton_kernels import LOG2E, attend, load_tile, place, tile_pointers


# fmt: off
@triton.jit
def offset(position, height, width, stride_t, stride_h, stride_w, FLAT: tl.constexpr):
    """Where a position lies, in elements."""
    if FLAT:
        return position.to(tl.int64) * stride_w
    column = position % width
    row = position // width % height
    slab = position // width // height
    return slab.to(tl.int64) * stride_t + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w


@triton.jit
def window_position(key, element, height, width, pooled_h, pooled_w, POOL_T: tl.constexpr,
                    POOL_H: tl.constexpr, POOL_W: tl.constexpr):
    """The position that is element ``element`` of the window of pooled position ``key``."""
    row = key // pooled_w % pooled_h * POOL_H + element // POOL_W % POOL_H
    column = key % pooled_w * POOL_W + element % POOL_W
    slab = key // pooled_w // pooled_h * POOL_T + element // POOL_W // POOL_H
    return (slab * height + row) * width + column


@triton.jit
def project_kernel(x, theta, phi, g, theta_bias, phi_bias, g_bias, query, key, value, key_choice,
                   value_choice, channels, depth, width, positions, keys, height, columns, pooled_h, pooled_w,
                   x_b, x_c, x_t, x_h, x_w, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                   BLOCK_O: tl.constexpr, POOL_T: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr,
                   FLAT: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr):
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
            pooled = window_position(row, element, height, columns, pooled_h, pooled_w, POOL_T, POOL_H,
                                     POOL_W)
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
def attention_kernel(query, key, value, weight, bias, x, z, mean_out, lse, positions, keys, depth, width,
                     channels, height, columns, x_b, x_c, x_t, x_h, x_w, z_b, z_c, z_t, z_h, z_w,
                     BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr,
                     FLAT: tl.constexpr, Z_FLAT: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
                     SAVE: tl.constexpr, PRECISION: tl.constexpr):
    """The mean of the values for a tile of queries, and at once z of these positions."""
    sample, row = place(positions, BLOCK_N)
    output = tl.arange(0, BLOCK_E)
    mean, log_sum = attend(query + sample * positions * depth, key + sample * keys * depth,
                           value + sample * keys * width, row, output, positions, keys, depth, width, 1,
                           depth, 1, depth, 1, width, BLOCK_N, BLOCK_M, BLOCK_D, BLOCK_E, 1, EVEN_D, EVEN_E,
                           PRECISION)
    mean = mean.to(query.dtype.element_ty)
    if SAVE:
        tl.store(tile_pointers(mean_out + sample * positions * width, row, output, width, 1), mean,
                 (row[:, None] < positions) & (output[None, :] < width))
        tl.store(lse + sample * positions + row, log_sum, row < positions)
    finish(mean, row, weight, bias, x + sample * x_b, z + sample * z_b, positions, width, channels, height,
           columns, x_c, x_t, x_h, x_w, z_c, z_t, z_h, z_w, BLOCK_E, BLOCK_C, FLAT, Z_FLAT, HAS_BIAS,
           RESIDUAL, PRECISION)


@triton.jit
def finish(mean, row, weight, bias, x, z, positions, width, channels, height, columns, x_c, x_t, x_h, x_w,
           z_c, z_t, z_h, z_w, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr,
           Z_FLAT: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr):
    """Stores z = W_z mean + bias + x for a tile of positions."""
    output = tl.arange(0, BLOCK_E)
    x_rows = x + offset(row, height, columns, x_t, x_h, x_w, FLAT)
    z_rows = z + offset(row, height, columns, z_t, z_h, z_w, Z_FLAT)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        part = load_tile(tile_pointers(weight, output, channel, 1, width), output, channel, width, channels,
                         True, True)
        result = tl.dot(mean, part, input_precision=PRECISION)
        if HAS_BIAS:
            result += tl.load(bias + channel, channel < channels, other=0.0).to(tl.float32)[None, :]
        mask = (row[:, None] < positions) & (channel[None, :] < channels)
        if RESIDUAL:
            result += tl.load(x_rows[:, None] + channel.to(tl.int64)[None, :] * x_c, mask,
                              other=0.0).to(tl.float32)
        tl.store(z_rows[:, None] + channel.to(tl.int64)[None, :] * z_c, result.to(z.dtype.element_ty), mask)


@triton.jit
def finish_kernel(weight, bias, x, z, mean_in, positions, width, channels, height, columns, x_b, x_c, x_t,
                  x_h, x_w, z_b, z_c, z_t, z_h, z_w, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
                  BLOCK_C: tl.constexpr, FLAT: tl.constexpr, Z_FLAT: tl.constexpr, HAS_BIAS: tl.constexpr,
                  RESIDUAL: tl.constexpr, PRECISION: tl.constexpr):
    """Makes z from a mean that another kernel made."""
    sample, row = place(positions, BLOCK_N)
    output = tl.arange(0, BLOCK_E)
    mean = load_tile(tile_pointers(mean_in + sample * positions * width, row, output, width, 1), row, output,
                     positions, width, True, True)
    finish(mean, row, weight, bias, x + sample * x_b, z + sample * z_b, positions, width, channels, height,
           columns, x_c, x_t, x_h, x_w, z_c, z_t, z_h, z_w, BLOCK_E, BLOCK_C, FLAT, Z_FLAT, HAS_BIAS,
           RESIDUAL, PRECISION)


@triton.jit
def small_forward_kernel(x, theta, phi, g, out, theta_bias, phi_bias, g_bias, out_bias, z, positions, keys,
                         channels, depth, width, height, columns, pooled_h, pooled_w, x_b, x_c, x_t, x_h, x_w,
                         z_b, z_c, z_t, z_h, z_w, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
                         POOL_T: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr, FLAT: tl.constexpr,
                         Z_FLAT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OUT_BIAS: tl.constexpr,
                         RESIDUAL: tl.constexpr, PRECISION: tl.constexpr):
    """The whole block for a tile of queries: it projects the keys it visits, and stores nothing but z."""
    WINDOW: tl.constexpr = POOL_T * POOL_H * POOL_W
    sample, row = place(positions, BLOCK_N)
    channel = tl.arange(0, BLOCK_C)
    inner = tl.arange(0, BLOCK_D)
    output = tl.arange(0, BLOCK_E)
    x += sample * x_b
    theta_tile = load_tile(tile_pointers(theta, channel, inner, 1, channels), channel, inner, channels, depth,
                           True, True)
    phi_tile = load_tile(tile_pointers(phi, channel, inner, 1, channels), channel, inner, channels, depth,
                         True, True)
    g_tile = load_tile(tile_pointers(g, channel, output, 1, channels), channel, output, channels, width, True,
                       True)
    features = tl.load(x + offset(row, height, columns, x_t, x_h, x_w,
                                  FLAT)[:, None] + channel.to(tl.int64)[None, :] * x_c,
                       (row[:, None] < positions) & (channel[None, :] < channels), other=0.0)
    query = tl.dot(features, theta_tile, input_precision=PRECISION)
    if HAS_BIAS:
        query += tl.load(theta_bias + inner, inner < depth, other=0.0).to(tl.float32)[None, :]
        key_bias = tl.load(phi_bias + inner, inner < depth, other=0.0).to(tl.float32)[None, :]
        value_bias = tl.load(g_bias + output, output < width, other=0.0).to(tl.float32)[None, :]
    query = query.to(features.dtype)
    peak = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    accumulator = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for start in range(0, keys, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        key = tl.full([BLOCK_M, BLOCK_D], float("-inf"), tl.float32)
        value = tl.full([BLOCK_M, BLOCK_E], float("-inf"), tl.float32)
        for element in tl.static_range(WINDOW):
            position = column
            if WINDOW > 1:
                position = window_position(column, element, height, columns, pooled_h, pooled_w, POOL_T,
                                           POOL_H, POOL_W)
            visited = tl.load(x + offset(position, height, columns, x_t, x_h, x_w,
                                         FLAT)[:, None] + channel.to(tl.int64)[None, :] * x_c,
                              (column[:, None] < keys) & (channel[None, :] < channels), other=0.0)
            key_part = tl.dot(visited, phi_tile, input_precision=PRECISION)
            value_part = tl.dot(visited, g_tile, input_precision=PRECISION)
            if WINDOW == 1:
                key, value = key_part, value_part
            else:  # NaN stays, as in torch's pooling
                key = tl.where((key_part > key) | (key_part != key_part), key_part, key)
                value = tl.where((value_part > value) | (value_part != value_part), value_part, value)
        if HAS_BIAS:
            key += key_bias
            value += value_bias
        scores = tl.dot(query, tl.trans(key.to(features.dtype)), input_precision=PRECISION)
        scores = tl.where(column[None, :] < keys, scores, float("-inf"))
        value = tl.where(column[:, None] < keys, value, 0.0).to(features.dtype)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * LOG2E)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - shift)
        weights = tl.exp2(scores * LOG2E - shift[:, None])
        accumulator = tl.dot(weights.to(features.dtype), value, accumulator * decay[:, None],
                             input_precision=PRECISION)
        peak = new_peak
        total = total * decay + tl.sum(weights, 1)
    mean = (accumulator / total[:, None]).to(features.dtype)
    finish(mean, row, out, out_bias, x, z + sample * z_b, positions, width, channels, height, columns, x_c,
           x_t, x_h, x_w, z_c, z_t, z_h, z_w, BLOCK_E, BLOCK_C, FLAT, Z_FLAT, HAS_OUT_BIAS, RESIDUAL,
           PRECISION)


@triton.jit
def grad_mean_kernel(grad_z, weight, grad_mean, positions, channels, width, height, columns, grad_b, grad_c,
                     grad_t, grad_h, grad_w, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
                     BLOCK_E: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of the mean, W_z^T grad_z."""
    sample, row = place(positions, BLOCK_P)
    output = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    where = grad_z + sample * grad_b + offset(row, height, columns, grad_t, grad_h, grad_w, FLAT)
    product = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        left = tl.load(where[:, None] + channel.to(tl.int64)[None, :] * grad_c,
                       (row[:, None] < positions) & (channel[None, :] < channels), other=0.0)
        right = load_tile(tile_pointers(weight, channel, output, width, 1), channel, output, channels, width,
                          True, True)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    tl.store(tile_pointers(grad_mean + sample * positions * width, row, output, width, 1),
             product.to(grad_mean.dtype.element_ty), (row[:, None] < positions) & (output[None, :] < width))


@triton.jit
def gather_gradient(gradient, choice, pooled, row, inner, positions, size, height, columns, pooled_t,
                    pooled_h, pooled_w, POOL_T: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr):
    """Gradient [rows, inner] at full resolution of a projection, which was pooled if ``pooled`` says so."""
    if POOL_T * POOL_H * POOL_W == 1:
        values = load_tile(tile_pointers(gradient, row, inner, size, 1), row, inner, positions, size, True,
                           True)
    else:
        slab, line, column = row // columns // height, row // columns % height, row % columns
        element = (slab % POOL_T * POOL_H + line % POOL_H) * POOL_W + column % POOL_W
        slab, line, column = slab // POOL_T, line // POOL_H, column // POOL_W
        inside = (slab < pooled_t) & (line < pooled_h) & (column < pooled_w)
        key = tl.where(row * 0 + pooled > 0, (slab * pooled_h + line) * pooled_w + column, row)
        covered = (row < positions) & (inside.to(tl.int32) >= pooled)
        mask = covered[:, None] & (inner[None, :] < size)
        values = tl.load(tile_pointers(gradient, key, inner, size, 1), mask, other=0.0)
        winner = tl.load(tile_pointers(choice, key, inner, size, 1), mask & (row * 0 + pooled > 0)[:, None],
                         other=0)
        won = (winner.to(tl.int32) == element[:, None]).to(tl.int32)
        values = tl.where(won >= pooled, values, 0.0)
    return values


@triton.jit
def input_gradient_kernel(grad_z, gquery, gkey, gvalue, key_choice, value_choice, theta, phi, g, gx,
                          positions, keys, channels, depth, width, slabs, height, columns, pooled_t, pooled_h,
                          pooled_w, grad_b, grad_c, grad_t, grad_h, grad_w, x_b, x_c, x_t, x_h, x_w,
                          BLOCK_C: tl.constexpr, POOL_T: tl.constexpr, POOL_H: tl.constexpr,
                          POOL_W: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr,
                          BLOCK_K: tl.constexpr, RESIDUAL: tl.constexpr, FLAT: tl.constexpr,
                          X_FLAT: tl.constexpr):
    """Gradient of x: theta^T gquery + phi^T gkey + g^T gvalue, pooling undone, + grad_z."""
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
        left = load_tile(tile_pointers(gquery, row, inner, depth, 1), row, inner, positions, depth, True,
                         True)
        right = load_tile(tile_pointers(theta, inner, channel, channels, 1), inner, channel, depth, channels,
                          True, True)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    for start in range(0, depth, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = gather_gradient(gkey, key_choice, 1, row, inner, positions, depth, height, columns, pooled_t,
                               pooled_h, pooled_w, POOL_T, POOL_H, POOL_W)
        right = load_tile(tile_pointers(phi, inner, channel, channels, 1), inner, channel, depth, channels,
                          True, True)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = gather_gradient(gvalue, value_choice, 1, row, inner, positions, width, height, columns,
                               pooled_t, pooled_h, pooled_w, POOL_T, POOL_H, POOL_W)
        right = load_tile(tile_pointers(g, inner, channel, channels, 1), inner, channel, width, channels,
                          True, True)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if RESIDUAL:
        rows = grad_z + sample * grad_b + offset(row, height, columns, grad_t, grad_h, grad_w, FLAT)
        total += tl.load(rows[:, None] + channel.to(tl.int64)[None, :] * grad_c, mask,
                         other=0.0).to(tl.float32)
    rows = gx + sample * x_b + offset(row, height, columns, x_t, x_h, x_w, X_FLAT)
    tl.store(rows[:, None] + channel.to(tl.int64)[None, :] * x_c, total.to(gx.dtype.element_ty), mask)


@triton.jit
def weight_gradient_kernel(x, grad_z, gquery, gkey, gvalue, key_choice, value_choice, mean, partial, batch,
                           positions, keys, channels, depth, width, slabs, height, columns, pooled_t,
                           pooled_h, pooled_w, per_split, x_b, x_c, x_t, x_h, x_w, grad_b, grad_c, grad_t,
                           grad_h, grad_w, POOL_T: tl.constexpr, POOL_H: tl.constexpr, POOL_W: tl.constexpr,
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
    wide_t, wide_h, wide_w = (tl.where(is_out, grad_t, x_t), tl.where(is_out, grad_h, x_h), tl.where(is_out,
                                                                                                     grad_w,
                                                                                                     x_w))
    pid -= tl.where(is_theta, 0, tl.where(is_out, 2 * depth_programs + width_programs,
                                          index * depth_programs))
    inner = pid // channel_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = pid % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = tl.cdiv(positions, BLOCK_P)
    first = tl.program_id(1) * per_split
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    # Sums over positions as products with ones: the tiles stay in shared memory.
    ones = tl.full([BLOCK_P, 16], 1.0, x.dtype.element_ty)
    inner_sum = tl.zeros([BLOCK_R, 16], tl.float32)
    channel_sum = tl.zeros([BLOCK_C, 16], tl.float32)
    for step in range(first, tl.minimum(first + per_split, batch * tiles)):
        sample = (step // tiles).to(tl.int64)
        row = step % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        shift = sample * inner_positions * size
        left = gather_gradient(inner_rows + shift, choice + shift if POOL_T * POOL_H * POOL_W > 1 else choice,
                               pooled, row, inner, positions, size, height, columns, pooled_t, pooled_h,
                               pooled_w, POOL_T, POOL_H, POOL_W)
        where = wide + sample * wide_b + offset(row, height, columns, wide_t, wide_h, wide_w, FLAT)
        right = tl.load(where[:, None] + channel.to(tl.int64)[None, :] * wide_c,
                        (row[:, None] < positions) & (channel[None, :] < channels), other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        inner_sum = tl.dot(tl.trans(left), ones, inner_sum, input_precision=PRECISION)
        channel_sum = tl.dot(tl.trans(right), ones, channel_sum, input_precision=PRECISION)
    matrices = (2 * depth + 2 * width) * channels
    partial += tl.program_id(1).to(tl.int64) * (matrices + 2 * depth + width + channels)
    before = tl.where(is_out, 2 * depth + width, index * depth)
    tl.store(tile_pointers(partial + before * channels, inner, channel, tl.where(is_out, 1, channels),
                           tl.where(is_out, size, 1)), total,
             (inner[:, None] < size) & (channel[None, :] < channels))
    sums = partial + matrices + before
    if is_out:
        if pid // channel_tiles == 0:
            tl.store(sums + channel, tl.sum(channel_sum, 1) / 16, channel < channels)
    elif pid % channel_tiles == 0:
        tl.store(sums + inner, tl.sum(inner_sum, 1) / 16, inner < size)


@triton.jit
def reduce_kernel(partial, total, splits, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums the splits in their order, so that runs are bitwise equal."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([SPLITS, BLOCK], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        sums += tl.load(tile_pointers(partial, split, column, size, 1),
                        (split[:, None] < splits) & (column[None, :] < size), other=0.0)
    tl.store(total + column, tl.sum(sums, 0).to(total.dtype.element_ty), column < size)
