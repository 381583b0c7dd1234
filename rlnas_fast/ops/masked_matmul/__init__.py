"""Masked sparse products: ``y = x (W o M)^T + b`` with a mask that may change at every call."""

from rlnas_fast.ops.masked_matmul.op import Packed, masked_matmul, pack, plan
from rlnas_fast.ops.masked_matmul.reference import effective_weight, masked_matmul_reference
from rlnas_fast.ops.masked_matmul.tile_mask import INT8, KEEP, PRUNE, TileMask, TileTensors

__all__ = [
    "INT8",
    "KEEP",
    "PRUNE",
    "Packed",
    "TileMask",
    "TileTensors",
    "effective_weight",
    "masked_matmul",
    "masked_matmul_reference",
    "pack",
    "plan",
]
