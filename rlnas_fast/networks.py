"""The networks that commands know by name, for a task's images and classes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError, unknown_name
from .nn.child_layers import conv_unit
from .search import TaskSpec

__all__ = ["NETWORKS", "ResNet", "StageCNN", "make_network", "named_after"]


def make_network(name: str, spec: TaskSpec, seed: int = 0) -> nn.Module:
    """An untrained network for a task's images and classes, drawn with ``seed``."""
    if name not in NETWORKS:
        raise unknown_name("network", name, NETWORKS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](spec)


def named_after(state: dict[str, Tensor], spec: TaskSpec) -> str | None:
    """The network whose parameters, for this task, have these names and shapes; None if there is none."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for name in NETWORKS:
        try:
            own = make_network(name, spec).state_dict()
        except ConfigError:
            continue
        if {key: tensor.shape for key, tensor in own.items()} == shapes:
            return name
    return None


class StageCNN(nn.Module):
    """Three stages of two 3 x 3 convolutions each, halving the side and widening the channels in between.

    With the default width 72,954 parameters for 3-channel images and ten classes.  The stages are
    ``stage1``, ``stage2`` and ``stage3``.

    Args:
        channels: of the images.
        classes: outputs.
        width: channels of the first stage; the second has twice, the third four times as many.
    """

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(conv_unit(channels, width, 3), conv_unit(width, width, 3))
        self.stage2 = nn.Sequential(
            conv_unit(width, 2 * width, 3, stride=2), conv_unit(2 * width, 2 * width, 3)
        )
        self.stage3 = nn.Sequential(
            conv_unit(2 * width, 4 * width, 3, stride=2), conv_unit(4 * width, 4 * width, 3)
        )
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, channels, H, W]."""
        features = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around which the input is added; a smaller output takes every second pixel.

    Source: He et al., Deep Residual Learning (2016), section 4.2, option A: no parameters in the shortcut.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = conv_unit(channels_in, channels_out, 3, stride=stride)
        self.second = conv_unit(channels_out, channels_out, 3, activation=None)
        self.stride, self.widen = stride, channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, D, H / stride, W / stride]."""
        shortcut = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        if self.widen:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.widen // 2, self.widen - self.widen // 2))
        return F.relu(self.second(self.first(x)) + shortcut)


class ResNet(nn.Module):
    """The residual network for CIFAR: a convolution, three stages of ``depth`` blocks, a classifier.

    Stages are ``stage1`` to ``stage3`` with 16, 32 and 64 channels, and ``stem`` before them.

    Source: He et al. (2016), section 4.2; 6 ``depth`` + 2 layers.  With depth 3 it is ResNet-20: 269,722
    parameters for CIFAR-10.
    """

    def __init__(self, channels: int, classes: int, depth: int = 3) -> None:
        super().__init__()
        self.stem = conv_unit(channels, 16, 3)
        self.stage1 = _stage(16, 16, 1, depth)
        self.stage2 = _stage(16, 32, 2, depth)
        self.stage3 = _stage(32, 64, 2, depth)
        self.classifier = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, channels, H, W]."""
        features = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


def lenet_300_100(spec: TaskSpec) -> nn.Sequential:
    """Two hidden layers of 300 and 100 rectifiers (LeCun et al. 1998): 266,200 weights for 28 x 28."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(spec.input_shape), 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, spec.outputs),
    )


def small_cnn(spec: TaskSpec) -> nn.Sequential:
    """Three convolutions and two linear layers: 155,536 weights and 1.5 MFLOPs for 28 x 28."""
    channels = _image_channels("small-cnn", spec)
    area = math.prod(-(-(side // 2) // 4) for side in spec.input_shape[1:])
    if not area:
        raise ConfigError(f"small-cnn takes images of at least 2 x 2, got {spec.input_shape}")
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * area, 128),
        nn.ReLU(),
        nn.Linear(128, spec.outputs),
    )


def _image_channels(name: str, spec: TaskSpec) -> int:
    if len(spec.input_shape) != 3:
        raise ConfigError(f"{name} takes images [channels, height, width], got {spec.input_shape}")
    return spec.input_shape[0]


NETWORKS: dict[str, Callable[[TaskSpec], nn.Module]] = {
    "resnet20": lambda spec: ResNet(_image_channels("resnet20", spec), spec.outputs),
    "stage-cnn": lambda spec: StageCNN(_image_channels("stage-cnn", spec), spec.outputs),
    "lenet-300-100": lenet_300_100,
    "small-cnn": small_cnn,
}


def _stage(channels_in: int, channels_out: int, stride: int, depth: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(channels_in, channels_out, stride),
        *(BasicBlock(channels_out, channels_out, 1) for _ in range(depth - 1)),
    )
