"""Masked product in CUDA C++: mask to lists, up to 8 rows of x, and wgmma over 64- and 128-tiles."""

from __future__ import annotations

import torch

from rlnas_fast.errors import KernelUnavailable
from rlnas_fast.ops import native
from rlnas_fast.ops.masked_matmul.tile_mask import TileTensors
from rlnas_fast.ops.triton_launch import current_stream

__all__ = ["forward", "forward_refusal", "pack_mask", "unavailable_reason", "update_lists"]

MAX_FEW_ROWS = 8
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable_reason() -> str | None:
    """Returns why these kernels cannot run here, or None when they can."""
    return native.cuda_unavailable_reason()


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: TileTensors,
    bias: torch.Tensor | None,
    int8_activations: bool = False,
) -> torch.Tensor:
    """Computes y = x (W o M)^T + b; the dispatch contract in ``op`` gives shapes.

    Raises:
        KernelUnavailable: these kernels do not cover the case (see ``forward_refusal``).
    """
    refusal = forward_refusal(x, weight, mask, int8_activations)
    if refusal is not None:
        raise KernelUnavailable(
            f"no CUDA C++ kernel for this masked product: {refusal}; use backend='triton'"
        )
    y = x.new_empty((x.shape[0], mask.shape[0]))
    if y.numel() == 0:
        return y
    module = native.cuda()
    launch = (
        module.masked_matmul_few_rows if x.shape[0] <= MAX_FEW_ROWS else module.masked_matmul_hopper_tiles
    )
    launch(
        (x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()),
        _pointers(mask), (*mask.shape, *mask.tile), x.shape[0], x.stride(0), ELEMENTS[x.dtype], _stream(x),
    )  # fmt: skip
    return y


def forward_refusal(
    x: torch.Tensor, weight: torch.Tensor, mask: TileTensors, int8_activations: bool = False
) -> str | None:
    """Returns why ``forward`` does not cover a case, or None; looks at shapes only, never at data."""
    vector = 16 // x.element_size()
    (batch, K), columns = x.shape, mask.tile[1]
    if mask.input_permutation is not None:
        return "the mask permutes inputs"
    if K == 0 or K % vector or columns % vector or x.stride(0) % vector:
        return f"rows of {K} in tiles of {columns} are not whole 16-byte vectors"
    if x.data_ptr() % 16 or weight.data_ptr() % 16:
        return "x or weight does not start at a multiple of 16 bytes"
    if batch <= MAX_FEW_ROWS:
        if mask.tile[0] % 4:
            return f"tiles have {mask.tile[0]} rows, not a multiple of 4"
        return "int8 activations" if int8_activations and mask.payload is not None else None
    if x.dtype is torch.float32:
        return "float32 with more than 8 rows of x"
    if mask.payload is not None:
        return "int8 tiles with more than 8 rows of x"
    if K % 64 or mask.tile[0] % 64 or columns % 64:
        return f"tiles of {mask.tile} in rows of {K} are not multiples of 64"
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return "more than 8 rows of x need compute capability 9.0"
    return None


def update_lists(mask: TileTensors) -> None:
    """Fills counts, lists and stats from state and bits, in place, without telling the host."""
    native.cuda().masked_matmul_update_lists(_pointers(mask), (*mask.shape, *mask.tile), _stream(mask.state))


def pack_mask(dense: torch.Tensor, mask: TileTensors) -> None:
    """Packs bool [N, K] into bits and state, then updates the lists; reads ``dense`` once."""
    dense = dense.contiguous()
    native.cuda().masked_matmul_pack(
        dense.data_ptr(), _pointers(mask), (*mask.shape, *mask.tile), _stream(mask.state)
    )


def _pointers(mask: TileTensors) -> tuple[int, ...]:
    tensors = (
        mask.state, mask.bits, mask.row_count, mask.row_tiles, mask.col_count, mask.col_tiles, mask.stats,
        mask.payload, mask.scale, mask.input_permutation, mask.output_permutation,
    )  # fmt: skip
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _stream(tensor: torch.Tensor) -> int:
    return current_stream(tensor.device.index or 0)
