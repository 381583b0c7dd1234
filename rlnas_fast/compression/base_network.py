"""Step 1 of the document: a base network, trained before it is compressed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..networks import make_network
from ..search import Budget
from ..training.data import DeviceData, Task
from ..training.loop import TrainResult, train
from ..training.recipe import Recipe

__all__ = ["TRAINING", "train_network"]

TRAINING = Recipe(learning_rate=0.002, batch_size=64, label_smoothing=0.0, augment=())


def train_network(
    name: str,
    task: Task,
    *,
    epochs: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_epoch: Callable[[int, float, float], None] = lambda epoch, accuracy, loss: None,
) -> tuple[nn.Module, TrainResult]:
    """Trains a named network on the training split.

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
