"""The layers child networks are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
}

NORMALISATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "group": lambda channels: nn.GroupNorm(math.gcd(channels, 8), channels),
}


def conv_unit(
    channels_in: int,
    channels_out: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    normalisation: str | None = "batch",
    activation: str | None = "relu",
) -> nn.Sequential:
    """A convolution with padding kernel // 2, then normalisation, then activation; either may be None."""
    layers: list[nn.Module] = [
        nn.Conv2d(
            channels_in,
            channels_out,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=normalisation is None,
        )
    ]
    if normalisation is not None:
        layers.append(NORMALISATIONS[normalisation](channels_out))
    if activation is not None:
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


def linear_unit(features_in: int, features_out: int, *, normalise: bool) -> nn.Sequential:
    """A fully connected layer, batch normalisation where asked for, and a rectifier."""
    layers: list[nn.Module] = [nn.Linear(features_in, features_out, bias=not normalise)]
    if normalise:
        layers.append(nn.BatchNorm1d(features_out))
    layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def initialise(module: nn.Sequential) -> nn.Sequential:
    """Draws weights for rectifiers (He et al. 2015), biases 0; the last layer begins at 0, as a guess.

    Returns:
        ``module``, whose last layer is the linear classifier.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    classifier = module[-1]
    assert isinstance(classifier, nn.Linear)
    nn.init.zeros_(classifier.weight)
    return module


class Residual(nn.Module):
    """Adds a layer's input to its output: through ``shortcut`` where their shapes differ."""

    def __init__(self, layer: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.shortcut = shortcut if shortcut is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to whatever ``layer`` answers with."""
        out: Tensor = self.layer(x) + self.shortcut(x)
        return out


class Dense(nn.Module):
    """Appends a layer's output to its input along the channels (Huang et al. 2017)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C + D, H, W] where ``layer`` answers with D channels."""
        from torch import cat

        return cat([x, self.layer(x)], dim=1)
