"""Modules: the non-local block, masked layers, and the layers child networks are made of."""

from .masked_conv import MaskedConv2d
from .masked_linear import MaskedLinear
from .non_local import NonLocalBlock

__all__ = ["MaskedConv2d", "MaskedLinear", "NonLocalBlock"]
