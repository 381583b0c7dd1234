"""A 2-d convolution whose weight has a mask that may change at every step."""

from __future__ import annotations

import statistics
import time
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from rlnas_fast.errors import ConfigError, ShapeError
from rlnas_fast.nn.masked_linear import MaskedWeight
from rlnas_fast.ops.masked_matmul import TileMask, effective_weight

__all__ = ["MaskedConv2d"]

# Unfolding for 3 x 3 costs what a dense convolution with some 256 outputs costs, and a kept weight of the
# masked product about twice one of the dense convolution (measured on one CPU, 14 shapes; a hint, not a law).
_UNFOLD_OUTPUTS = 256
TRIALS = 5


class MaskedConv2d(MaskedWeight):
    """``nn.Conv2d`` with one group, its weight [out, in, kh, kw] masked as the matrix [out, in * kh * kw].

    A 1 x 1 kernel is a product over positions.  A larger one is unfolded where few enough weights are kept,
    and otherwise runs as a dense convolution with the masked weight.  In eval mode without gradients, on a
    CPU, both are timed at the first call for a size of x and a number of threads, and the faster is kept
    until weight or mask change.

    Args:
        convolution: its sizes, stride, padding and dilation are taken over, and its weight and bias copied.
        mask: a ``TileMask`` of shape [out, in * kh * kw]; by default every tile of 32 x 32 kept.  Of
            permutations it may carry those of outputs, and with a 1 x 1 kernel those of inputs.
        backend: ``"auto"``, ``"unfold"`` (the masked product) or ``"dense"`` (a dense convolution).

    Raises:
        ConfigError: groups, a padding mode other than zeros, or an unknown backend.
    """

    def __init__(
        self, convolution: nn.Conv2d, mask: TileMask | torch.Tensor | None = None, *, backend: str = "auto"
    ) -> None:
        if convolution.groups != 1 or convolution.padding_mode != "zeros":
            raise ConfigError(
                f"MaskedConv2d takes groups=1 and padding_mode='zeros', got groups={convolution.groups} and "
                f"padding_mode={convolution.padding_mode!r}"
            )
        if backend not in ("auto", "unfold", "dense"):
            raise ConfigError(f"unknown backend {backend!r}; choose one of: auto, unfold, dense")
        weight = convolution.weight.detach()
        matrix = weight.reshape(weight.shape[0], -1)
        mask = TileMask(matrix.shape, device=weight.device) if mask is None else mask
        bias = convolution.bias
        super().__init__(matrix.clone(), mask, None if bias is None else bias.detach().clone())
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.kernel_size = _pair(convolution.kernel_size)
        self.stride, self.dilation = _pair(convolution.stride), _pair(convolution.dilation)
        self.padding = _padding(convolution)
        self.backend = backend
        self._fixed: dict[tuple[int, ...], tuple[tuple[tuple[int, int], ...], torch.Tensor | None]] = {}
        if self.kernel_size != (1, 1) and self.mask.tensors.input_permutation is not None:
            raise ConfigError(f"an input permutation needs a 1 x 1 kernel, got {tuple(self.kernel_size)}")
        self._take(matrix, bias)

    @classmethod
    def from_dense(
        cls, convolution: nn.Conv2d, mask: TileMask | torch.Tensor | None = None, *, backend: str = "auto"
    ) -> MaskedConv2d:
        """Makes the masked form of a trained layer (the same as calling the class)."""
        return cls(convolution, mask, backend=backend)

    def to_dense(self) -> nn.Conv2d:
        """Returns the ``nn.Conv2d`` that computes the same (up to rounding), zeros where the mask prunes."""
        top, left = self.padding
        convolution = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            (top, left),
            self.dilation,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            convolution.weight.copy_(self.dense_weight().view_as(convolution.weight))
            if self.bias is not None and convolution.bias is not None:
                convolution.bias.copy_(self.bias)
        return convolution

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [batch, in, H, W] to [batch, out, H', W'], in x's memory format."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ShapeError(f"x must be [batch, {self.in_channels}, H, W], got {list(x.shape)}")
        if self.backend == "auto" and self._is_frozen(x):
            weight = self._fastest(x)
            return self._unfolded(x) if weight is None else self._convolved(x, weight)
        return self._unfolded(x) if self._unfolds() else self._convolved(x, self._dense_kernel())

    def _unfolded(self, x: torch.Tensor) -> torch.Tensor:
        height, width = self._output_size(x)
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            rows = x[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        else:
            columns = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
            rows = columns.transpose(1, 2).reshape(x.shape[0], height, width, columns.shape[1])
        y = self.product(rows, self.bias).permute(0, 3, 1, 2)
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()

    def train(self, mode: bool = True) -> Self:
        """As for every masked weight; what was timed is forgotten too."""
        if mode:
            self._fixed = {}
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_fixed": {}}

    def plan(self, batch: int) -> dict[str, Any]:
        """Says what would run for ``batch`` output positions (images x H' x W')."""
        if not self._unfolds():
            return {"kernel": "dense convolution"}
        return super().plan(batch)

    def _unfolds(self) -> bool:
        if self.backend != "auto":
            return self.backend == "unfold"
        if self.kernel_size == (1, 1):
            return True
        # On a GPU, and in a traced graph, the host does not know the mask: it may change between runs.
        known = self.weight.device.type == "cpu" and not torch.compiler.is_compiling()
        return known and self.out_channels * (1 - 2 * self.mask.density()) > _UNFOLD_OUTPUTS

    def _fastest(self, x: torch.Tensor) -> torch.Tensor | None:
        """The kernel of the dense convolution where that is faster for x's size, or None; timed once."""
        size = (torch.get_num_threads(), x.shape[0].bit_length(), *x.shape[1:])
        versions = self._versions()
        known = self._fixed.get(size)
        if known is None or known[0] != versions:
            weight = self._dense_kernel()
            ways = (lambda: self._unfolded(x), lambda: self._convolved(x, weight))
            for way in ways:
                way()  # packs the weight, fills the caches
            seconds: list[list[float]] = [[], []]
            for _ in range(TRIALS):
                for way, taken in zip(ways, seconds, strict=True):
                    started = time.perf_counter()
                    way()
                    taken.append(time.perf_counter() - started)
            unfolds = statistics.median(seconds[0]) < statistics.median(seconds[1])
            known = self._fixed[size] = (versions, None if unfolds else weight)
        return known[1]

    def _dense_kernel(self) -> torch.Tensor:
        t = self.mask.tensors
        weight = effective_weight(self.weight, t)
        if t.input_permutation is not None:
            weight = torch.empty_like(weight).index_copy(1, t.input_permutation.long(), weight)
        if t.output_permutation is not None:
            weight = torch.empty_like(weight).index_copy(0, t.output_permutation.long(), weight)
        return weight.view(self.out_channels, self.in_channels, *self.kernel_size)

    def _convolved(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)

    def _output_size(self, x: torch.Tensor) -> tuple[int, int]:
        height, width = (
            (x.shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return height, width

    def extra_repr(self) -> str:
        """Says sizes and tile."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}, tile={self._tile}"
        )


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    first, second = sizes
    return first, second


def _padding(convolution: nn.Conv2d) -> tuple[int, int]:
    if convolution.padding == "valid":
        return 0, 0
    if convolution.padding == "same":
        total = [d * (k - 1) for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)]
        if any(size % 2 for size in total):
            raise ConfigError(f"padding='same' needs an odd kernel, got {tuple(convolution.kernel_size)}")
        return total[0] // 2, total[1] // 2
    top, left = (int(size) for size in convolution.padding)
    return top, left
