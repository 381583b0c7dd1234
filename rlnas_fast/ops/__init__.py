"""Kernels behind functions: schema, checks, fake, autograd, backends."""

from .masked_matmul import TileMask, masked_matmul
from .nonlocal_attention import nonlocal_attention, nonlocal_block

__all__ = ["TileMask", "masked_matmul", "nonlocal_attention", "nonlocal_block"]
