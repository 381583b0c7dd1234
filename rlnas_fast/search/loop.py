"""The one loop: ask, evaluate, reward, remember, tell."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError, ReplayMismatch
from .protocols import (
    CostModel,
    Evaluator,
    Executor,
    MeasurementCache,
    Request,
    Reward,
    SearchContext,
    Strategy,
    TrialLog,
)
from .space import Architecture, SearchSpace, validate
from .trial import Budget, Measurement, Trial, child_seed, measurement_key


@dataclass(frozen=True)
class SearchResult:
    """What a search ended with.

    Attributes:
        trials: all of them, in order.
        stopped: why it ended: "trials" (all done), "space" (nothing left to propose) or "seconds".
    """

    trials: tuple[Trial, ...]
    stopped: str

    @property
    def best(self) -> Trial | None:
        """The trial with the highest reward among those that did not fail; the earlier of equals."""
        done = [trial for trial in self.trials if trial.state == "complete"]
        return max(done, key=lambda trial: trial.reward, default=None)


def run_search(
    *,
    space: SearchSpace,
    strategy: Strategy,
    evaluator: Evaluator,
    reward: Reward,
    executor: Executor,
    log: TrialLog,
    trials: int,
    batch_size: int,
    budget: Budget,
    seed: int,
    cache: MeasurementCache | None = None,
    context: SearchContext = SearchContext(),  # noqa: B008 - frozen
    limits: Mapping[str, float] = {},
    max_seconds: float | None = None,
    replay: bool = True,
    on_measured: Callable[[int, Measurement, float], None] = lambda position, measurement, seconds: None,
    on_trials: Callable[[Sequence[Trial]], None] = lambda trials: None,
) -> SearchResult:
    """Searches until ``trials`` trials are in the log, and goes on where the log ends.

    Args:
        batch_size: how many children are asked at a time; of an asynchronous strategy, how many are in
            flight: it is told each one as it finishes, and asked for one more.
        limits: hard limits by name; a child that the context's cost model puts above one, by more than
            the model's error, fails without being trained.
        replay: True asks the seeded strategy again for every batch of the log and requires the same
            answer, so that a resumed search equals one that was never interrupted.  False only tells it
            the old trials.
        max_seconds: no new batch starts after this many seconds of evaluations, the log's included.
        on_measured: called as each child of a batch is done, in the order they finish.
        on_trials: called with each batch that is in the log and told.
    Raises:
        ReplayMismatch: the strategy proposed something else than the log says.
    """
    search = _Search(
        space, strategy, evaluator, reward, executor, log, trials, batch_size, budget, seed, cache, context,
        limits, max_seconds, replay, on_measured, on_trials, evaluator.identity(),
    )  # fmt: skip
    if getattr(strategy, "asynchronous", False):
        return _run_asynchronously(search)
    done = log.read()
    _replay(search, done)
    batch_number = done[-1].batch + 1 if done else 0
    spent = sum(trial.seconds for trial in done)
    started = time.monotonic()
    while len(done) < trials:
        if max_seconds is not None and spent + time.monotonic() - started >= max_seconds:
            return SearchResult(tuple(done), "seconds")
        asked = strategy.ask(min(batch_size, trials - len(done)), search.conditioned(done))
        if not asked:
            return SearchResult(tuple(done), "space")
        children = [search.prepare(architecture, batch_number) for architecture in asked]
        measured = _evaluate(search, children)
        rewards = _rewards([m for m, _, _ in measured], done, reward)
        batch = [
            child.trial(len(done) + i, measurement, value, seconds, cached)
            for i, (child, value, (measurement, seconds, cached)) in enumerate(
                zip(children, rewards, measured, strict=True)
            )
        ]
        log.append(batch)
        strategy.tell(batch)
        done.extend(batch)
        batch_number += 1
        on_trials(batch)
    return SearchResult(tuple(done), "trials")


@dataclass(frozen=True, eq=False)
class _Search:
    """What ``run_search`` was given, and the evaluator's identity."""

    space: SearchSpace
    strategy: Strategy
    evaluator: Evaluator
    reward: Reward
    executor: Executor
    log: TrialLog
    trials: int
    batch_size: int
    budget: Budget
    seed: int
    cache: MeasurementCache | None
    context: SearchContext
    limits: Mapping[str, float]
    max_seconds: float | None
    replay: bool
    on_measured: Callable[[int, Measurement, float], None]
    on_trials: Callable[[Sequence[Trial]], None]
    identity: Mapping[str, str]

    def prepare(self, architecture: Architecture, batch: int) -> _Child:
        """The child to evaluate.

        Raises:
            ConfigError: the space has no such architecture.
        """
        validate(self.space, architecture)
        key = self.space.canonical_key(architecture)
        request = Request(architecture, self.budget, child_seed(self.seed, key))
        stored = measurement_key(self.identity, key, self.budget, request.seed)
        hopeless = _hopeless(architecture.choices, self.context.cost_model, self.limits)
        return _Child(batch, architecture, key, request, stored, hopeless)

    def conditioned(self, before: Sequence[Trial]) -> SearchContext:
        """What the strategy may see: with the target and the goal of a reward that has them."""
        condition = getattr(self.reward, "conditioned", None)
        return condition(self.context, before) if condition is not None else self.context


@dataclass(frozen=True, eq=False)
class _Child:
    """An architecture that was asked.

    Attributes:
        stored: its measurement's key in the cache.
        hopeless: why it need not be evaluated, or None.
    """

    batch: int
    architecture: Architecture
    key: str
    request: Request
    stored: str
    hopeless: Measurement | None

    def trial(
        self, number: int, measurement: Measurement, reward: float, seconds: float, cached: bool
    ) -> Trial:
        return Trial(number, self.batch, self.architecture, self.key, measurement, reward, seconds, cached)


def _evaluate(search: _Search, children: Sequence[_Child]) -> list[tuple[Measurement, float, bool]]:
    """(measurement, seconds, cached) of each child; what was measured before is not measured again."""
    cache, on_measured = search.cache, search.on_measured
    requests, stored = [child.request for child in children], [child.stored for child in children]
    results: dict[int, tuple[Measurement, float, bool]] = {}
    first: dict[str, int] = {}
    for position, key in enumerate(stored):
        skipped = children[position].hopeless
        known = skipped or (None if cache is None else cache.get(key))
        if known is not None:
            results[position] = (known, 0.0, skipped is None)
            on_measured(position, known, 0.0)
        else:
            first.setdefault(key, position)
    fresh = list(first.values())
    waiting = [requests[position] for position in fresh]
    for index, measurement, seconds in search.executor.run(search.evaluator, waiting):
        position = fresh[index]
        results[position] = (measurement, seconds, False)
        if cache is not None and not measurement.transient:
            cache.put(stored[position], measurement)
        on_measured(position, measurement, seconds)
    for position, key in enumerate(stored):
        if position not in results:  # asked twice in one batch: measured once
            results[position] = (results[first[key]][0], 0.0, True)
    return [results[position] for position in range(len(requests))]


def _hopeless(
    choices: tuple[int, ...], cost_model: CostModel | None, limits: Mapping[str, float]
) -> Measurement | None:
    """The failure of a child whose estimated cost is above a limit by more than the estimate may be off."""
    errors: Mapping[str, float] = getattr(cost_model, "errors", {})
    bounded = [name for name in limits if name in errors]
    if cost_model is None or not bounded:
        return None
    estimate = cost_model.estimate(choices)
    for name in bounded:
        if estimate[name] > limits[name] * (1 + errors[name]):
            return Measurement(
                failure=f"not trained: its {name} is estimated at {estimate[name]:.4g} "
                f"(+- {errors[name]:.0%}), the limit is {limits[name]:.4g}"
            )
    return None


def _rewards(batch: Sequence[Measurement], before: Sequence[Trial], reward: Reward) -> list[float]:
    values = iter(reward([m for m in batch if m.failure is None], before))
    rewards = [next(values) if m.failure is None else reward.floor for m in batch]
    for value, measurement in zip(rewards, batch, strict=True):
        if not math.isfinite(value):
            raise ConfigError(f"the reward answered {value} for {measurement}; it must be a finite number")
    return rewards


def _run_asynchronously(search: _Search) -> SearchResult:
    """Keeps ``batch_size`` children in flight: whenever one is told, one more is asked.

    Batch 0 is the first ``batch_size`` children; every later child is a batch of its own.  Trials are
    numbered as they finish.  That order decides all that is asked, so replay asks and tells in the order
    of the log; what was in flight when it ended is evaluated again.
    """
    strategy, cache, trials = search.strategy, search.cache, search.trials
    old = search.log.read()
    done: list[Trial] = []
    flight: list[_Child] = []
    running: list[_Child] = []
    requests: list[Request] = []
    ready: deque[tuple[_Child, Measurement]] = deque()
    batch = 0 if search.replay else 1 + max((trial.batch for trial in old), default=-1)

    def ask(count: int) -> list[_Child]:
        nonlocal batch
        count = min(count, max(trials, len(old)) - len(done) - len(flight))
        seen = search.conditioned(done)
        asked = [search.prepare(a, batch) for a in strategy.ask(count, seen)] if count > 0 else []
        flight.extend(asked)
        batch += 1
        return asked

    def tell(trial: Trial) -> None:
        strategy.tell([trial])
        done.append(trial)

    def start(child: _Child) -> None:
        known = child.hopeless or (None if cache is None else cache.get(child.stored))
        if known is None:
            running.append(child)
            requests.append(child.request)
        else:
            ready.append((child, known))

    def out_of_time() -> bool:
        elapsed = spent + time.monotonic() - started
        return search.max_seconds is not None and elapsed >= search.max_seconds

    def finish(child: _Child, measurement: Measurement, seconds: float, cached: bool) -> None:
        search.on_measured(0, measurement, seconds)
        flight.remove(child)
        (value,) = _rewards([measurement], done, search.reward)
        trial = child.trial(len(done), measurement, value, seconds, cached and child.hopeless is None)
        search.log.append([trial])
        tell(trial)
        search.on_trials([trial])
        for another in () if out_of_time() else ask(1):
            start(another)

    if search.replay:
        ask(search.batch_size)
    for trial in old:
        if search.replay:
            _take_from(flight, trial)
            (value,) = _rewards([trial.measurement], done, search.reward)
            _same(trial, "reward", trial.reward, value)
            tell(trial)
            ask(1)
        else:
            search.prepare(trial.architecture, trial.batch)
            tell(trial)
    spent, started = sum(trial.seconds for trial in old), time.monotonic()
    if len(done) >= trials or out_of_time():
        return SearchResult(tuple(done), "trials" if len(done) >= trials else "seconds")
    if not search.replay:
        ask(search.batch_size)
    for child in flight:
        start(child)
    while flight:
        while ready:
            finish(*ready.popleft(), 0.0, True)
        running[:] = flight
        requests[:] = [child.request for child in flight]
        for position, measurement, seconds in search.executor.run(search.evaluator, requests):
            child = running[position]
            if cache is not None and not measurement.transient:
                cache.put(child.stored, measurement)
            finish(child, measurement, seconds, False)
            while ready:
                finish(*ready.popleft(), 0.0, True)
    stopped = "trials" if len(done) >= trials else "seconds" if out_of_time() else "space"
    return SearchResult(tuple(done), stopped)


def _take_from(flight: list[_Child], trial: Trial) -> None:
    """Removes the child that became ``trial``, which must be among those asked."""
    asked = [child for child in flight if child.batch == trial.batch]
    for child in asked:
        if child.architecture == trial.architecture:
            flight.remove(child)
            return
    now = " or ".join(str(child.architecture) for child in asked) or "nothing"
    _same(trial, "architecture", trial.architecture, now)


def _replay(search: _Search, done: Sequence[Trial]) -> None:
    """Brings a fresh strategy to where the log ends, batch by batch."""
    start = 0
    while start < len(done):
        end = start
        while end < len(done) and done[end].batch == done[start].batch:
            end += 1
        batch = done[start:end]
        if search.replay:
            asked = search.strategy.ask(len(batch), search.conditioned(done[:start]))
            again = _rewards([trial.measurement for trial in batch], done[:start], search.reward)
            for trial, architecture, value in zip(batch, asked, again, strict=False):
                _same(trial, "architecture", trial.architecture, architecture)
                _same(trial, "reward", trial.reward, value)
            _same(batch[-1], "batch size", len(batch), len(asked))
        else:
            for trial in batch:
                validate(search.space, trial.architecture)
        search.strategy.tell(batch)
        start = end


def _same(trial: Trial, what: str, logged: object, now: object) -> None:
    if logged != now:
        raise ReplayMismatch(
            f"trial {trial.number}: the log has {what} {logged}, the same search now gives {now}; "
            "use the versions and settings the run was started with, or --continue-from-log"
        )
