"""Layer after layer until it stops: the convolutional chain as a Markov decision process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..errors import ConfigError
from ..nn.child_layers import Residual, conv_unit, initialise, linear_unit
from ..search import Architecture, Decision, TaskSpec

FILTER_DEPTHS = (10, 20, 32, 64)
FILTER_SIZES = (1, 3, 5)
POOL_SIZES = (3, 5)
POOL_STRIDES = (2, 3)
FC_SIZES = (64, 128, 256, 512)
TRAINING: dict[str, tuple[Any, ...]] = {
    "learning_rate": (0.001, 0.003, 0.01),
    "batch_size": (32, 64, 128),
    "optimizer": ("adam", "sgd"),
}


class Layer(NamedTuple):
    """State and action of the process: one layer, or the start (depth 0), or the end.

    Attributes:
        depth: how many layers there are with this one.
        type: "conv", "pool", "fc", "attention", "residual" (a convolution that its input is added to),
            "global-pool" (the mean of each channel), or "start" and "end", which are no layers.
        filter_depth: output channels of a convolution, else 0.
        filter_size: side of a convolution's or a pool's window, else 0.
        stride: of a pool, or of a convolution that steps by more than 1, else 0.
        fc_size: outputs of a fully connected layer, else 0.
        termination: 1 where the network ends in its classifier, else 0.
    """

    depth: int
    type: str
    filter_depth: int = 0
    filter_size: int = 0
    stride: int = 0
    fc_size: int = 0
    termination: int = 0

    def __str__(self) -> str:
        match self.type:
            case "conv":
                step = f"/{self.stride}" if self.stride else ""
                return f"conv{self.filter_size}x{self.filter_size}-{self.filter_depth}{step}"
            case "residual":
                return f"residual{self.filter_size}x{self.filter_size}-{self.filter_depth}"
            case "pool":
                return f"pool{self.filter_size}x{self.filter_size}/{self.stride}"
            case "fc":
                return f"fc-{self.fc_size}"
            case other:
                return other


class _Shape(NamedTuple):
    """What a prefix has come to: its last layer and the size of that layer's output."""

    layer: Layer
    channels: int
    height: int
    width: int
    fc_layers: int


@dataclass(frozen=True)
class ChainCNN:
    """Chains of convolutions, pools and fully connected layers that end when the strategy says so.

    Decision i chooses layer i + 1 among all layers there are, so one mask says what may follow.  Rules:
    a window is never larger than its image; a pool neither opens the chain nor follows a pool; fully
    connected layers come last, start once the image is small, and do not grow; attention follows a
    convolution or a pool; after a global pool come fully connected layers or the end.  A chain ends by
    choice, or at ``max_depth`` layers.  The classifier is linear on the flattened output.

    Source: Baker et al., Designing Neural Network Architectures using Reinforcement Learning (2017),
    table 1 and section 4.1, with the smaller set of values of the Mini-MetaQNN study.  Deviations: batch
    normalisation (``normalise``) in place of dropout, since a budget of a few epochs needs it; padding
    keeps a convolution's size; pools pad by half their window.  Switched on by options, and off as
    published: what the second study names as future work.

    Args:
        task_spec: the images are (channels, height, width).
        max_depth: most layers, classifier not counted.
        max_fc: most fully connected layers.
        attention: also offer non-local attention as a layer.
        normalise: batch normalisation after every convolution and fully connected layer.
        fc_side: largest side of an image on which fully connected layers may start.
        strides: steps that a convolution may take.
        global_pooling: also offer the mean of each channel as a layer.
        consecutive_pooling: a pool may follow a pool.
        skips: also offer convolutions that their input is added to (through a 1 x 1 convolution where
            the channels differ).
        training: learning rate, batch size and optimiser (``TRAINING``) are the first three decisions.
    Raises:
        ConfigError: the task has no images, they are too small for any pool, or an option is out of range.
    """

    task_spec: TaskSpec
    max_depth: int = 8
    max_fc: int = 2
    attention: bool = False
    normalise: bool = True
    fc_side: int = 8
    strides: tuple[int, ...] = (1,)
    global_pooling: bool = False
    consecutive_pooling: bool = False
    skips: bool = False
    training: bool = False

    def __post_init__(self) -> None:
        if len(self.task_spec.input_shape) != 3 or min(self.task_spec.input_shape) < 1:
            raise ConfigError(
                f"chain-cnn needs images (channels, height, width), the task has {self.task_spec.input_shape}"
            )
        _, height, width = self.task_spec.input_shape
        if min(height, width) < min(POOL_SIZES):
            raise ConfigError(
                f"chain-cnn: images of {height} x {width} are too small for any pool; "
                f"give images of at least {min(POOL_SIZES)} x {min(POOL_SIZES)}"
            )
        if not self.strides or min(self.strides) < 1 or len(set(self.strides)) < len(self.strides):
            raise ConfigError(
                f"chain-cnn: strides = {self.strides}: give different whole numbers of at least 1"
            )
        for name, least in (("max_depth", 1), ("max_fc", 0), ("fc_side", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"chain-cnn: {name} = {getattr(self, name)}, but it is at least {least}")

    @property
    def name(self) -> str:
        """Of the kind of space, whatever its options."""
        return "chain-cnn"

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """One for each layer, all with the same choices; before them those about training, if any."""
        names = tuple(str(layer) for layer in self._options)
        before = [Decision(name, tuple(map(str, values))) for name, values in self._training.items()]
        return (*before, *(Decision(f"layer {depth}", names) for depth in range(1, self.max_depth + 1)))

    @property
    def _training(self) -> dict[str, tuple[Any, ...]]:
        return TRAINING if self.training else {}

    @cached_property
    def _options(self) -> tuple[Layer, ...]:
        filters = [(d, k) for k in FILTER_SIZES for d in FILTER_DEPTHS]
        convolutions = [Layer(0, "conv", *f) for f in filters if 1 in self.strides]
        pools = [Layer(0, "pool", 0, k, s) for k in POOL_SIZES for s in POOL_STRIDES]
        connected = [Layer(0, "fc", fc_size=size) for size in FC_SIZES]
        attention = [Layer(0, "attention")] if self.attention else []
        # What options add comes after what was there without them, so that choices keep their numbers.
        added = [Layer(0, "conv", *f, stride=s) for s in self.strides if s > 1 for f in filters]
        added += [Layer(0, "residual", *f) for f in filters if self.skips]
        added += [Layer(0, "global-pool")] if self.global_pooling else []
        return (*convolutions, *pools, *connected, *attention, *added, Layer(0, "end", termination=1))

    def layers(self, choices: tuple[int, ...]) -> tuple[Layer, ...]:
        """The 7-tuple behind each choice of a layer: the actions taken, and the states come to."""
        found = []
        for position, choice in enumerate(choices[len(self._training) :]):
            layer = self._options[choice]
            found.append(layer._replace(depth=position + (layer.type != "end")))
        return tuple(found)

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Which layers, or the end, may follow ``prefix``: bool [choices]."""
        if len(prefix) < len(self._training):
            return np.ones(len(self.decisions[len(prefix)].choices), dtype=bool)
        return _mask(self, _walk(self, prefix))

    def is_complete(self, prefix: tuple[int, ...]) -> bool:
        """Whether the chain has ended, or is as deep as chains may be."""
        depth = len(prefix) - len(self._training)
        return depth >= self.max_depth or (depth > 0 and self._options[prefix[-1]].type == "end")

    def cheapest(self, prefix: tuple[int, ...]) -> Architecture:
        """Ends as soon as it may: an empty chain after its first choice, one narrow convolution."""
        while not self.is_complete(prefix):
            mask = self.mask(prefix)
            ends = len(prefix) >= len(self._training) and mask[-1]
            prefix += (len(mask) - 1 if ends else int(mask.argmax()),)
        return Architecture(self.name, prefix)

    def canonical_key(self, architecture: Architecture) -> str:
        """The chain itself: no two of them are one network."""
        training = "".join(f"{name}={value}:" for name, value in self.recipe(architecture).items())
        return f"{self.name}:{training}{'|'.join(map(str, self._chain(architecture)))}"

    def describe(self, architecture: Architecture) -> str:
        """The layers in order, after what was decided about training."""
        training = " ".join(f"{name} {value}" for name, value in self.recipe(architecture).items())
        return (training and f"{training}: ") + " > ".join(map(str, self._chain(architecture)))

    def recipe(self, architecture: Architecture) -> dict[str, Any]:
        """What the architecture itself decides about its training: fields of the recipe by name."""
        decided = zip(self._training.items(), architecture.choices, strict=False)
        return {name: values[choice] for (name, values), choice in decided}

    def _chain(self, architecture: Architecture) -> list[Layer]:
        return [layer for layer in self.layers(architecture.choices) if layer.type != "end"]

    def shapes(self, architecture: Architecture) -> list[tuple[str, str, tuple[int, int, int]]]:
        """(name, type, (channels, height, width) of its output) of each layer in order."""
        shape, found = _start(self.task_spec), []
        for layer in self._chain(architecture):
            shape = _follow(shape, layer)
            found.append((str(layer), layer.type, (shape.channels, shape.height, shape.width)))
        return found

    def build(self, architecture: Architecture, task_spec: TaskSpec) -> nn.Module:
        """A module from [N, channels, height, width] to [N, outputs]."""
        shape = _start(task_spec)
        modules: list[nn.Module] = []
        for layer in self._chain(architecture):
            modules.extend(_build(layer, shape, self.normalise))
            shape = _follow(shape, layer)
        if not shape.fc_layers:
            modules.append(nn.Flatten())
        modules.append(nn.Linear(shape.channels * shape.height * shape.width, task_spec.outputs))
        return initialise(nn.Sequential(*modules))


def _start(task_spec: TaskSpec) -> _Shape:
    channels, height, width = task_spec.input_shape
    return _Shape(Layer(0, "start"), channels, height, width, 0)


def _follow(shape: _Shape, layer: Layer) -> _Shape:
    shape = shape._replace(layer=layer)
    match layer.type:
        case "conv" | "residual":
            side = (_pooled(shape.height, layer), _pooled(shape.width, layer)) if layer.stride else shape[2:4]
            return shape._replace(channels=layer.filter_depth, height=side[0], width=side[1])
        case "global-pool":
            return shape._replace(height=1, width=1)
        case "pool":
            return shape._replace(height=_pooled(shape.height, layer), width=_pooled(shape.width, layer))
        case "fc":
            return shape._replace(channels=layer.fc_size, height=1, width=1, fc_layers=shape.fc_layers + 1)
    return shape


def _pooled(side: int, layer: Layer) -> int:
    return (side + 2 * (layer.filter_size // 2) - layer.filter_size) // layer.stride + 1


@lru_cache(maxsize=1 << 16)
def _walk(space: ChainCNN, prefix: tuple[int, ...]) -> _Shape:
    if len(prefix) <= len(space._training):
        return _start(space.task_spec)
    return _follow(_walk(space, prefix[:-1]), space._options[prefix[-1]])


@lru_cache(maxsize=1 << 12)
def _mask(space: ChainCNN, shape: _Shape) -> np.ndarray:
    mask = np.array([_allowed(space, shape, layer) for layer in space._options])
    mask.setflags(write=False)
    return mask


def _allowed(space: ChainCNN, shape: _Shape, layer: Layer) -> bool:
    last = shape.layer
    if layer.type == "end":
        return last.type != "start"
    if layer.type == "fc":
        if shape.fc_layers == 0:
            return space.max_fc > 0 and max(shape.height, shape.width) <= space.fc_side
        return shape.fc_layers < space.max_fc and layer.fc_size <= last.fc_size
    if shape.fc_layers or layer.filter_size > min(shape.height, shape.width):
        return False
    if last.type == "global-pool":
        return False
    if layer.type == "global-pool":
        return last.type != "start" and max(shape.height, shape.width) > 1
    if layer.type == "attention":
        return last.type in ("conv", "residual", "pool") and shape.channels > 1
    if layer.type == "pool":
        return last.type != "start" and (space.consecutive_pooling or last.type != "pool")
    return True


def _build(layer: Layer, shape: _Shape, normalise: bool) -> list[nn.Module]:
    norm = "batch" if normalise else None
    match layer.type:
        case "conv":
            size, step = layer.filter_size, layer.stride or 1
            return [conv_unit(shape.channels, layer.filter_depth, size, stride=step, normalisation=norm)]
        case "residual":
            ends = (shape.channels, layer.filter_depth)
            shortcut = (
                conv_unit(*ends, 1, normalisation=norm, activation=None) if ends[0] != ends[1] else None
            )
            return [Residual(conv_unit(*ends, layer.filter_size, normalisation=norm), shortcut)]
        case "global-pool":
            return [nn.AdaptiveAvgPool2d(1)]
        case "pool":
            return [nn.MaxPool2d(layer.filter_size, layer.stride, padding=layer.filter_size // 2)]
        case "fc":
            flatten = [] if shape.fc_layers else [nn.Flatten()]
            features = shape.channels * shape.height * shape.width
            return [*flatten, linear_unit(features, layer.fc_size, normalise=normalise)]
    from ..nn.non_local import NonLocalBlock

    return [NonLocalBlock(shape.channels)]
