"""The interfaces of a search.  Anything with these methods can take part; nothing inherits from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .space import Architecture
from .trial import Budget, Cost, Measurement, Trial


@runtime_checkable
class CostModel(Protocol):
    """Estimates what an architecture will cost from its first decisions.

    One that also has ``errors`` (by name, how far off an estimate may be, relative) lets a search leave out
    children that cannot keep a hard limit.
    """

    def estimate(self, prefix: tuple[int, ...]) -> Mapping[str, float]:
        """Cost so far by name ("latency_s", "parameters", ...) of the decisions in ``prefix``."""
        ...


@dataclass(frozen=True)
class Goal:
    """What is wanted of the numbers of a measurement, at this moment of a search.

    Attributes:
        numbers: names of the numbers it is made of (``Measurement.value``).
        score: float [..., numbers] -> float [...], larger is better.
        reached: the score that is to be exceeded; None for that of the best trial so far.
        after: the goal once numbers, float [numbers], were seen that are now only expected; None where
            they change nothing.
    """

    numbers: tuple[str, ...]
    score: Callable[[np.ndarray], np.ndarray]
    reached: float | None = None
    after: Callable[[np.ndarray], Goal] | None = None


@dataclass(frozen=True)
class SearchContext:
    """What a conditioned controller may see while it decides.

    Attributes:
        targets: wanted cost by name, in the unit of the name ("latency_s").
        cost_model: estimates the cost of a prefix, or None.
        goal: for strategies that predict the numbers of a measurement rather than its reward; None where
            the reward is all there is.
    """

    targets: Mapping[str, float] = field(default_factory=dict)
    cost_model: CostModel | None = None
    goal: Goal | None = None


@runtime_checkable
class Strategy(Protocol):
    """Proposes architectures and learns from what became of them.  Seeded; knows no network, no device.

    One that heeds ``SearchContext.targets`` or ``goal`` says so with ``conditioned = True``.
    One with an attribute ``asynchronous`` that is true is told each trial as it finishes, and asked for
    one more.
    """

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """At most ``count`` architectures; fewer only when the space has no more to propose."""
        ...

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learns from ``trials``, in order.  They need not have been asked from this strategy."""
        ...


@dataclass(frozen=True)
class Request:
    """One child to evaluate.  Carries all that its result may depend on beside the evaluator."""

    architecture: Architecture
    budget: Budget
    seed: int


@runtime_checkable
class Evaluator(Protocol):
    """Turns an architecture into a measurement.  Can be pickled, for spawned workers."""

    def identity(self) -> Mapping[str, str]:
        """What its measurements depend on: space, task and data hash, recipe, dtype, device, versions."""
        ...

    def evaluate(self, request: Request) -> Measurement:
        """Trains, looks up or predicts.  A child that fails is a measurement with its ``failure`` set."""
        ...


@runtime_checkable
class Meter(Protocol):
    """Measures what a call costs on a device."""

    def measure(self, call: Callable[[], Any]) -> Cost: ...


@runtime_checkable
class Reward(Protocol):
    """Turns measurements into the numbers a strategy is told: a pure function, so that replay repeats it.

    One whose aim changes also has ``conditioned(context, before) -> SearchContext``: the context of the next
    batch, with its target and goal.

    Attributes:
        floor: the reward of a failed child.
        needs: names of the numbers a measurement must have (``Measurement.value``).
    """

    @property
    def floor(self) -> float: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    def __call__(self, batch: Sequence[Measurement], before: Sequence[Trial]) -> list[float]:
        """One number for each measurement of ``batch`` (none failed), given all earlier trials in order."""
        ...


@runtime_checkable
class Executor(Protocol):
    """Runs evaluations, one after the other or side by side."""

    def run(
        self, evaluator: Evaluator, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Measurement, float]]:
        """Yields (position in ``requests``, measurement, seconds) for each, as they finish.

        ``requests`` may be a list that has grown by the time the next result is wanted; what was appended
        is run, too.
        """
        ...


@runtime_checkable
class TrialLog(Protocol):
    """Durable, append-only memory of one search."""

    def read(self) -> list[Trial]:
        """Every trial appended so far, in order."""
        ...

    def append(self, trials: Sequence[Trial]) -> None:
        """Adds one batch: all of it or, if the process dies, none of it."""
        ...


@runtime_checkable
class MeasurementCache(Protocol):
    """Durable memory of measurements under ``measurement_key``.  Safe for several processes."""

    def get(self, key: str) -> Measurement | None: ...

    def put(self, key: str, measurement: Measurement) -> None: ...
