"""A fixed number of layers, each with its type, activation, normalisation and connectivity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import nn

from ..errors import ConfigError
from ..nn.child_layers import Dense, Residual, conv_unit, initialise
from ..search import Architecture, Decision, TaskSpec

TYPES = ("conv1x1", "conv3x3", "conv5x5", "maxpool3x3", "avgpool3x3")
ACTIVATIONS = ("relu", "tanh", "sigmoid", "swish", "gelu")
NORMALISATIONS = ("batch", "layer", "instance", "group")
CONNECTIVITIES = ("sequential", "residual", "dense", "attention")

_VOCABULARY = (
    ("type", TYPES),
    ("activation", ACTIVATIONS),
    ("normalisation", NORMALISATIONS),
    ("connectivity", CONNECTIVITIES),
)
# The stem halves images of this side and larger: attention costs the square of the positions.
_LARGE_SIDE = 24
# The classifier sees at most this many rows and columns.  Averaging all positions away costs 5 points of
# Fashion-MNIST after one epoch of 10,000 images (0.825 at 2 x 2, 0.84 at 4 x 4, 0.88 at 7 x 7).
_HEAD_SIDE = 8


class _Layer(NamedTuple):
    type: str
    activation: str
    normalisation: str
    connectivity: str

    @property
    def is_pool(self) -> bool:
        return "pool" in self.type

    def __str__(self) -> str:
        first, last = self.type, self.connectivity
        return f"{first} {last}" if self.is_pool else " ".join(self)


@dataclass(frozen=True)
class MacroCNN:
    """A stem and ``layers`` layers, then a linear classifier on at most 8 x 8 positions.

    Four decisions a layer.  A convolution answers with ``width`` channels, normalised and activated; a
    pool halves the image and has neither.  Connectivity says what becomes of a layer's answer f(x):
    sequential f(x); residual x + f(x), through a 1x1 convolution where the channels differ; dense x and
    f(x) side by side; attention f(x) through a non-local block.

    What has no effect is masked to the first choice: activation and normalisation of a pool; 5x5 windows
    on images under 3 x 3; residual and dense around a pool; pools on images under 4 x 4.

    Source: the vocabulary of Neural Architecture Search with Reinforcement Learning's overview; the
    shape of the network is ours.

    Args:
        task_spec: the images are (channels, height, width), at least 2 x 2.
        layers: how many.
        width: channels of the stem and of every convolution.
    """

    task_spec: TaskSpec
    layers: int = 6
    width: int = 32

    def __post_init__(self) -> None:
        shape = self.task_spec.input_shape
        if len(shape) != 3 or min(shape[1:]) < 2:
            raise ConfigError(
                f"macro-cnn needs images (channels, height, width) of at least 2 x 2, the task has {shape}"
            )
        if self.layers < 1 or self.width < 2:
            raise ConfigError(
                f"macro-cnn: layers = {self.layers}, width = {self.width}: give at least 1 and at least 2"
            )

    @property
    def name(self) -> str:
        """Of the kind of space, whatever its options."""
        return "macro-cnn"

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Four for each layer: type, activation, normalisation, connectivity."""
        return _decisions(self.layers)

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Which choices may follow ``prefix``: bool [5] or [4]."""
        kind, choices = _VOCABULARY[len(prefix) % 4]
        start = len(prefix) // 4 * 4
        side = min(self._sides(prefix[:start]))
        allowed = np.ones(len(choices), dtype=bool)
        if kind == "type":
            allowed[TYPES.index("conv5x5")] = side >= 3
            allowed[TYPES.index("maxpool3x3") :] = side >= 4
        elif "pool" in TYPES[prefix[start]]:
            allowed[:] = [choice == choices[0] or choice == "attention" for choice in choices]
        return allowed

    def is_complete(self, prefix: tuple[int, ...]) -> bool:
        """Whether every layer has its four choices."""
        return len(prefix) == 4 * self.layers

    def cheapest(self, prefix: tuple[int, ...]) -> Architecture:
        """Pools while they are allowed, then 1x1 convolutions; of the rest the first choice."""
        pool = TYPES.index("maxpool3x3")
        while not self.is_complete(prefix):
            pools = len(prefix) % 4 == 0 and self.mask(prefix)[pool]
            prefix += (pool if pools else 0,)
        return Architecture(self.name, prefix)

    def canonical_key(self, architecture: Architecture) -> str:
        """The layers; group normalisations of equally many groups are one."""
        groups = {"layer": 1, "group": math.gcd(self.width, 8), "instance": self.width}
        spelled = [
            str(layer).replace(layer.normalisation, f"groups-{groups[layer.normalisation]}")
            if layer.normalisation in groups
            else str(layer)
            for layer in self._layers(architecture.choices)
        ]
        return f"{self.name}:{'|'.join(spelled)}"

    def describe(self, architecture: Architecture) -> str:
        """The layers in order."""
        return " > ".join(map(str, self._layers(architecture.choices)))

    def build(self, architecture: Architecture, task_spec: TaskSpec) -> nn.Module:
        """A module from [N, channels, height, width] to [N, outputs]."""
        stride = _stem_stride(task_spec)
        modules: list[nn.Module] = [conv_unit(task_spec.input_shape[0], self.width, 3, stride=stride)]
        channels = self.width
        for layer in self._layers(architecture.choices):
            modules.append(_build(layer, channels, self.width))
            if not layer.is_pool:
                channels = self.width + channels * (layer.connectivity == "dense")
        sides = tuple(min(side, _HEAD_SIDE) for side in self._sides(architecture.choices))
        features = channels * math.prod(sides)
        modules += [nn.AdaptiveAvgPool2d(sides), nn.Flatten(), nn.Linear(features, task_spec.outputs)]
        return initialise(nn.Sequential(*modules))

    def _layers(self, choices: tuple[int, ...]) -> Iterator[_Layer]:
        for start in range(0, len(choices), 4):
            named = zip(_VOCABULARY, choices[start : start + 4], strict=True)
            yield _Layer(*(vocabulary[choice] for (_, vocabulary), choice in named))

    def _sides(self, choices: tuple[int, ...]) -> tuple[int, ...]:
        """Height and width of the image after whole layers."""
        halvings = (_stem_stride(self.task_spec) == 2) + sum("pool" in TYPES[c] for c in choices[::4])
        return tuple(-(-side // 2**halvings) for side in self.task_spec.input_shape[1:])


@lru_cache
def _decisions(layers: int) -> tuple[Decision, ...]:
    return tuple(
        Decision(f"layer {depth} {kind}", choices)
        for depth in range(1, layers + 1)
        for kind, choices in _VOCABULARY
    )


def _stem_stride(task_spec: TaskSpec) -> int:
    return 2 if min(task_spec.input_shape[1:]) >= _LARGE_SIDE else 1


def _build(layer: _Layer, channels: int, width: int) -> nn.Module:
    unit, made = _unit(layer, channels, width), channels if layer.is_pool else width
    match layer.connectivity:
        case "residual":
            return Residual(unit, None if channels == made else nn.Conv2d(channels, made, 1))
        case "dense":
            return Dense(unit)
        case "attention":
            from ..nn.non_local import NonLocalBlock

            return nn.Sequential(unit, NonLocalBlock(made))
    return unit


def _unit(layer: _Layer, channels: int, width: int) -> nn.Module:
    if layer.type == "maxpool3x3":
        return nn.MaxPool2d(3, stride=2, padding=1)
    if layer.type == "avgpool3x3":
        return nn.AvgPool2d(3, stride=2, padding=1)
    return conv_unit(
        channels,
        width,
        int(layer.type[-1]),
        normalisation=layer.normalisation,
        activation=layer.activation,
    )
