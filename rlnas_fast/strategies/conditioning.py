"""What a controller is told while it decides: the target it is to keep, and the cost so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..rl.baselines import MovingAverage, ema_advantages
from ..rl.policies import Choices, Condition
from ..search import SearchContext

LARGEST_SHARE = 4.0


class Conditioning:
    """Turns the context of a search into the two numbers a policy is conditioned on.

    They are ln(target / first target of the search), so that targets are told apart whatever their unit,
    and the estimated cost of the prefix as a share of the target, at most 4 (0 without a cost model).
    The first cost with a target counts.  Each architecture keeps what was said when it was asked; one
    that was never asked is taken to have been meant for the latest target.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._latest: Condition | None = None
        self._asked: dict[Choices, Condition | None] = {}

    def of(self, context: SearchContext) -> Condition | None:
        """Prefix -> (target, cost so far); None where there is no target."""
        if not context.targets:
            self._latest = None
            return None
        name, target = next(iter(context.targets.items()))
        said = math.log(target / self._first.setdefault(name, target))
        model = context.cost_model

        def condition(prefix: Choices) -> tuple[float, float]:
            cost = 0.0 if model is None else model.estimate(prefix).get(name, 0.0)
            return said, min(cost / target, LARGEST_SHARE)

        self._latest = condition
        return condition

    def remember(self, sequences: Sequence[Choices]) -> None:
        """These were asked under the latest condition."""
        if self._latest is not None:
            self._asked.update(dict.fromkeys(sequences, self._latest))

    def recall(self, sequences: Sequence[Choices]) -> list[Condition | None]:
        """The condition of each, which is then forgotten."""
        return [self._asked.pop(sequence, self._latest) for sequence in sequences]


class Baselines:
    """A moving average of the rewards for each target: what is poor for a loose one is good for a tight one.

    Args:
        decay: weight of the past, the setting ``baseline_decay``.
    Raises:
        ConfigError: it is not from 0 to below 1.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"baseline_decay = {decay}: give a number from 0 to below 1")
        self._decay = decay
        self._averages: dict[float, MovingAverage] = {}

    def advantages(self, rewards: Sequence[float], conditions: Sequence[Condition | None]) -> Tensor:
        """Rewards minus their target's average, in units of its deviation: float32 [B]."""
        targets = [0.0 if condition is None else condition(())[0] for condition in conditions]
        advantages = torch.zeros(len(rewards))
        for target in dict.fromkeys(targets):
            rows = [row for row, other in enumerate(targets) if other == target]
            own = torch.tensor([rewards[row] for row in rows], dtype=torch.float64)
            average = self._averages.get(target, MovingAverage())
            relative, average = ema_advantages(own, average, decay=self._decay)
            advantages[rows] = (relative / (average.deviation or 1.0)).float()
            self._averages[target] = average
        return advantages
