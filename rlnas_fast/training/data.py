"""A task's images on the device that trains, normalised batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tasks.task import Split, Task

__all__ = ["DeviceData", "Split", "Task", "on_device"]


@dataclass(frozen=True, eq=False)
class DeviceData:
    """What a child trains on and is judged on, resident on one device.

    Attributes:
        x, y: training images [N, C, H, W] as the task keeps them (uint8 takes a quarter of the memory of
            float32), labels [N] int64.
        x_validation, y_validation: likewise.
        mean, scale: [1, C, 1, 1] float32; an image becomes (x - mean) * scale.
    """

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor
    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, task: Task, device: torch.device) -> DeviceData:
        """Copies the training and validation splits of ``task`` to ``device``."""
        mean = torch.tensor(task.mean, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
        std = torch.tensor(task.std, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
        return cls(*on_device(task.train, device), *on_device(task.validation, device), mean, 1 / std)

    def normalise(self, x: Tensor) -> Tensor:
        """Float32 images of mean 0 and deviation 1 from raw ones."""
        return (x.float() - self.mean).mul_(self.scale)


def on_device(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels of a split as tensors on ``device``.

    Strides are those of the shape.  An array with one channel may have others and still be contiguous, a
    pickled copy of it may not, and a convolution rounds differently for each.
    """
    x = torch.tensor(split.x, device=device).clone(memory_format=torch.contiguous_format)
    return x, torch.tensor(split.y, device=device)
