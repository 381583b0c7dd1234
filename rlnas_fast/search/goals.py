"""Rewards that change with the search: a constraint that adapts, and trade-offs between several objectives.

They are folded over the trials before, so a replay computes the same numbers; each keeps where it has
got to, so that a long search costs no more a trial than a short one.  They also say their ``Goal``, for
strategies that predict the numbers themselves and so never learn from a reward that has gone stale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import ConfigError
from .pareto import hypervolume, pareto_front
from .protocols import Goal, Reward, SearchContext
from .trial import Measurement, Trial

MAXIMISED = ("accuracy", "robust_accuracy")
LARGEST_MULTIPLIER = 10.0
DIRECTIONS = 16


def feasible_first(limits: Mapping[str, float]) -> Goal:
    """Accuracy where every limit is kept; what breaks one scores below all that keep them, by how much.

    Source: Deb, An Efficient Constraint Handling Method for Genetic Algorithms (2000).
    """
    bounds = np.array(list(limits.values()))

    def score(values: np.ndarray) -> np.ndarray:
        excess = np.log(np.maximum(values[..., 1:], 1e-30) / bounds).clip(min=0.0).sum(axis=-1)
        return np.asarray(np.where(excess > 0, -1.0 - excess, values[..., 0]))

    return Goal(("accuracy", *limits), score)


def adaptive(
    *,
    target: float | None = None,
    targets: tuple[float, ...] = (),
    cost: str = "latency_s",
    step: float = 0.2,
) -> Reward:
    """Accuracy - multiplier x excess of the cost over its target, the multiplier rising until it is kept.

    The excess is ln(cost / target) in standard deviations of ln(cost) over all trials so far, and is
    weighed in standard deviations of the accuracy: neither the device nor the task sets a scale.  After
    each batch the multiplier moves by ``step`` x the mean signed excess (bounded by 1), and stays between
    0 and 10: it rises while proposals are too slow and falls while they are faster than they need be.
    Where the interval of a measured latency holds the target, the excess is 0.

    With several ``targets``, each batch aims at the next one in turn, and each has a multiplier.

    Source: dual ascent on the Lagrangian, Boyd and Vandenberghe, Convex Optimization (2004), section 5;
    for architectures Bender et al., TuNAS (2020).
    Deviations: only an excess costs reward (a faster network than asked is worth nothing by itself),
    bounded steps; never below -1, so that no network that works scores less than one that failed.
    """
    wanted = (*(() if target is None else (target,)), *targets)
    if not wanted:
        raise ConfigError("reward 'adaptive' needs a target: give --target-latency-ms or --targets")
    for value in wanted:
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"reward setting target = {value}: give a number above 0")
    if not 0 < step <= 1:
        raise ConfigError(f"reward setting step = {step}: give a number above 0, at most 1")
    return Adaptive(tuple(wanted), cost, step)


@dataclass
class _Moments:
    """Mean and spread of numbers that arrive one at a time (Welford 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        change = value - self.mean
        self.mean += change / self.count
        self.squares += change * (value - self.mean)

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 and self.squares > 0 else 1.0


@dataclass
class _Fold:
    """What ``Adaptive`` knows of the trials before: recomputed from the first one if they are others."""

    seen: int = 0
    last: Trial | None = None
    costs: _Moments = field(default_factory=_Moments)
    accuracies: _Moments = field(default_factory=_Moments)
    multipliers: list[float] = field(default_factory=list)


class Adaptive:
    """The reward that ``adaptive`` makes.

    Attributes:
        targets: in the unit of ``cost``; batch b aims at number b modulo their count.
        floor: the reward of a failed child.
        needs: accuracy and the cost.
    """

    floor = -1.0

    def __init__(self, targets: tuple[float, ...], cost: str, step: float) -> None:
        self.targets = targets
        self.cost = cost
        self.needs: tuple[str, ...] = ("accuracy", cost)
        self._step = step
        self._fold = _Fold(multipliers=[1.0] * len(targets))

    def __call__(self, batch: Sequence[Measurement], before: Sequence[Trial]) -> list[float]:
        fold = self._folded(before)
        costs, accuracies = replace(fold.costs), replace(fold.accuracies)
        for measurement in batch:
            _add(costs, accuracies, measurement, self.cost)
        aim = _batch_after(before) % len(self.targets)
        weight = fold.multipliers[aim] * (accuracies.deviation if accuracies.count > 1 else 0.1)
        return [
            max(
                _number(m, "accuracy")
                - weight * max(excess(m, self.cost, self.targets[aim]) / costs.deviation, 0.0),
                self.floor,
            )
            for m in batch
        ]

    def multipliers(self, before: Sequence[Trial]) -> tuple[float, ...]:
        """The multiplier of each target after ``before``."""
        return tuple(self._folded(before).multipliers)

    def conditioned(self, context: SearchContext, before: Sequence[Trial]) -> SearchContext:
        """``context`` with the target of the next batch, and the goal that goes with it."""
        target = self.targets[_batch_after(before) % len(self.targets)]
        return replace(
            context, targets={**context.targets, self.cost: target}, goal=feasible_first({self.cost: target})
        )

    def _folded(self, before: Sequence[Trial]) -> _Fold:
        fold = self._fold
        if fold.seen > len(before) or (fold.seen and before[fold.seen - 1] != fold.last):
            fold = _Fold(multipliers=[1.0] * len(self.targets))
        start = fold.seen
        while start < len(before):
            end = start
            while end < len(before) and before[end].batch == before[start].batch:
                end += 1
            self._take(fold, before[start:end])
            start = end
        fold.seen, fold.last = len(before), before[-1] if before else None
        self._fold = fold
        return fold

    def _take(self, fold: _Fold, batch: Sequence[Trial]) -> None:
        """One step of dual ascent."""
        done = [trial.measurement for trial in batch if trial.state == "complete"]
        for measurement in done:
            _add(fold.costs, fold.accuracies, measurement, self.cost)
        aim = batch[0].batch % len(self.targets)
        signed = [excess(m, self.cost, self.targets[aim]) / fold.costs.deviation for m in done]
        if signed:
            move = self._step * min(max(sum(signed) / len(signed), -1.0), 1.0)
            fold.multipliers[aim] = min(max(fold.multipliers[aim] + move, 0.0), LARGEST_MULTIPLIER)


def excess(measurement: Measurement, cost: str, target: float) -> float:
    """ln(cost / target); 0 where the interval of the measurement holds the target."""
    low, high = interval(measurement, cost)
    if low <= target <= high:
        return 0.0
    return math.log(max(_number(measurement, cost), 1e-30) / target)


def interval(measurement: Measurement, name: str) -> tuple[float, float]:
    """Between what and what the number lies, by its measurement; the number itself where nothing is known."""
    value = _number(measurement, name)
    bounds = [measurement.value(f"{name.removesuffix('_s')}_{end}_s") for end in ("low", "high")]
    low, high = (value if bound is None else bound for bound in bounds)
    return min(low, value), max(high, value)


def hypervolume_gain(*, objectives: tuple[str, ...] = ("accuracy", "latency_s")) -> Reward:
    """How much hypervolume a child adds to the front so far; below 0 by how far it is dominated.

    Objectives are scaled to what has been seen (``Archive``).  A dominated child scores minus the least
    amount by which all its objectives would have to improve to be on the front.

    Source: the hypervolume indicator of Zitzler and Thiele (1999) and the additive epsilon indicator of
    Zitzler et al. (2003), both as changes caused by one point.
    """
    return MultiObjective(_checked(objectives), DIRECTIONS, None)


def random_scalarisation(*, objectives: tuple[str, ...] = ("accuracy", "latency_s"), seed: int = 0) -> Reward:
    """The worst of the scaled objectives, each divided by a weight drawn anew for each batch.

    Source: Zhang and Golovin, Random Hypervolume Scalarizations for Provable Multi-Objective Black Box
    Optimization (2020): the mean over weights is the hypervolume.

    Args:
        objectives: names of numbers; accuracies are maximised, all else is minimised.
        seed: of the weights, with the number of the batch.
    """
    return MultiObjective(_checked(objectives), 1, seed)


class MultiObjective:
    """The reward that ``hypervolume_gain`` and ``random_scalarisation`` make.

    Attributes:
        objectives: names of numbers of a measurement.
        floor: the reward of a failed child.
        needs: the objectives.
    """

    floor = -1.0

    def __init__(self, objectives: tuple[str, ...], directions: int, seed: int | None) -> None:
        self.objectives = objectives
        self.needs = objectives
        self._directions = directions
        self._seed = seed
        self._archive = Archive(objectives)

    def __call__(self, batch: Sequence[Measurement], before: Sequence[Trial]) -> list[float]:
        if not batch:
            return []
        archive = self._after(before)
        points = archive.points(batch)
        low, high = archive.corners(points)
        scaled = scale(points, low, high)
        front = scale(archive.front, low, high)
        if self._seed is not None:
            return [float(v) for v in _achievement(scaled, self._weights(before))[:, 0] - 1.0]
        nothing = np.zeros(len(self.objectives))
        volume = hypervolume(front, nothing)
        rewards = []
        for point in scaled:
            gain = hypervolume(np.vstack([front, point]), nothing) - volume
            behind = float((front - point).min(axis=1).max(initial=0.0)) if len(front) else 0.0
            rewards.append(gain if gain > 0 else max(-behind, self.floor))
        return rewards

    def conditioned(self, context: SearchContext, before: Sequence[Trial]) -> SearchContext:
        """``context`` with the goal of the next batch: what a point adds to the front so far."""
        archive = self._after(before)
        if not len(archive.front):
            return context
        low, high = archive.corners(archive.front)
        if (
            self._seed is None
        ):  # from further down than the worst seen: else what extends a front gains nothing
            low = 2 * low - high
        signs = _signs(self.objectives)
        weights = self._weights(before)
        exact = self._seed is None and len(self.objectives) == 2

        def beyond(front: np.ndarray) -> Goal:
            added = _added_area(front) if exact else _added_along(front, weights)

            def scaled(values: np.ndarray) -> np.ndarray:
                return scale(values * signs, low, high)

            return Goal(
                self.objectives,
                lambda values: added(scaled(values)),
                reached=0.0,
                after=lambda values: beyond(np.vstack([front, scaled(values)])),
            )

        return replace(context, goal=beyond(scale(archive.front, low, high)))

    def _weights(self, before: Sequence[Trial]) -> np.ndarray:
        """Directions in the positive orthant, of length 1: float [directions, objectives]."""
        rng = np.random.default_rng([self._seed or 0, _batch_after(before)])
        drawn = np.abs(rng.standard_normal((self._directions, len(self.objectives)))) + 1e-6
        return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))

    def _after(self, before: Sequence[Trial]) -> Archive:
        if not self._archive.starts(before):
            self._archive = Archive(self.objectives)
        self._archive.add(before[self._archive.seen :])
        return self._archive


class Archive:
    """The front of the trials so far, kept as they come.

    Attributes:
        front: float [members, objectives], maximised: accuracies, and costs with a minus sign.
        members: the trials on it.
        seen: how many trials were added.
    """

    def __init__(self, objectives: Sequence[str]) -> None:
        self.objectives = tuple(objectives)
        self.front = np.empty((0, len(self.objectives)))
        self.members: list[Trial] = []
        self.seen = 0
        self._last: Trial | None = None
        self._low = np.full(len(self.objectives), np.inf)
        self._high = np.full(len(self.objectives), -np.inf)

    def starts(self, trials: Sequence[Trial]) -> bool:
        """Whether ``trials`` begins with what was added."""
        return self.seen <= len(trials) and (self.seen == 0 or trials[self.seen - 1] == self._last)

    def add(self, trials: Sequence[Trial]) -> None:
        """Adds what is complete and has every objective; what becomes dominated goes."""
        fresh = [
            t for t in trials if t.state == "complete"
            and all(t.measurement.value(name) is not None for name in self.objectives)
        ]  # fmt: skip
        if fresh:
            points = self.points([trial.measurement for trial in fresh])
            self._low = np.minimum(self._low, points.min(axis=0))
            self._high = np.maximum(self._high, points.max(axis=0))
            points, members = np.vstack([self.front, points]), self.members + fresh
            kept = pareto_front(points)
            self.front, self.members = points[kept], [members[i] for i in kept]
        self.seen += len(trials)
        self._last = trials[-1] if trials else self._last

    def points(self, measurements: Sequence[Measurement]) -> np.ndarray:
        """Float [measurements, objectives], maximised."""
        values = np.array([[_number(m, name) for name in self.objectives] for m in measurements])
        return np.asarray(values.reshape(-1, len(self.objectives)) * _signs(self.objectives))

    def corners(self, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Worst and best of each objective seen, ``more`` included."""
        return np.minimum(self._low, more.min(axis=0)), np.maximum(self._high, more.max(axis=0))

    def scaled(self, points: np.ndarray) -> np.ndarray:
        """``points`` as fractions of the way from the worst to the best seen."""
        return scale(points, self._low, self._high)

    def nearness(self, measurement: Measurement) -> float:
        """Minus the distance from the best corner of the box, whose sides count as 1: 0 is the corner."""
        point = self.scaled(self.points([measurement]))
        return -float(np.linalg.norm(1.0 - point))


def volumes(trials: Sequence[Trial], objectives: Sequence[str], points: int = 20) -> dict[int, float]:
    """Hypervolume by how many trials there were, at the ends of at most ``points`` batches.

    The share of the box between the worst and the best of all ``trials`` that the front dominates, so that
    it can only grow.
    """
    whole, so_far = Archive(objectives), Archive(objectives)
    whole.add(trials)
    batches = [trial.batch for trial in trials] + [-1]
    ends = [i for i in range(1, len(batches)) if batches[i] != batches[i - 1]]
    found: dict[int, float] = {}
    volume = 0.0
    for end in ends[:: -max(1, math.ceil(len(ends) / points))][::-1]:
        so_far.add(trials[so_far.seen : end])
        # A point more splits a part in two, whose sum may round to a last place less.
        found[end] = volume = max(
            volume, hypervolume(whole.scaled(so_far.front), np.zeros(len(so_far.objectives)))
        )
    return found


def scale(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Points as fractions of the way from ``low`` to ``high``; 1 where the two are the same."""
    span = high - low
    return np.asarray(np.where(span > 0, (points - low) / np.where(span > 0, span, 1.0), 1.0))


def _signs(objectives: Sequence[str]) -> np.ndarray:
    return np.array([1.0 if name in MAXIMISED else -1.0 for name in objectives])


def _added_area(front: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """How much area a point adds to ``front`` [members, 2] above 0; a little below 0 where dominated."""
    front = front[pareto_front(front)]
    front = front[np.argsort(front[:, 0])]
    edges = [0.0, *front[:, 0], math.inf]
    heights = [*front[:, 1], 0.0]

    def added(points: np.ndarray) -> np.ndarray:
        x, y = points[..., 0], points[..., 1]
        area, behind = np.zeros(x.shape), np.zeros(x.shape)
        for left, right, height in zip(edges, edges[1:], heights, strict=False):
            area += (np.minimum(x, right) - left).clip(min=0.0) * (y - height).clip(min=0.0)
        for one, other in front:
            np.maximum(behind, np.minimum(one - x, other - y), out=behind)
        return np.asarray(area - 1e-3 * behind)

    return added


def _added_along(front: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The same in any number of dimensions, up to a factor: a mean over directions ``weights``."""
    power = front.shape[1]
    best = _achievement(front, weights).max(axis=0)

    def added(points: np.ndarray) -> np.ndarray:
        reached = _achievement(points, weights)
        more = np.maximum(reached, best) ** power - best**power
        return np.asarray((more + 1e-3 * np.minimum(reached - best, 0.0)).mean(axis=-1))

    return added


def _achievement(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Min over objectives of point / weight: float [..., objectives] -> [..., directions]."""
    reached = points[..., None, 0] / weights[:, 0]
    for j in range(1, weights.shape[1]):
        reached = np.minimum(reached, points[..., None, j] / weights[:, j])
    return np.asarray(reached)


def _batch_after(before: Sequence[Trial]) -> int:
    return before[-1].batch + 1 if before else 0


def _add(costs: _Moments, accuracies: _Moments, measurement: Measurement, cost: str) -> None:
    costs.add(math.log(max(_number(measurement, cost), 1e-30)))
    accuracies.add(_number(measurement, "accuracy"))


def _number(measurement: Measurement, name: str) -> float:
    value = measurement.value(name)
    if value is None:
        raise ConfigError(
            f"the reward needs {name!r}, which the evaluator did not measure; "
            "choose another reward, or an evaluator or meter that measures it"
        )
    return value


def _checked(objectives: Sequence[str]) -> tuple[str, ...]:
    if len(set(objectives)) < 2 or len(set(objectives)) < len(objectives):
        raise ConfigError(f"objectives {', '.join(objectives) or 'none'}: name at least two, each once")
    return tuple(objectives)
