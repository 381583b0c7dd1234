"""The masked product in plain PyTorch: slow, differentiable, and the specification of every kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlnas_fast.ops.masked_matmul.tile_mask import INT8, PRUNE, TileTensors, unpack_bits

__all__ = ["effective_weight", "kept", "masked_matmul_reference"]


def kept(mask: TileTensors) -> torch.Tensor:
    """Returns the bool [N, K] of the weights that take part."""
    live = _per_weight(mask.state != PRUNE, mask)
    return live if mask.bits is None else live & unpack_bits(mask.bits, mask.shape[1])


def effective_weight(weight: torch.Tensor, mask: TileTensors) -> torch.Tensor:
    """Returns W o M with int8 tiles dequantised (straight-through gradient), in weight's dtype."""
    if mask.payload is not None and mask.scale is not None:
        int8 = _per_weight(mask.state == INT8, mask)
        dequantised = (_per_weight(mask.scale, mask) * mask.payload).to(weight.dtype)
        straight_through = weight - weight.detach()  # 0, with a gradient of 1
        weight = torch.where(int8, dequantised + straight_through, weight)
    return torch.where(kept(mask), weight, torch.zeros_like(weight))


def masked_matmul_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: TileTensors,
    bias: torch.Tensor | None = None,
    *,
    int8_activations: bool = False,
) -> torch.Tensor:
    """Computes ``y = x (W o M)^T + b`` with a dense product.

    With ``int8_activations`` int8 tiles see x as ``s * q``, where for each row ``s = max|x| / 127`` (1 for a
    row of zeros) and ``q = round(x * (127 / max|x|))`` to the nearest, ties to even; keep tiles see x itself.

    Args:
        x: [B, K].
        weight: [N, K].
        mask: the mask's tensors.
        bias: [N] or None.
        int8_activations: quantise x for int8 tiles.

    Returns:
        [B, N].
    """
    if mask.input_permutation is not None:
        x = x[:, mask.input_permutation.long()]
    total = effective_weight(weight, mask)
    if int8_activations and mask.payload is not None:
        int8 = _per_weight(mask.state == INT8, mask)
        nothing = torch.zeros_like(total)
        y = F.linear(x, torch.where(int8, nothing, total)) + F.linear(
            _quantised_rows(x), torch.where(int8, total, nothing)
        )
    else:
        y = F.linear(x, total)
    if mask.output_permutation is not None:
        y = torch.empty_like(y).index_copy(1, mask.output_permutation.long(), y)
    return y if bias is None else y + bias


def _per_weight(tiles: torch.Tensor, mask: TileTensors) -> torch.Tensor:
    wide = tiles.repeat_interleave(mask.tile[0], 0).repeat_interleave(mask.tile[1], 1)
    return wide[: mask.shape[0], : mask.shape[1]]


def _quantised_rows(x: torch.Tensor) -> torch.Tensor:
    largest = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    some = largest > 0
    scale = torch.where(some, largest / 127, torch.ones_like(largest))
    inverse = torch.where(some, torch.full_like(largest, 127) / largest, torch.zeros_like(largest))
    return x + ((x * inverse).round() * scale - x).detach()
