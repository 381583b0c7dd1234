"""Rewards: from what was measured to the one number a strategy is told.

Each factory returns a ``Reward``.  All are pure: the scale of a reward that has no target comes from
the first batch of the log itself, so that a replay computes the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from ..errors import ConfigError
from .protocols import Goal, Reward, SearchContext
from .trial import Measurement, Trial

DELTA = 1e-8


@dataclass(frozen=True)
class PointwiseReward:
    """A reward that looks at one measurement at a time."""

    score: Callable[[Measurement], float]
    needs: tuple[str, ...]
    floor: float = 0.0

    def __call__(self, batch: Sequence[Measurement], before: Sequence[Trial]) -> list[float]:
        return [self.score(measurement) for measurement in batch]


@dataclass(frozen=True)
class CostReward:
    """Accuracy weighed against one cost, relative to a target.

    Attributes:
        shape: (accuracy, cost / target) -> reward.
        cost: name of the cost, e.g. "latency_s".
        target: in the unit of the name; None takes the median over the first batch, failed children
            apart.
    """

    shape: Callable[[float, float], float]
    cost: str = "latency_s"
    target: float | None = None
    floor: float = 0.0

    @property
    def needs(self) -> tuple[str, ...]:
        return ("accuracy", self.cost)

    def __call__(self, batch: Sequence[Measurement], before: Sequence[Trial]) -> list[float]:
        if not batch:
            return []
        target = self.target or self.first_batch_median(batch, before)
        return [
            self.shape(_number(measurement, "accuracy"), _number(measurement, self.cost) / target)
            for measurement in batch
        ]

    def first_batch_median(self, batch: Sequence[Measurement], before: Sequence[Trial]) -> float:
        first = [trial.measurement for trial in takewhile(lambda trial: trial.batch == 0, before)]
        seen = [value for m in first or batch if m.failure is None and (value := m.value(self.cost))]
        if not seen:  # every child of the first batch failed: the first batch with a cost sets the scale
            later = (trial.measurement for trial in before)
            seen = [value for m in (*later, *batch) if m.failure is None and (value := m.value(self.cost))][
                :1
            ]
        return float(np.median(seen or [_number(batch[0], self.cost)]))


def accuracy() -> Reward:
    """Validation accuracy, and nothing else."""
    return PointwiseReward(lambda measurement: _number(measurement, "accuracy"), needs=("accuracy",))


def soft(
    *, cost: str = "latency_s", target: float | None = None, exponent: float = -0.07, one_sided: bool = True
) -> Reward:
    """Accuracy x (cost/target)^exponent.

    Source: Tan et al., MnasNet (2019), eq. 2, "soft": exponent -0.07 on both sides of the target.
    Deviations: ``one_sided`` (the default) gives no bonus below the target, so that the smallest
    network is not worth more than an accurate one that is fast enough; without a ``target`` the scale
    is the median over the first batch.
    """
    _check_target(target)
    _check(exponent <= 0, "exponent", exponent, "give a number at or below 0")

    def shape(accuracy: float, ratio: float) -> float:
        return float(accuracy * (max(ratio, 1.0) if one_sided else ratio) ** exponent)

    return CostReward(shape, cost, target)


def hard(*, cost: str = "latency_s", target: float | None = None, exponent: float = -1.0) -> Reward:
    """Accuracy up to the target, accuracy x (cost/target)^exponent above it.

    Source: Tan et al., MnasNet (2019), eq. 2, "hard": exponents (0, -1).
    """
    _check_target(target)
    _check(exponent <= 0, "exponent", exponent, "give a number at or below 0")
    return CostReward(lambda accuracy, ratio: accuracy * max(ratio, 1.0) ** exponent, cost, target)


def absolute(*, target: float, cost: str = "latency_s", beta: float = -0.1) -> Reward:
    """Accuracy + beta x |cost/target - 1|: pulls towards the target from both sides.

    Source: Bender et al., TuNAS (2020), eq. 1.  Its scale is a target by definition: one must be given.
    Deviations: never below -1, so that no network that works scores less than one that failed.
    """
    _check_target(target)
    _check(beta < 0, "beta", beta, "give a number below 0")
    floor = -1.0
    return CostReward(
        lambda accuracy, ratio: max(accuracy + beta * abs(ratio - 1.0), floor), cost, target, floor
    )


def size_penalty(*, beta: float = 0.01) -> Reward:
    """Accuracy - beta x (1e-8 x + ln x), x the trainable parameters.

    Source: Sivaramakrishnan et al., Building Neural Networks using Deep Reinforcement Learning, "Model
    Size Based Penalty".  ``beta`` brings the penalty to the scale of an accuracy between 0 and 1.
    """
    _check(beta >= 0, "beta", beta, "give a number at or above 0")

    def score(measurement: Measurement) -> float:
        x = max(_number(measurement, "parameters"), 1.0)
        return _number(measurement, "accuracy") - beta * (DELTA * x + math.log(x))

    return PointwiseReward(
        score, needs=("accuracy", "parameters"), floor=-beta * (DELTA * 1e9 + math.log(1e9))
    )


def weighted_sum(
    *,
    accuracy_weight: float = 100.0,
    efficiency_weight: float = 10.0,
    complexity_weight: float = 0.1,
    efficiency: str = "flops",
    complexity: str = "parameters",
    terms: Mapping[str, float] | None = None,
) -> Reward:
    """Accuracy x 100 + efficiency x 10 - complexity x 0.1 + weight x value for each of ``terms``.

    Source: the "Reward Function Design" of the NAS-RL overview.  It names no units; ours: accuracy from
    0 to 1, efficiency = 1 / (1 + cost in millions) for the counts ``flops`` and ``parameters`` and
    1 / (1 + 1000 x cost) for seconds and joules, complexity in thousands for counts.

    Args:
        terms: further numbers of the measurement by name with their weights, e.g. {"loss": -1.0}.
    """
    terms = dict(terms or {})
    floor = (
        -1000.0
    )  # beyond some 10 million parameters, too: no network that works scores less than a failed one

    def score(measurement: Measurement) -> float:
        scale = 1e-6 if efficiency in ("flops", "parameters", "peak_memory_bytes") else 1e3
        cost = _number(measurement, efficiency) * scale
        total = (
            accuracy_weight * _number(measurement, "accuracy")
            + efficiency_weight / (1.0 + cost)
            - complexity_weight * _number(measurement, complexity) / 1e3
            + sum(weight * _number(measurement, name) for name, weight in terms.items())
        )
        return max(total, floor)

    return PointwiseReward(score, needs=("accuracy", efficiency, complexity, *terms), floor=floor)


def constrained(*, limits: Mapping[str, float], scale: float = 100.0, penalty: float = -1000.0) -> Reward:
    """Accuracy x 100 while every limit holds, a fixed -1000 where one does not.

    Source: ``constrained_reward`` of the NAS-RL overview.

    Args:
        limits: largest allowed value by name, e.g. {"parameters": 1e6, "latency_s": 0.1}.
    """
    _check_limits(limits)

    def score(measurement: Measurement) -> float:
        if any(_number(measurement, name) > limit for name, limit in limits.items()):
            return penalty
        return scale * _number(measurement, "accuracy")

    return PointwiseReward(score, needs=("accuracy", *limits), floor=penalty)


def limited(reward: Reward, limits: Mapping[str, float], *, weight: float = 1.0) -> Reward:
    """``reward``, less a bounded penalty for every limit that is broken.

    The penalty for a cost c above its limit L is weight x (1 - L/c): 0 at the limit, never more than
    ``weight``, and growing all the way, so that a controller far outside still sees which way is out.
    """
    _check_limits(limits)

    return Limited(reward, dict(limits), weight)


@dataclass(frozen=True)
class Limited:
    """The reward that ``limited`` makes."""

    reward: Reward
    limits: Mapping[str, float]
    weight: float

    @property
    def floor(self) -> float:
        return self.reward.floor - self.weight * len(self.limits)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.reward.needs, *self.limits)))

    def __call__(self, batch: Sequence[Measurement], before: Sequence[Trial]) -> list[float]:
        return [
            value - self.weight * sum(_excess(_number(m, name), limit) for name, limit in self.limits.items())
            for value, m in zip(self.reward(batch, before), batch, strict=True)
        ]

    def conditioned(self, context: SearchContext, before: Sequence[Trial]) -> SearchContext:
        """The context of the reward inside, its goal bounded by the limits, too."""
        condition = getattr(self.reward, "conditioned", None)
        inner: SearchContext = context if condition is None else condition(context, before)
        return inner if inner.goal is None else replace(inner, goal=self._bounded(inner.goal))

    def _bounded(self, goal: Goal) -> Goal:
        count, bounds, weight = len(goal.numbers), np.array(list(self.limits.values())), self.weight
        after = goal.after

        def score(values: np.ndarray) -> np.ndarray:
            share = bounds / np.maximum(values[..., count:], 1e-30)
            return np.asarray(
                goal.score(values[..., :count]) - weight * (1.0 - share).clip(min=0.0).sum(axis=-1)
            )

        return Goal(
            (*goal.numbers, *self.limits),
            score,
            goal.reached,
            None if after is None else lambda values: self._bounded(after(values[:count])),
        )


def summed(parts: Sequence[tuple[float, Reward]]) -> Reward:
    """Adds up weight x reward: to compose a reward of one's own from these and others."""
    if not parts:
        raise ConfigError("a sum of rewards needs at least one part, got none")

    @dataclass(frozen=True)
    class Summed:
        floor: float = sum(weight * part.floor for weight, part in parts)
        needs: tuple[str, ...] = tuple(dict.fromkeys(name for _, part in parts for name in part.needs))

        def __call__(self, batch: Sequence[Measurement], before: Sequence[Trial]) -> list[float]:
            columns = [[weight * value for value in part(batch, before)] for weight, part in parts]
            return [sum(row) for row in zip(*columns, strict=True)]

    return Summed()


def within(measurement: Measurement, limits: Mapping[str, float]) -> bool:
    """Whether every limited number is known and at or under its limit."""
    values = {name: measurement.value(name) for name in limits}
    return all(value is not None and value <= limits[name] for name, value in values.items())


def _excess(cost: float, limit: float) -> float:
    return 0.0 if cost <= limit else 1.0 - limit / cost


def _number(measurement: Measurement, name: str) -> float:
    value = measurement.value(name)
    if value is None:
        raise ConfigError(
            f"the reward needs {name!r}, which the evaluator did not measure; "
            "choose another reward, or an evaluator or meter that measures it"
        )
    return value


def _check(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"reward setting {name} = {value}: {remedy}")


def _check_target(target: float | None) -> None:
    _check(
        target is None or (math.isfinite(target) and target > 0), "target", target, "give a number above 0"
    )


def _check_limits(limits: Mapping[str, float]) -> None:
    if not limits:
        raise ConfigError("no limits given: name at least one, e.g. parameters = 1e6")
    for name, limit in limits.items():
        _check(math.isfinite(limit) and limit > 0, f"limit {name}", limit, "give a number above 0")
