# mypy: disable-error-code="misc,no-untyped-call"
"""Launches Triton kernels at the cost of a C call: what depends on shapes is decided once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Launch", "current_stream", "dot_precision"]


class Launch:
    """One Triton kernel with its grid, sizes and tiles fixed; called with the tensors alone.

    ``JITFunction.run`` specialises every argument at every call, which costs more than a small kernel
    takes.  The first call goes through it; later calls reuse what it compiled.  The caller promises
    what Triton would have checked: same dtypes, and each pointer aligned to 16 bytes if it was at first.

    A kernel takes its tensors first, then its integers, then its constexprs.
    """

    __slots__ = ("_compiled", "_constants", "_fixed", "_grid", "_kernel", "_options", "_sizes")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        sizes: tuple[int, ...],
        constants: dict[str, Any],
        *,
        warps: int,
        stages: int,
    ) -> None:
        self._kernel = kernel
        self._grid = grid
        self._sizes = sizes
        self._constants = constants
        self._options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        self._compiled: Callable[..., None] | None = None
        self._fixed: tuple[Any, ...] = ()

    def __call__(self, stream: int, *tensors: torch.Tensor | None) -> None:
        """Launches on ``stream``, which must belong to the current device."""
        if self._compiled is not None:
            pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            function, metadata, rest = self._fixed
            self._compiled(*self._grid, stream, function, metadata, None, None, None, *pointers, *rest)
            return
        compiled = self._kernel[self._grid](*tensors, *self._sizes, **self._constants, **self._options)
        if compiled is not None:  # None under Triton's interpreter
            rest = (*self._sizes, *self._constants.values())
            self._fixed = (compiled.function, compiled.packed_metadata, rest)
            self._compiled = compiled.run


_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device_index: int) -> int:
    """Returns the raw handle of the stream that new work on this device goes to (never cache it)."""
    return 0 if _raw_stream is None or device_index < 0 else _raw_stream(device_index)


def dot_precision(dtype: torch.dtype) -> str:
    """Returns Triton's ``input_precision`` for a product in ``dtype``, following torch's fp32 setting."""
    if dtype is not torch.float32:
        return "tf32"  # means nothing for 16-bit operands
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
