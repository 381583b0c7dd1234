"""The networks by name that can be compressed without bringing one's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name
from ..search import Budget, TaskSpec
from ..training.data import DeviceData, Task
from ..training.loop import TrainResult, train
from ..training.recipe import Recipe

__all__ = ["NETWORKS", "TRAINING", "make_network", "named_after", "train_network"]

TRAINING = Recipe(learning_rate=0.002, batch_size=64, label_smoothing=0.0, augment=())


def make_network(name: str, spec: TaskSpec, seed: int = 0) -> nn.Sequential:
    """An untrained network for a task's images and classes, drawn with ``seed``."""
    if name not in NETWORKS:
        raise unknown_name("network", name, NETWORKS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](spec)


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
    channels, *sides = spec.input_shape
    if len(sides) != 2:
        raise ConfigError(f"small-cnn takes images [channels, height, width], got {spec.input_shape}")
    area = math.prod(-(-(side // 2) // 4) for side in sides)
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


NETWORKS: dict[str, Callable[[TaskSpec], nn.Sequential]] = {
    "lenet-300-100": lenet_300_100,
    "small-cnn": small_cnn,
}


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


def train_network(
    name: str,
    task: Task,
    *,
    epochs: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_epoch: Callable[[int, float, float], None] = lambda epoch, accuracy, loss: None,
) -> tuple[nn.Module, TrainResult]:
    """Step 1 of the document: trains a base network, on the training split.

    Returns:
        The network in eval mode, on ``device``, and what became of it.
    """
    where = torch.device(device)
    module = make_network(name, task.spec, seed).to(where)
    result = train(
        module,
        DeviceData.of(task, where),
        TRAINING,
        Budget(epochs),
        device=where,
        seed=seed,
        on_epoch=on_epoch,
    )
    return module.eval(), result
