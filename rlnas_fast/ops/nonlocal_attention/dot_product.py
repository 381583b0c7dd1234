"""The dot-product kind in matrix products, in three exact orders, each with a backward by hand.

With rows x [N, C], q = theta x, k = phi x, v = g x (biases included) and M keys,
z = x + W_z (sum_j v_j k_j^T / M) q:

- ``gram``: every product with the positions is one with x itself, x (I + A), where A comes from x^T x / N.
- ``reassociated``: (sum_j v_j k_j^T / M) first, then times q; keys may be pooled.
- ``direct``: the N x M matrix first, where N is smaller than the channels; the backward makes it again.

Nothing of size N x M is saved.  Source: Wang et al., Non-local Neural Networks (2018), eq. 4, reassociated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rlnas_fast.ops import native
from rlnas_fast.ops.nonlocal_attention.reference import pool_keys

__all__ = [
    "Cost",
    "dot_product_algorithm",
    "dot_product_attention",
    "gram_block",
    "joined",
    "plain_is_faster",
    "reassociated_block",
]

Tensor = torch.Tensor
# Multiply-adds in the time that moving one element takes: what the measured orders on 2 CPU cores imply; an
# H200's peaks in bfloat16.
BALANCE = {"cpu": 5, "cuda": 180}
Biases = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Cost(NamedTuple):
    """Multiply-adds, and elements read and written where no two steps are fused."""

    products: int
    elements: int

    def total(self, device_type: str) -> int:
        return self.products + BALANCE.get(device_type, BALANCE["cpu"]) * self.elements


def dot_product_algorithm(
    shape: Sequence[int], inner: int, width: int, windows: Sequence[int], device_type: str
) -> tuple[str, dict[str, Cost]]:
    """Returns the cheapest order of a block in plain products, and what one sample's forward costs in each.

    ``gram`` needs the keys to be the positions themselves, so a pooling rules it out.

    Args:
        shape: of x, [B, C, *space].
        inner: channels of theta and phi.
        width: channels of g.
        windows: of the pooling, one size a spatial dimension.
        device_type: ``cpu`` or ``cuda``, which differ in what memory costs.
    """
    channels, queries = shape[1], math.prod(shape[2:])
    keys = math.prod(size // window for size, window in zip(shape[2:], windows, strict=True))
    project, rows = (
        queries * channels * (2 * inner + width),
        queries * (3 * channels + 2 * (2 * inner + width)),
    )
    direct, _ = _attention_costs(inner, width, queries, keys)
    costs = {
        "direct": Cost(
            project + direct.products + queries * width * channels,
            rows + direct.elements + 2 * queries * (channels + width),
        ),
        "reassociated": Cost(
            project + keys * inner * width + inner * width * channels + queries * inner * channels,
            rows + 2 * inner * (width + channels),
        ),
        "gram": Cost(
            2 * queries * channels**2 + 3 * inner * channels**2, 3 * queries * channels + 6 * channels**2
        ),
    }
    if any(window > 1 for window in windows):
        del costs["gram"]
    return min(costs, key=lambda name: costs[name].total(device_type)), costs


def plain_is_faster(
    shape: Sequence[int], inner: int, width: int, dtype: torch.dtype, *, pooled: bool
) -> bool:
    """Says where plain products beat the fused CPU kernel (measured).

    In bfloat16 that is where the kernel for pairs of channels does not serve, or would leave threads idle,
    because it gives each whole images: the other kernel computes in float32.
    """
    if dtype != torch.bfloat16 or shape[1] < (128 if pooled else 64) or not _multiplies_bfloat16():
        return False
    return shape[0] < max(2, _threads()) or any(size % 2 for size in (shape[1], inner, width))


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


@torch.compiler.assume_constant_result
def _multiplies_bfloat16() -> bool:
    return "avx512_bf16" in native.cpu().usable_isas()


def dot_product_attention(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    """Computes y_i = (1/M) sum_j (theta_i . phi_j) g_j for theta [B, D, N], phi [B, D, M], g [B, E, M].

    Reassociated, or direct where that takes fewer multiply-adds; y [B, E, N] is laid out as theta.
    """
    direct, reassociated = _attention_costs(theta.shape[1], g.shape[1], theta.shape[2], g.shape[2])
    device = theta.device.type
    first_direct = direct.total(device) < reassociated.total(device)
    if torch.compiler.is_compiling():  # which derives and fuses the plain form itself
        keys = g.shape[2]
        if first_direct:
            return _product(g, torch.bmm(phi.mT, theta) / keys, theta)
        return _product(torch.bmm(g, phi.mT) / keys, theta, theta)
    y: Tensor = (_Direct if first_direct else _Reassociated).apply(theta, phi, g)
    return y


def _attention_costs(depth: int, width: int, queries: int, keys: int) -> tuple[Cost, Cost]:
    """Of g (phi^T theta) and of (g phi^T) theta."""
    return (
        Cost(queries * keys * (depth + width), 2 * queries * keys),
        Cost((queries + keys) * depth * width, 2 * depth * width),
    )


def gram_block(
    x: Tensor, theta: Tensor, phi: Tensor, g: Tensor, out: Tensor, biases: Biases, residual: bool
) -> Tensor:
    """The whole block without pooling: x [B, C, *space], weights [D, C], [D, C], [E, C], [C, E]."""
    rows: Tensor = _Gram.apply(residual, x.flatten(2).mT, theta, phi, g, out, *biases)
    return rows.mT.unflatten(2, x.shape[2:])


def reassociated_block(
    x: Tensor,
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    out: Tensor,
    biases: Biases,
    residual: bool,
    windows: Sequence[int],
) -> Tensor:
    """The whole block; shapes as in ``gram_block``, keys pooled over ``windows``, one size a dimension."""
    space = tuple(x.shape[2:])
    rows: Tensor = _Block.apply(residual, space, tuple(windows), x.flatten(2).mT, theta, phi, g, out, *biases)
    return rows.mT.unflatten(2, space)


class _Block(torch.autograd.Function):
    """On rows x [B, N, C]: q, k, v by one projection, P = k^T v / M, z = x + q (P W_z^T) + bias."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: bool,
        space: tuple[int, ...],
        windows: tuple[int, ...],
        x: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        theta, phi, g, out, *biases = parameters
        assert theta is not None
        assert phi is not None
        assert g is not None
        assert out is not None
        wide, wide_bias = joined((theta, phi, g), biases[:3])
        if x.stride(2) == 1:
            projected = F.linear(x, wide, wide_bias)
        else:
            projected = torch.bmm(x, wide.mT.expand(x.shape[0], -1, -1))
            if wide_bias is not None:
                projected += wide_bias
        query, rest = projected.split((theta.shape[0], phi.shape[0] + g.shape[0]), 2)
        ctx.pooling = None
        if any(size > 1 for size in windows):
            with torch.enable_grad():  # the pooling keeps its own indices
                full = rest.detach().requires_grad_()
                pooled = pool_keys(full.mT.unflatten(2, space), windows).mT
            ctx.pooling, rest = (full, pooled), pooled.detach()
        key, value = rest.split((phi.shape[0], g.shape[0]), 2)
        small = _scaled(key.mT, value, 1 / key.shape[1])
        folded = F.linear(small, out)
        ctx.save_for_backward(x, wide, out, query, key, value, small, folded)
        ctx.settings = (
            residual,
            [bias is not None for bias in biases],
            (theta.shape[0], phi.shape[0], g.shape[0]),
        )
        bias = biases[3]
        if x.stride(2) == 1:
            z = torch.bmm(query, folded) if bias is None else torch.baddbmm(bias, query, folded)
        else:
            turned = folded.mT, query.mT
            z = (torch.bmm(*turned) if bias is None else torch.baddbmm(bias[:, None], *turned)).mT
        return z.add_(x) if residual else z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        x, wide, out, query, key, value, small, folded = ctx.saved_tensors
        residual, has_bias, sizes = ctx.settings
        grad_folded = torch.bmm(query.mT, grad_z)
        grad_out = grad_folded.flatten(0, 1).mT @ small.flatten(0, 1)
        grad_small = grad_folded @ out
        grad_key = _scaled(value, grad_small.mT, 1 / key.shape[1])
        grad_value = _scaled(key, grad_small, 1 / key.shape[1])
        grads = [torch.bmm(grad_z, folded.mT), grad_key, grad_value]
        if ctx.pooling is not None:
            full, pooled = ctx.pooling
            grads[1:] = torch.autograd.grad(pooled, full, torch.cat(grads[1:], 2), retain_graph=True)
        grad = torch.cat(grads, 2)
        grad_x = grad @ wide
        if residual:
            grad_x += grad_z
        flat = grad.flatten(0, 1)
        rows = x.stride(2) == 1
        grad_wide = flat.mT @ x.flatten(0, 1) if rows else torch.bmm(grad.mT, x).sum(0)
        ones = flat.new_ones((1, flat.shape[0]))  # a product is faster than a sum over so many rows
        grad_biases = (ones @ flat)[0].split(sizes) if any(has_bias[:3]) else (None, None, None)
        return (
            None,
            None,
            None,
            grad_x,
            *grad_wide.split(sizes),
            grad_out,
            *(each if wanted else None for each, wanted in zip(grad_biases, has_bias[:3], strict=True)),
            (ones @ grad_z.flatten(0, 1))[0] if has_bias[3] else None,
        )


class _Reassociated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        small = _scaled(g, phi.mT, 1 / g.shape[2])
        ctx.save_for_backward(theta, phi, g, small)
        return _product(small, theta, theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        theta, phi, g, small = ctx.saved_tensors
        grad_small = _scaled(grad_y, theta.mT, 1 / g.shape[2])
        return (
            _product(small.mT, grad_y, theta),
            _product(grad_small.mT, g, phi),
            _product(grad_small, phi, g),
        )


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(theta, phi, g)
        return _product(g, _scaled(phi.mT, theta, 1 / g.shape[2]), theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        theta, phi, g = ctx.saved_tensors
        weights = _scaled(phi.mT, theta, 1 / g.shape[2])
        grad_weights = _scaled(g.mT, grad_y, 1 / g.shape[2])
        return (
            _product(phi, grad_weights, theta),
            _product(theta, grad_weights.mT, phi),
            _product(grad_y, weights.mT, g),
        )


class _Gram(torch.autograd.Function):
    """On rows x [B, N, C], with s the mean row and G = x^T x / N: z = x (I + A) + c.

    R = G phi^T + s phi_bias = mean of x k^T;  F = R^T (out g)^T + (mean k) (out g_bias)^T;
    A = theta^T F;  c = theta_bias F + out_bias.
    """

    @staticmethod
    def forward(ctx: Any, residual: bool, x: Tensor, *parameters: Tensor | None) -> Tensor:
        theta, phi, g, out, theta_bias, phi_bias, g_bias, out_bias = parameters
        assert theta is not None
        assert phi is not None
        assert g is not None
        assert out is not None
        batch, count, channels = x.shape
        gram = _scaled(x.mT, x, 1 / count)
        mean = None if phi_bias is None and g_bias is None else x.mean(1)
        mixed = (gram.flatten(0, 1) @ phi.mT).unflatten(0, (batch, channels))
        if mean is not None and phi_bias is not None:
            mixed += mean.unsqueeze(2) * phi_bias
        value = out @ g
        folded = torch.bmm(mixed.mT, value.mT.expand(batch, -1, -1))
        if mean is not None and g_bias is not None:
            folded += _mean_key(mean, phi, phi_bias).unsqueeze(2) * (out @ g_bias)
        whole = torch.bmm(theta.mT.expand(batch, -1, -1), folded)
        if residual:
            whole.diagonal(dim1=1, dim2=2).add_(1)
        shift = None if theta_bias is None else theta_bias @ folded
        if out_bias is not None:
            shift = out_bias.expand(batch, -1) if shift is None else shift + out_bias
        ctx.save_for_backward(x, *parameters, gram, mean, mixed, value, folded, whole)
        if x.stride(2) == 1:
            return torch.bmm(x, whole) if shift is None else torch.baddbmm(shift.unsqueeze(1), x, whole)
        turned = whole.mT, x.mT
        return (torch.bmm(*turned) if shift is None else torch.baddbmm(shift.unsqueeze(2), *turned)).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, phi, g, out, theta_bias, phi_bias, g_bias, out_bias = ctx.saved_tensors[:9]
        gram, mean, mixed, value, folded, whole = ctx.saved_tensors[9:]
        batch, count, channels = x.shape
        grad_whole = torch.bmm(x.mT, grad_z)
        grad_shift: Any = None if theta_bias is None and out_bias is None else grad_z.sum(1)
        grad_folded = torch.bmm(theta.expand(batch, -1, -1), grad_whole)
        if theta_bias is not None:
            grad_folded += theta_bias[:, None] * grad_shift.unsqueeze(1)
        grad_theta = torch.bmm(folded, grad_whole.mT).sum(0)
        grad_mixed = torch.bmm(grad_folded, value.expand(batch, -1, -1)).mT.contiguous()
        grad_value = torch.bmm(grad_folded.mT, mixed.mT).sum(0)
        flat_mixed = grad_mixed.flatten(0, 1)
        grad_gram = (flat_mixed @ phi).unflatten(0, (batch, channels))
        grad_phi = flat_mixed.mT @ gram.flatten(0, 1)
        grad_g, grad_out = out.mT @ grad_value, grad_value @ g.mT
        grad_mean = grad_phi_bias = grad_g_bias = None
        if phi_bias is not None:
            grad_mean = grad_mixed @ phi_bias
            grad_phi_bias = torch.tensordot(mean, grad_mixed)
        if g_bias is not None:
            key, shifted = _mean_key(mean, phi, phi_bias), out @ g_bias
            grad_key = grad_folded @ shifted
            grad_shifted = torch.tensordot(key, grad_folded)
            grad_g_bias = out.mT @ grad_shifted
            grad_out += grad_shifted[:, None] * g_bias
            grad_phi += grad_key.mT @ mean
            grad_mean = grad_key @ phi if grad_mean is None else grad_mean + grad_key @ phi
            if phi_bias is not None:
                grad_phi_bias = grad_phi_bias + grad_key.sum(0)
        # Through G, both factors of which are x; ``whole`` holds the residual already.
        both = (grad_gram + grad_gram.mT) / count
        if x.stride(2) == 1:
            grad_x = torch.bmm(grad_z, whole.mT).baddbmm_(x, both)
        else:
            grad_x = torch.bmm(whole, grad_z.mT).baddbmm_(both, x.mT).mT
        if grad_mean is not None:
            grad_x += grad_mean.unsqueeze(1) / count
        return (
            None,
            grad_x,
            grad_theta,
            grad_phi,
            grad_g,
            grad_out,
            None if theta_bias is None else torch.tensordot(folded, grad_shift, ([0, 2], [0, 1])),
            grad_phi_bias,
            grad_g_bias,
            None if out_bias is None else grad_shift.sum(0),
        )


def joined(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Several projections of the same rows as one; a missing bias is 0 where another is there."""
    if all(bias is None for bias in biases):
        return torch.cat(tuple(weights)), None
    filled = [
        weight.new_zeros(weight.shape[0]) if bias is None else bias
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return torch.cat(tuple(weights)), torch.cat(filled)


def _mean_key(mean: Tensor, phi: Tensor, phi_bias: Tensor | None) -> Tensor:
    """The mean of all keys [B, D]."""
    return mean @ phi.mT if phi_bias is None else torch.addmm(phi_bias, mean, phi.mT)


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The product of batches times ``scale``, which is applied before rounding: fp16 does not overflow."""
    result = left.new_empty((left.shape[0], left.shape[1], right.shape[2]))
    return result.baddbmm_(left, right, beta=0, alpha=scale)


def _product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """The product of batches; channels innermost where ``like``'s are."""
    return torch.bmm(right.mT, left.mT).mT if like.stride(1) == 1 else torch.bmm(left, right)
