"""The non-local block as a module: any kind, 1 to 3 spatial dimensions, the identity when it is new."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rlnas_fast.errors import ConfigError, ShapeError, unknown_name
from rlnas_fast.ops.nonlocal_attention import KINDS, Plan, nonlocal_block, plan_block

__all__ = ["NonLocalBlock"]

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class NonLocalBlock(nn.Module):
    """z = BatchNorm(W y) + x, where y weighs every position of x by every other one.

    Drop-in for the block of the paper: the state dict holds ``theta``, ``phi``, ``g`` and ``W`` (with
    ``norm`` ``W.0`` is the convolution and ``W.1`` the BatchNorm), and ``concat_project.0`` for
    ``concatenation``.  With ``norm`` the BatchNorm's weight and bias start at 0, so a new block is the
    identity; without it W starts at 0.

    Args:
        channels: C of the input [B, C, *space], float32 | bfloat16 | float16 or under autocast, any strides.
        inner_channels: C' of theta, phi and g; by default half of C, at least 1.
        kind: gaussian | embedded_gaussian | dot_product | concatenation.
        subsample: window of a max-pooling of keys and values: a number, or one a dimension (2 in the paper);
            None or 1 pools nothing.
        norm: whether a BatchNorm follows W.
        dims: number of spatial dimensions.
        bias: whether the convolutions have one.
        backend: as in ``rlnas_fast.ops.nonlocal_attention``.

    Raises:
        ConfigError: an unknown kind, or a number that makes no block.

    Source: Wang et al., Non-local Neural Networks (2018), section 3.3 and 4.1.
    """

    def __init__(
        self,
        channels: int,
        inner_channels: int | None = None,
        kind: str = "embedded_gaussian",
        subsample: int | Sequence[int] | None = None,
        norm: bool = True,
        dims: int = 2,
        *,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        inner = max(1, channels // 2) if inner_channels is None else inner_channels
        if kind not in KINDS:
            raise unknown_name("kind", kind, KINDS)
        if channels < 1 or inner < 1:
            raise ConfigError(f"channels={channels}, inner_channels={inner}: both must be at least 1")
        if dims not in CONVOLUTIONS:
            raise ConfigError(f"dims={dims}: a non-local block has 1, 2 or 3 spatial dimensions")
        self.channels, self.inner_channels, self.kind = channels, inner, kind
        self.dims, self.backend = dims, backend
        self.subsample = _windows(subsample, dims)
        convolution = CONVOLUTIONS[dims]
        self.g = convolution(channels, inner, 1, bias=bias)
        if kind != "gaussian":
            self.theta = convolution(channels, inner, 1, bias=bias)
            self.phi = convolution(channels, inner, 1, bias=bias)
        if kind == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(2 * inner, 1, 1, bias=False))
        output = convolution(inner, channels, 1, bias=bias)
        self.W: nn.Module
        if norm:
            scale = NORMS[dims](channels)
            nn.init.zeros_(scale.weight)
            nn.init.zeros_(scale.bias)
            self.W = nn.Sequential(output, scale)
        else:
            nn.init.zeros_(output.weight)
            if output.bias is not None:
                nn.init.zeros_(output.bias)
            self.W = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns z, shaped and laid out as x.

        Raises:
            ShapeError: x is not [B, channels, *space], or the pooling leaves no key.
            TypeError: x has another dtype than the weights, outside autocast.
            KernelUnavailable: the block's backend cannot run on x's device.
        """
        self._check_shape(x.shape)
        convolution, norm = self._output()
        out, out_bias = convolution.weight.flatten(1), convolution.bias
        folded = norm is not None and not norm.training and norm.running_var is not None
        if norm is not None and folded:
            out, out_bias = _fold(out, out_bias, norm)
        theta, phi = (None, None) if self.kind == "gaussian" else (self.theta, self.phi)
        z = nonlocal_block(
            x,
            None if theta is None else theta.weight.flatten(1),
            None if phi is None else phi.weight.flatten(1),
            self.g.weight.flatten(1),
            out,
            biases=(
                None if theta is None else theta.bias,
                None if phi is None else phi.bias,
                self.g.bias,
                out_bias,
            ),
            pair=self.pair_weight.flatten() if self.kind == "concatenation" else None,
            kind=self.kind,
            pool=self.subsample,
            residual=norm is None or folded,
            backend=self.backend,
        )
        return z if norm is None or folded else norm(z) + x

    def plan(
        self,
        input_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Plan:
        """Says which exact algorithm a forward of this shape runs, why, and what it costs.

        Args:
            input_shape: [B, C, *space].
            dtype: of x.
            device: of x.

        Raises:
            ShapeError: as ``forward`` does for x of this shape.
        """
        self._check_shape(input_shape)
        return plan_block(
            input_shape,
            self.inner_channels,
            kind=self.kind,
            pool=self.subsample,
            dtype=dtype,
            device=torch.device(device),
            backend=self.backend,
        )

    def _check_shape(self, shape: Sequence[int]) -> None:
        if len(shape) != self.dims + 2 or shape[1] != self.channels:
            raise ShapeError(
                f"x has shape {list(shape)}; expected [batch, {self.channels}, {self.dims} spatial sizes]"
            )

    @property
    def pair_weight(self) -> torch.Tensor:
        """[1, 2C', 1, 1] weight of the concatenated pair, for ``concatenation`` alone."""
        convolution = self.concat_project[0]
        assert isinstance(convolution, nn.Conv2d)
        return convolution.weight

    def _output(self) -> tuple[nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm | None]:
        if isinstance(self.W, nn.Sequential):
            convolution, norm = self.W
            assert isinstance(convolution, nn.modules.conv._ConvNd)
            assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
            return convolution, norm
        assert isinstance(self.W, nn.modules.conv._ConvNd)
        return self.W, None


def _fold(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.modules.batchnorm._BatchNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiplies a BatchNorm in evaluation into the convolution before it."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    return weight * scale.to(weight.dtype)[:, None], (shift * scale + norm.bias).to(weight.dtype)


def _windows(subsample: int | Sequence[int] | None, dims: int) -> tuple[int, ...]:
    windows = (
        (subsample or 1,) * dims if subsample is None or isinstance(subsample, int) else tuple(subsample)
    )
    if len(windows) != dims or any(size < 1 for size in windows) or subsample == 0:
        raise ConfigError(f"subsample={subsample!r}: expected a window of at least 1, or {dims} of them")
    return windows
