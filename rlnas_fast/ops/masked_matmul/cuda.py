"""Masked product in CUDA C++: mask to lists, up to 8 rows of x, and wgmma over tiles of any size."""

from __future__ import annotations

import torch

from rlnas_fast.errors import KernelUnavailable
from rlnas_fast.ops import native
from rlnas_fast.ops.masked_matmul.tile_mask import TileTensors
from rlnas_fast.ops.triton_launch import current_stream

__all__ = [
    "chosen_by_auto",
    "forward",
    "forward_refusal",
    "grad_input",
    "grad_input_refusal",
    "pack_mask",
    "unavailable_reason",
    "update_lists",
]

MAX_FEW_ROWS = 8
MAX_SCAN = 65536  # in-features through which a block looks for live tiles itself
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
    *,
    cluster: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """Computes y = x (W o M)^T + b; the dispatch contract in ``op`` gives shapes.

    ``cluster`` says how many blocks along the batch and along the weight's rows share what they read, for
    measurements; by default it is chosen by shape.

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
    if x.shape[0] > MAX_FEW_ROWS:
        _tiles(x, weight, mask, bias, y, False, cluster)
    else:
        native.cuda().masked_matmul_few_rows(*_arguments(x, weight, mask, bias, y))
    return y


def forward_refusal(
    x: torch.Tensor, weight: torch.Tensor, mask: TileTensors, int8_activations: bool = False
) -> str | None:
    """Returns why ``forward`` does not cover a case, or None; looks at shapes only, never at data."""
    if mask.input_permutation is not None:
        return "the mask permutes inputs"
    if x.shape[0] > MAX_FEW_ROWS:
        return _tiles_refusal(x, weight, mask, scan=True)
    vector = 16 // x.element_size()
    K, (rows, columns) = x.shape[1], mask.tile
    if K == 0 or K % vector or columns % vector or rows % 4:
        return f"tiles of {mask.tile} in rows of {K} are not whole 16-byte vectors of 4 rows"
    if int8_activations and mask.payload is not None:
        return "int8 activations"
    return _alignment_refusal(x, weight)


def chosen_by_auto(function: str, batch: int, mask: TileTensors) -> bool:
    """Says whether ``backend="auto"`` may take these kernels: those that have passed their tests on a GPU.

    The gradient to x and the product that looks for live tiles itself have only been compiled so far.
    """
    by_lists = mask.tile[0] % 64 == 0 and mask.tile[1] % 64 == 0
    return function == "forward" and (batch <= MAX_FEW_ROWS or by_lists)


def grad_input(
    grad_y: torch.Tensor, weight: torch.Tensor, mask: TileTensors, *, cluster: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """Computes gx = gy (W o M) over the column lists.

    Raises:
        KernelUnavailable: this kernel does not cover the case (see ``grad_input_refusal``).
    """
    refusal = grad_input_refusal(grad_y, weight, mask)
    if refusal is not None:
        raise KernelUnavailable(f"no CUDA C++ kernel for this gradient: {refusal}; use backend='triton'")
    grad_x = grad_y.new_empty((grad_y.shape[0], mask.shape[1]))
    if grad_x.numel() > 0:
        _tiles(grad_y, weight, mask, None, grad_x, True, cluster)
    return grad_x


def grad_input_refusal(grad_y: torch.Tensor, weight: torch.Tensor, mask: TileTensors) -> str | None:
    """Returns why ``grad_input`` does not cover a case, or None; looks at shapes only, never at data."""
    if mask.output_permutation is not None:
        return "the mask permutes outputs"
    if mask.bits is not None:
        return "single weights are masked"
    return _tiles_refusal(grad_y, weight, mask)


def _tiles(
    source: torch.Tensor,
    weight: torch.Tensor,
    mask: TileTensors,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    transposed: bool,
    cluster: tuple[int, int],
) -> None:
    native.cuda().masked_matmul_hopper_tiles(
        *_arguments(source, weight, mask, bias, out), transposed, cluster
    )


def _arguments(
    source: torch.Tensor,
    weight: torch.Tensor,
    mask: TileTensors,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> tuple[object, ...]:
    pointers = (source.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
    sizes, element = (*mask.shape, *mask.tile), ELEMENTS[source.dtype]
    return pointers, _pointers(mask), sizes, source.shape[0], source.stride(0), element, _stream(source)


def _tiles_refusal(
    source: torch.Tensor, weight: torch.Tensor, mask: TileTensors, *, scan: bool = False
) -> str | None:
    if source.dtype is torch.float32:
        return "float32 with more than 8 rows"
    if mask.payload is not None:
        return "int8 tiles with more than 8 rows"
    (N, K), (rows, columns) = mask.shape, mask.tile
    scan = scan and K <= MAX_SCAN and (columns % 32 == 0 or 32 % columns == 0)
    if N == 0 or K == 0 or K % 64 or not (scan or (rows % 64 == 0 and columns % 64 == 0)):
        return f"a weight of {mask.shape} in tiles of {mask.tile} is not cut at multiples of 64"
    if torch.cuda.get_device_capability(source.device) != (9, 0):
        return "more than 8 rows need compute capability 9.0"
    return _alignment_refusal(source, weight)


def _alignment_refusal(source: torch.Tensor, weight: torch.Tensor) -> str | None:
    if source.data_ptr() % 16 or weight.data_ptr() % 16 or source.stride(0) * source.element_size() % 16:
        return "rows of x, or the weight, do not start at multiples of 16 bytes"
    return None


def update_lists(mask: TileTensors) -> None:
    """Fills counts, lists and stats from state and bits, in place, without telling the host."""
    _update(None, mask)


def pack_mask(dense: torch.Tensor, mask: TileTensors) -> None:
    """Packs bool [N, K] into bits and state, then updates the lists; reads ``dense`` once."""
    _update(dense.contiguous(), mask)


def _update(dense: torch.Tensor | None, mask: TileTensors) -> None:
    address = 0 if dense is None or dense.numel() == 0 else dense.data_ptr()
    sizes = (*mask.shape, *mask.tile)
    with torch.cuda.device(mask.state.device):
        native.cuda().masked_matmul_update(address, _pointers(mask), sizes, _stream(mask.state))


def _pointers(mask: TileTensors) -> tuple[int, ...]:
    tensors = (
        mask.state, mask.bits, mask.row_count, mask.row_tiles, mask.col_count, mask.col_tiles, mask.stats,
        mask.payload, mask.scale, mask.input_permutation, mask.output_permutation,
    )  # fmt: skip
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _stream(tensor: torch.Tensor) -> int:
    return current_stream(tensor.device.index or 0)
