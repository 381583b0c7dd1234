"""Networks for small images with stages to choose from: ``--model`` knows them by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.child_layers import conv_unit

__all__ = ["ResNet", "StageCNN", "resnet20", "stage_cnn"]


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

    Source: He et al. (2016), section 4.2; 6 ``depth`` + 2 layers.
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


def resnet20(channels: int, classes: int) -> ResNet:
    """ResNet-20 for images of 32 x 32: 269,722 parameters for CIFAR-10."""
    return ResNet(channels, classes, depth=3)


def stage_cnn(channels: int, classes: int) -> StageCNN:
    """The small CNN of three stages: under 100,000 parameters."""
    return StageCNN(channels, classes)


def _stage(channels_in: int, channels_out: int, stride: int, depth: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(channels_in, channels_out, stride),
        *(BasicBlock(channels_out, channels_out, 1) for _ in range(depth - 1)),
    )
