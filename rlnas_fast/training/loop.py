"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..search import Budget
from .augmentation import AUGMENTATIONS
from .data import DeviceData
from .recipe import Recipe

_EVALUATION_BATCH = 1024
# A mean loss this many times that of guessing is no noise of an early epoch: the child has diverged.
_DIVERGED = 10.0


@dataclass(frozen=True)
class TrainResult:
    """What became of a child.

    Attributes:
        accuracy: fraction of the validation split that is right after the last epoch.
        loss: mean validation loss then.
        curve: validation accuracy after each epoch.
        seconds: wall clock, validation included.
        failure: "diverged: ..." or "over time: ...", or None.
    """

    accuracy: float | None
    loss: float | None
    curve: tuple[float, ...]
    seconds: float
    failure: str | None = None


def train(
    module: nn.Module,
    data: DeviceData,
    recipe: Recipe,
    budget: Budget,
    *,
    device: torch.device,
    seed: int,
    on_epoch: Callable[[int, float, float], None] = lambda epoch, accuracy, loss: None,
    on_step: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Trains ``module`` in place until its budget is spent or it diverges.

    The host waits for the device once an epoch, never in a step.  On a CPU with a fixed number of
    threads, and a budget without seconds, equal arguments give equal results.

    Args:
        module: on ``device``; float32 weights.
        data: on ``device``.
        budget: the schedule ends with it.  When its seconds run out within an epoch, training ends there
            and the child is judged as it is; when they run out before the first epoch is done, it failed.
        seed: of the order of the images and of the augmentation.
        on_epoch: called with the epoch from 1, the validation accuracy and loss after it.
        on_step: called after every step.
    """
    started = time.monotonic()
    shuffle = torch.Generator().manual_seed(seed)
    chance = torch.Generator(device).manual_seed(seed)
    optimizer = make_optimizer(module, recipe)
    count = len(data.x)
    batch_size = min(recipe.batch_size, count)
    augmentations = recipe.augmentations(budget)
    steps = count // batch_size
    guessing = math.log(int(data.y.max()) + 1)
    curve: list[float] = []
    accuracy = loss = None
    for epoch in range(budget.epochs):
        module.train()
        total = torch.zeros((), device=device)
        order = torch.randperm(count, generator=shuffle).to(device, non_blocking=True)
        for step in range(steps):
            elapsed = time.monotonic() - started
            if budget.seconds is not None and elapsed >= budget.seconds:
                break
            spent = (epoch * steps + step) / (budget.epochs * steps)
            if budget.seconds is not None:
                spent = max(spent, elapsed / budget.seconds)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate_factor(spent, recipe.warmup)
            rows = order[step * batch_size : (step + 1) * batch_size]
            x = data.normalise(data.x[rows])
            for name in augmentations:
                x = AUGMENTATIONS[name](x, chance)
            with precision(recipe, device):
                batch_loss = F.cross_entropy(module(x), data.y[rows], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(batch_loss)
            optimizer.step()
            total += batch_loss.detach()
            on_step()
        else:
            mean_loss = float(total) / steps
            if not mean_loss < _DIVERGED * guessing:
                failure = f"diverged: training loss {mean_loss:.3g} in epoch {epoch + 1}"
                return TrainResult(None, None, tuple(curve), time.monotonic() - started, failure)
            accuracy, loss = evaluate(module, data, data.x_validation, data.y_validation, recipe)
            curve.append(accuracy)
            on_epoch(epoch + 1, accuracy, loss)
            continue
        if not curve:
            failure = f"over time: {budget.seconds} s ended in the first epoch"
            return TrainResult(None, None, (), time.monotonic() - started, failure)
        accuracy, loss = evaluate(module, data, data.x_validation, data.y_validation, recipe)
        break
    return TrainResult(accuracy, loss, tuple(curve), time.monotonic() - started)


@torch.no_grad()
def evaluate(
    module: nn.Module, data: DeviceData, x: Tensor, y: Tensor, recipe: Recipe
) -> tuple[float, float]:
    """(fraction that is right, mean cross entropy) of ``module`` on raw images x and labels y."""
    module.eval()
    right = torch.zeros((), device=x.device, dtype=torch.int64)
    loss = torch.zeros((), device=x.device, dtype=torch.float64)
    for some_x, some_y in zip(
        torch.split(x, _EVALUATION_BATCH), torch.split(y, _EVALUATION_BATCH), strict=True
    ):
        with precision(recipe, x.device):
            logits = module(data.normalise(some_x)).float()
        right += (logits.argmax(1) == some_y).sum()
        loss += F.cross_entropy(logits, some_y, reduction="sum")
    return int(right) / len(y), float(loss) / len(y)


def precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """Where the forward pass runs: autocast to bfloat16 if the recipe says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16")


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Of the trainable parameters of ``module``, as the recipe says."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=recipe.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )


def rate_factor(spent: float, warmup: float) -> float:
    """Factor on the learning rate after a fraction ``spent`` of the budget."""
    if spent < warmup:
        return (spent + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (spent - warmup) / (1 - warmup)))
