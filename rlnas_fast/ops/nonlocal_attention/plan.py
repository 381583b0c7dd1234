"""Which exact algorithm a non-local block runs, why, and what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from rlnas_fast.ops.nonlocal_attention.dispatch import kernels

__all__ = ["Plan", "dot_product_algorithm", "plan_block"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one forward of a block does.

    Attributes:
        algorithm: fused-softmax | composed-softmax | gram | reassociated | direct | sorted.
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


def dot_product_algorithm(
    channels: int, inner: int, queries: int, keys: int, pooled: bool
) -> tuple[str, int]:
    """Returns the cheapest exact form of the dot-product block and its multiply-adds an image.

    ``gram``: z = (I + A) x with A from the C x C Gram matrix of x; ``reassociated``: (g phi^T) theta;
    ``direct``: g (phi^T theta).
    """
    projections = 4 * queries * channels * inner
    costs = {
        "direct": projections + 2 * queries * keys * inner,
        "reassociated": projections + (queries + keys) * inner * inner,
    }
    if not pooled:
        small = 2 * channels * channels * inner + 2 * channels * inner * inner
        costs["gram"] = 3 * queries * channels * channels // 2 + small
    algorithm = min(costs, key=costs.__getitem__)
    return algorithm, costs[algorithm]


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
    """Says what ``nonlocal_block`` does for x of this shape; see ``Plan``."""
    batch, channels, *space = input_shape
    queries = math.prod(space)
    keys = math.prod(size // window for size, window in zip(space, pool, strict=True))
    module = kernels(backend, device, dtype)
    found = "torch" if module is None else module.__name__.rpartition(".")[2].removesuffix("_kernels")
    moved = dtype.itemsize * (2 * batch * channels * queries + 4 * channels * inner)
    depth = channels if kind == "gaussian" else inner
    if kind == "dot_product":
        algorithm, products = dot_product_algorithm(channels, inner, queries, keys, keys != queries)
        reason = f"fewest multiply-adds for N = {queries}, M = {keys}, C = {channels}, C' = {inner}"
    elif kind == "concatenation":
        algorithm = "sorted"
        products = 2 * queries * channels * (inner + 1) + (2 * queries + 2 * keys) * inner
        reason = "ReLU(a + b) is piecewise linear: sort and prefix sums, O(N log N + N C')"
    else:
        products = queries * channels * (2 * (depth if kind != "gaussian" else 0) + 2 * inner)
        products += queries * keys * (depth + inner)
        algorithm = "fused-softmax" if kind == "embedded_gaussian" and found == "cpu" else "composed-softmax"
        reason = f"online softmax in {found} kernels" if module else f"no kernel for {dtype} on {device}"
    return Plan(algorithm, found, reason, 2 * batch * products, moved)
