"""The one loop: ask, evaluate, reward, remember, tell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConfigError, ReplayMismatch
from .protocols import (
    Evaluator,
    Executor,
    MeasurementCache,
    Request,
    Reward,
    SearchContext,
    Strategy,
    TrialLog,
)
from .space import SearchSpace, validate
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
    max_seconds: float | None = None,
    replay: bool = True,
    on_measured: Callable[[int, Measurement, float], None] = lambda position, measurement, seconds: None,
    on_trials: Callable[[Sequence[Trial]], None] = lambda trials: None,
) -> SearchResult:
    """Searches until ``trials`` trials are in the log, and goes on where the log ends.

    Args:
        replay: True asks the seeded strategy again for every batch of the log and requires the same
            answer, so that a resumed search equals one that was never interrupted.  False only tells it
            the old trials.
        max_seconds: no new batch starts after this many seconds of evaluations, the log's included.
        on_measured: called as each child of a batch is done, in the order they finish.
        on_trials: called with each batch that is in the log and told.
    Raises:
        ReplayMismatch: the strategy proposed something else than the log says.
    """
    done = log.read()
    _replay(done, space, strategy, reward, context, replay)
    identity = evaluator.identity()
    batch_number = done[-1].batch + 1 if done else 0
    spent = sum(trial.seconds for trial in done)
    started = time.monotonic()
    while len(done) < trials:
        if max_seconds is not None and spent + time.monotonic() - started >= max_seconds:
            return SearchResult(tuple(done), "seconds")
        asked = strategy.ask(min(batch_size, trials - len(done)), _conditioned(context, reward, done))
        if not asked:
            return SearchResult(tuple(done), "space")
        keys = []
        for architecture in asked:
            validate(space, architecture)
            keys.append(space.canonical_key(architecture))
        requests = [Request(a, budget, child_seed(seed, key)) for a, key in zip(asked, keys, strict=True)]
        stored = [
            measurement_key(identity, key, budget, r.seed) for key, r in zip(keys, requests, strict=True)
        ]
        measured = _evaluate(evaluator, executor, requests, stored, cache, on_measured)
        rewards = _rewards([m for m, _, _ in measured], done, reward)
        batch = [
            Trial(len(done) + i, batch_number, asked[i], keys[i], measurement, rewards[i], seconds, cached)
            for i, (measurement, seconds, cached) in enumerate(measured)
        ]
        log.append(batch)
        strategy.tell(batch)
        done.extend(batch)
        batch_number += 1
        on_trials(batch)
    return SearchResult(tuple(done), "trials")


def _evaluate(
    evaluator: Evaluator,
    executor: Executor,
    requests: Sequence[Request],
    stored: Sequence[str],
    cache: MeasurementCache | None,
    on_measured: Callable[[int, Measurement, float], None],
) -> list[tuple[Measurement, float, bool]]:
    """(measurement, seconds, cached) of each request; what was measured before is not measured again."""
    results: dict[int, tuple[Measurement, float, bool]] = {}
    first: dict[str, int] = {}
    for position, key in enumerate(stored):
        known = None if cache is None else cache.get(key)
        if known is not None:
            results[position] = (known, 0.0, True)
            on_measured(position, known, 0.0)
        else:
            first.setdefault(key, position)
    fresh = list(first.values())
    for index, measurement, seconds in executor.run(evaluator, [requests[position] for position in fresh]):
        position = fresh[index]
        results[position] = (measurement, seconds, False)
        if cache is not None and not measurement.transient:
            cache.put(stored[position], measurement)
        on_measured(position, measurement, seconds)
    for position, key in enumerate(stored):
        if position not in results:  # asked twice in one batch: measured once
            results[position] = (results[first[key]][0], 0.0, True)
    return [results[position] for position in range(len(requests))]


def _conditioned(context: SearchContext, reward: Reward, before: Sequence[Trial]) -> SearchContext:
    """What the strategy may see: with the target and the goal of a reward that has them."""
    condition = getattr(reward, "conditioned", None)
    return condition(context, before) if condition is not None else context


def _rewards(batch: Sequence[Measurement], before: Sequence[Trial], reward: Reward) -> list[float]:
    values = iter(reward([m for m in batch if m.failure is None], before))
    rewards = [next(values) if m.failure is None else reward.floor for m in batch]
    for value, measurement in zip(rewards, batch, strict=True):
        if not math.isfinite(value):
            raise ConfigError(f"the reward answered {value} for {measurement}; it must be a finite number")
    return rewards


def _replay(
    done: Sequence[Trial],
    space: SearchSpace,
    strategy: Strategy,
    reward: Reward,
    context: SearchContext,
    exactly: bool,
) -> None:
    """Brings a fresh strategy to where the log ends, batch by batch."""
    start = 0
    while start < len(done):
        end = start
        while end < len(done) and done[end].batch == done[start].batch:
            end += 1
        batch = done[start:end]
        if exactly:
            asked = strategy.ask(len(batch), _conditioned(context, reward, done[:start]))
            again = _rewards([trial.measurement for trial in batch], done[:start], reward)
            for trial, architecture, value in zip(batch, asked, again, strict=False):
                _same(trial, "architecture", trial.architecture, architecture)
                _same(trial, "reward", trial.reward, value)
            _same(batch[-1], "batch size", len(batch), len(asked))
        else:
            for trial in batch:
                validate(space, trial.architecture)
        strategy.tell(batch)
        start = end


def _same(trial: Trial, what: str, logged: object, now: object) -> None:
    if logged != now:
        raise ReplayMismatch(
            f"trial {trial.number}: the log has {what} {logged}, the same search now gives {now}; "
            "use the versions and settings the run was started with, or --continue-from-log"
        )
