"""Kernels behind functions: schema, checks, fake, autograd, backends."""

from rlnas_fast.ops.nonlocal_attention import nonlocal_attention, nonlocal_block

__all__ = ["nonlocal_attention", "nonlocal_block"]
