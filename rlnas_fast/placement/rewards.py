"""What a decision was worth: the change of a metric over the passes after it, less a price for latency."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..hardware import meter_for
from .inserter import NonLocalInserter
from .stages import observing

__all__ = ["METRICS", "Decision", "RewardRule", "added_latency", "macro_f1"]


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Fraction of the samples that are right.  logits: [N, classes], y: [N]."""
    return float((logits.argmax(dim=1) == y).double().mean())


def negative_loss(logits: Tensor, y: Tensor) -> float:
    """Minus the mean cross entropy, so that more is better."""
    return -float(F.cross_entropy(logits.float(), y))


def macro_f1(logits: Tensor, y: Tensor) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN), of those that occur or were answered."""
    classes = logits.shape[1]
    confusion = torch.bincount(y * classes + logits.argmax(dim=1), minlength=classes**2).reshape(
        classes, classes
    )
    both = (confusion.sum(dim=0) + confusion.sum(dim=1)).double()
    return float((2 * confusion.diagonal().double() / both)[both > 0].mean())


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "loss": negative_loss,
    "f1": macro_f1,
}


@dataclass(frozen=True)
class RewardRule:
    """How a decision is rewarded.

    With M the metric on one validation batch, a the action, t the pass at which it was chosen:
    reward = M(with a, t + delay) - M(without a block, t) - price * (latency of a / latency without - 1),
    and with ``control`` minus what the network without a block has gained by itself in between,
    M(without, t + delay) - M(without, t): training makes every network better, whichever stage was chosen,
    and early on by much more than a block does.

    Args:
        metric: "loss" (its reduction), "accuracy" or "f1" (macro).
        delay: training passes between a decision and its reward, at least 1.
        latency_price: what an inference twice as long costs, in units of the metric.
        control: whether the gain without a block is taken off.
    """

    metric: str = "loss"
    delay: int = 4
    latency_price: float = 0.0
    control: bool = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise unknown_name("metric", self.metric, METRICS)
        if self.delay < 1:
            raise ConfigError(f"delay = {self.delay}: a reward comes after at least 1 training pass")
        if not (self.latency_price >= 0 and math.isfinite(self.latency_price)):
            raise ConfigError(f"latency_price = {self.latency_price}: give a number of at least 0")

    def reward(self, before: float, after: float, without: float, added_latency: float) -> float:
        """The reward.

        Args:
            before: the metric without a block when the decision was taken.
            after: with the chosen block, ``delay`` passes later.
            without: without a block then.
            added_latency: share of the network's own latency; 0 for no block.
        """
        change = after - before - (without - before if self.control else 0.0)
        return change - self.latency_price * added_latency


@dataclass(eq=False)
class Decision:
    """One choice of a stage, waiting for its reward.

    Attributes:
        step: training passes before it.
        epoch: from 0.
        regime: of the batch it was taken for.
        state: float32 [F].
        action: what was chosen.
        best: what the agent thought best.
        judge: which validation batch rewards it.
        before: the metric without a block then.
        saved: the network before the decision, where it may be set back.
    """

    step: int
    epoch: int
    regime: str
    state: Tensor
    action: int
    best: int
    judge: int
    before: float
    saved: dict[str, Any] | None = None


def added_latency(inserter: NonLocalInserter, x: Tensor, device: str) -> tuple[float, ...]:
    """Share of the network's own latency that the block of each action adds to it, measured now.

    Args:
        x: what the network is measured with, such as one sample.
        device: "cpu" or "cuda:<index>".
    Raises:
        MeterError: the device cannot be measured.
    """
    meter, network, inserted = meter_for(device), inserter.network, inserter.inserted
    seconds = []
    try:
        for action in range(len(inserter.names)):
            inserter.remove()
            inserter.insert_again(action)
            with observing(network):
                latency_s = meter.measure(lambda: network(x)).latency_s
            assert latency_s is not None
            seconds.append(latency_s)
    finally:
        inserter.remove()
        inserter.insert_again(inserted)
    return (0.0, *(each / seconds[0] - 1 for each in seconds[1:]))
