"""Non-local attention (Wang et al. 2018) and the whole non-local block."""

from rlnas_fast.ops.nonlocal_attention.block import nonlocal_block
from rlnas_fast.ops.nonlocal_attention.op import KINDS, nonlocal_attention
from rlnas_fast.ops.nonlocal_attention.plan import Plan, plan_block

__all__ = ["KINDS", "Plan", "nonlocal_attention", "nonlocal_block", "plan_block"]
