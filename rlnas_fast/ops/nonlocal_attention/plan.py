"""Which exact algorithm a non-local block runs, why, and what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from rlnas_fast.errors import ShapeError
from rlnas_fast.ops.nonlocal_attention.dispatch import kernels
from rlnas_fast.ops.nonlocal_attention.dot_product import dot_product_algorithm, plain_is_faster
from rlnas_fast.ops.nonlocal_attention.library_block import use_library

__all__ = ["Plan", "plan_block"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one forward of a block does.

    Attributes:
        algorithm: fused-softmax | library-softmax | composed-softmax | gram | reassociated | direct | sorted.
        kernels: ``cpu``, ``triton``, ``cuda``, or ``torch`` for plain PyTorch.
        reason: why these.
        flops: of the forward, 2 a multiply-add; a lower bound where sorting is involved.
        bytes: that must move at least: x and weights in, z out.
    """

    algorithm: str
    kernels: str
    reason: str
    flops: int
    bytes: int


def plan_block(
    input_shape: Sequence[int],
    inner: int,
    *,
    kind: str,
    pool: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
) -> Plan:
    """Says what ``nonlocal_block`` does for x of this shape; see ``Plan``.

    Raises:
        ShapeError: the shape is not that of ``pool``'s dimensions, or the pooling leaves no key.
    """
    batch, channels, *space = input_shape
    if len(space) != len(pool):
        raise ShapeError(
            f"input_shape {tuple(input_shape)} must be [batch, channels, {len(pool)} spatial sizes]"
        )
    if any(size < window for size, window in zip(space, pool, strict=True)):
        raise ShapeError(f"pool {tuple(pool)} leaves no key of space {tuple(space)}; use a smaller one")
    queries = math.prod(space)
    keys = math.prod(size // window for size, window in zip(space, pool, strict=True))
    module = kernels(backend, device, dtype)
    found = "torch" if module is None else module.__name__.rpartition(".")[2].removesuffix("_kernels")
    moved = dtype.itemsize * (2 * batch * channels * queries + 4 * channels * inner)
    depth = channels if kind == "gaussian" else inner
    products = queries * channels * (2 * inner if kind == "gaussian" else 4 * inner)
    plain = (
        found == "cpu"
        and backend == "auto"
        and plain_is_faster(input_shape, inner, inner, dtype, pooled=keys < queries)
    )
    if kind == "dot_product" and found == "cpu" and not plain:
        algorithm = "reassociated"
        products += keys * inner * inner + channels * inner * inner
        reason = "one fused kernel; (W_z g phi^T) theta is linear in N and was faster than every other order"
    elif kind == "dot_product":
        algorithm, costs = dot_product_algorithm(input_shape, inner, inner, pool, device.type)
        products = costs[algorithm].products
        figures = ", ".join(
            f"{name} {cost.products / 1e6:.3g} M and {cost.elements / 1e6:.3g} M"
            for name, cost in costs.items()
        )
        reason = f"cheapest in multiply-adds and elements moved a sample: {figures}"
        if found == "triton" and dtype != torch.float32 and (channels <= 128 or keys < queries):
            reason += "; without gradients three Triton launches, reassociated"
        found = "torch"
    elif kind == "concatenation":
        algorithm = "sorted"
        products = 2 * queries * channels * (inner + 1) + 4 * queries * inner
        reason = "ReLU(a + b) is piecewise linear: sort and running sums, O(N log N + N C')"
    else:
        products += queries * keys * (depth + inner)
        pooled = keys < queries
        library = kind == "embedded_gaussian" and use_library(
            device.type, dtype, inner, inner, queries, backend, pooled=pooled
        )
        fused = found == "cpu" or (kind == "embedded_gaussian" and found == "triton")
        algorithm = "fused-softmax" if fused else "composed-softmax"
        reason = f"online softmax in {found} kernels" if module else f"no kernel for {dtype} on {device}"
        if library:
            algorithm, found, reason = (
                "library-softmax",
                "torch",
                "wide heads and many keys: SDPA's core is faster",
            )
    return Plan(algorithm, found, reason, 2 * batch * products, moved)
