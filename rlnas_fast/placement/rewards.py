"""What a decision was worth: the change of a metric over the passes after it, less a price for latency."""

from __future__ import annotations

import math
import statistics
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

__all__ = ["METRICS", "AddedLatency", "Decision", "RewardRule", "added_latency", "macro_f1"]


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


LATENCY_ROUNDS = 3
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


@dataclass(frozen=True)
class AddedLatency:
    """What blocks cost, measured.

    Attributes:
        shares: of the network's own latency, that each action adds to it; 0 for "none".
        caveats: what makes these figures less than they seem, one short clause each.
    """

    shares: tuple[float, ...]
    caveats: tuple[str, ...] = ()


def added_latency(inserter: NonLocalInserter, x: Tensor, device: str) -> AddedLatency:
    """Measures how much longer the network takes with each stage's block.

    Each share is the median of ``LATENCY_ROUNDS`` ratios, each of two measurements that follow each other.

    Args:
        x: what the network is measured with, such as one sample.
        device: "cpu" or "cuda:<index>".
    Raises:
        MeterError: the device cannot be measured.
    """
    meter, network, inserted = meter_for(device), inserter.network, inserter.inserted
    caveats: dict[str, None] = {}

    def seconds(action: int) -> float:
        inserter.remove()
        inserter.insert_again(action)
        with observing(network):
            cost = meter.measure(lambda: network(x))
        caveats.update(dict.fromkeys(cost.caveats))
        assert cost.latency_s is not None
        return cost.latency_s

    try:
        shares = [
            statistics.median(_added(seconds(0), seconds(action)) for _ in range(LATENCY_ROUNDS))
            for action in range(1, len(inserter.names))
        ]
    finally:
        inserter.remove()
        inserter.insert_again(inserted)
    return AddedLatency((0.0, *shares), tuple(caveats))


def _added(without_s: float, with_s: float) -> float:
    return with_s / without_s - 1
