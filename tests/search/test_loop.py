"""The one loop: it remembers before it tells, resumes by replay, and measures nothing twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlnas_fast.errors import ConfigError, ReplayMismatch
from rlnas_fast.search import (
    Architecture,
    Budget,
    Cost,
    Decision,
    Evaluator,
    Measurement,
    Request,
    SearchContext,
    Trial,
    run_search,
)
from rlnas_fast.search.rewards import PointwiseReward, accuracy, soft
from rlnas_fast.strategies.random import RandomSearch


@dataclass(frozen=True)
class Squares:
    """Two decisions of five choices; their order does not matter."""

    name: str = "squares"
    decisions: tuple[Decision, ...] = (Decision("a", tuple("01234")), Decision("b", tuple("01234")))

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        return np.ones(5, dtype=bool)

    def is_complete(self, prefix: tuple[int, ...]) -> bool:
        return len(prefix) == 2

    def canonical_key(self, architecture: Architecture) -> str:
        return str(sorted(architecture.choices))

    def describe(self, architecture: Architecture) -> str:
        return str(architecture.choices)


@dataclass
class Counting:
    """Accuracy from the choices and the seed; keeps what it was asked.  A sum in ``failing`` fails."""

    failing: tuple[int, ...] = ()
    transient: bool = False
    requests: list[Request] = field(default_factory=list)

    def identity(self) -> Mapping[str, str]:
        return {"space": "squares"}

    def evaluate(self, request: Request) -> Measurement:
        self.requests.append(request)
        total = sum(request.architecture.choices)
        if total in self.failing:
            return Measurement(failure="NaN", transient=self.transient)
        return Measurement(
            accuracy=total / 10 + request.seed % 97 * 1e-5, cost=Cost(latency_s=0.001 * (1 + total))
        )


class Backwards:
    """Finishes a batch last first."""

    def run(
        self, evaluator: Evaluator, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Measurement, float]]:
        for position in reversed(range(len(requests))):
            yield position, evaluator.evaluate(requests[position]), 0.5


class Memory:
    """A log in memory."""

    def __init__(self, trials: Sequence[Trial] = ()) -> None:
        self.trials = list(trials)
        self.batches = 0

    def read(self) -> list[Trial]:
        return list(self.trials)

    def append(self, trials: Sequence[Trial]) -> None:
        self.trials += trials
        self.batches += 1


class Cache(dict[str, Measurement]):
    """A cache in memory."""

    def put(self, key: str, measurement: Measurement) -> None:
        self[key] = measurement


def search(log: Memory | None = None, **changes: Any) -> Any:
    """A search of 12 trials in batches of 4, with whatever is changed."""
    space = Squares()
    parts: dict[str, Any] = {
        "space": space,
        "strategy": RandomSearch(space, seed=5),
        "evaluator": Counting(),
        "reward": accuracy(),
        "executor": Backwards(),
        "log": log if log is not None else Memory(),
        "trials": 12,
        "batch_size": 4,
        "budget": Budget(epochs=1),
        "seed": 0,
    }
    return run_search(**{**parts, **changes})


def test_numbers_orders_and_rewards_trials() -> None:
    result = search()
    assert result.stopped == "trials"
    assert [trial.number for trial in result.trials] == list(range(12))
    assert [trial.batch for trial in result.trials] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(trial.reward == trial.measurement.accuracy for trial in result.trials)
    assert all(trial.seconds == 0.5 and not trial.cached for trial in result.trials)
    assert result.best.reward == max(trial.reward for trial in result.trials)


@given(
    seed=st.integers(0, 50),
    batch_size=st.integers(1, 7),
    cut=st.integers(0, 12),
    failing=st.sets(st.integers(0, 8), max_size=4),
    scaled=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_search_cut_anywhere_resumes_as_if_it_had_not_been(
    seed: int, batch_size: int, cut: int, failing: set[int], scaled: bool
) -> None:
    def run(log: Memory) -> Any:
        return search(
            log,
            strategy=RandomSearch(Squares(), seed=seed),
            evaluator=Counting(failing=tuple(failing)),
            reward=soft() if scaled else accuracy(),
            batch_size=batch_size,
        )

    whole = run(Memory())
    survived = [trial for trial in whole.trials if trial.batch < cut]  # a batch is appended whole or not
    assert run(Memory(survived)).trials == whole.trials


def test_resuming_evaluates_only_what_is_missing() -> None:
    whole = search()
    evaluator = Counting()
    search(Memory(whole.trials[:8]), evaluator=evaluator)
    assert [request.architecture for request in evaluator.requests] == [
        trial.architecture for trial in reversed(whole.trials[8:])
    ]


def test_a_finished_search_only_reads() -> None:
    log = Memory(search().trials)
    evaluator = Counting()
    assert search(log, evaluator=evaluator).trials == tuple(log.trials)
    assert evaluator.requests == []
    assert log.batches == 0


@pytest.mark.parametrize("what", ["architecture", "reward", "batch size"])
def test_replay_names_the_trial_that_differs(what: str) -> None:
    trials = list(search().trials)
    if what == "architecture":
        trials[5] = replace(trials[5], architecture=trials[9].architecture)
    elif what == "reward":
        trials[5] = replace(trials[5], reward=0.123)
    else:  # all that the space has left, and one more
        trials = list(search(trials=15, batch_size=15).trials)
        trials.append(replace(trials[-1], number=15))
    with pytest.raises(ReplayMismatch, match=rf"trial {15 if what == 'batch size' else 5}: .*{what}"):
        search(Memory(trials))


def test_continuing_from_a_log_only_tells_it() -> None:
    old = search(strategy=RandomSearch(Squares(), seed=99)).trials
    with pytest.raises(ReplayMismatch):
        search(Memory(old), trials=15)
    result = search(Memory(old), trials=15, replay=False)
    assert result.trials[:12] == old
    assert len({trial.key for trial in result.trials}) == 15


def test_ends_when_the_space_has_no_more() -> None:
    result = search(trials=100)
    assert result.stopped == "space"
    assert len(result.trials) == len({trial.key for trial in result.trials}) == 15


def test_stops_starting_batches_when_the_time_is_used_up_that_of_the_log_included() -> None:
    assert search(max_seconds=0.0).stopped == "seconds"
    log = Memory(search().trials)  # 12 trials of half a second
    result = search(log, trials=15, max_seconds=5.9)
    assert (result.stopped, len(result.trials)) == ("seconds", 12)
    assert search(log, trials=15, max_seconds=60.0).stopped == "trials"


def test_the_log_comes_before_the_strategy_and_the_strategy_before_the_listener() -> None:
    events: list[str] = []

    class Log(Memory):
        def append(self, trials: Sequence[Trial]) -> None:
            events.append("log")
            super().append(trials)

    class Told(RandomSearch):
        def tell(self, trials: Sequence[Trial]) -> None:
            events.append("tell")
            super().tell(trials)

    search(
        Log(),
        strategy=Told(Squares(), seed=0),
        trials=4,
        on_measured=lambda position, measurement, seconds: events.append(f"measured {position}"),
        on_trials=lambda trials: events.append("trials"),
    )
    assert events == [*(f"measured {i}" for i in (3, 2, 1, 0)), "log", "tell", "trials"]


def test_what_was_measured_before_is_not_measured_again() -> None:
    cache, evaluator = Cache(), Counting()
    first = search(cache=cache, evaluator=evaluator)
    again = search(cache=cache, evaluator=evaluator)
    assert len(evaluator.requests) == 12
    assert all(trial.cached and trial.seconds == 0.0 for trial in again.trials)
    assert [t.reward for t in again.trials] == [t.reward for t in first.trials]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"budget": Budget(epochs=2)}, {"budget": Budget(epochs=1, seconds=9.0)}]
)
def test_another_seed_or_budget_is_another_measurement(change: dict[str, Any]) -> None:
    cache, evaluator = Cache(), Counting()
    search(cache=cache, evaluator=evaluator)
    search(cache=cache, evaluator=evaluator, **change)
    assert len(evaluator.requests) == 24


@pytest.mark.parametrize(("transient", "evaluations"), [(True, 2), (False, 1)])
def test_only_failures_that_are_the_childs_own_are_cached(transient: bool, evaluations: int) -> None:
    cache, evaluator = Cache(), Counting(failing=tuple(range(9)), transient=transient)
    for _ in range(2):
        search(cache=cache, evaluator=evaluator, trials=1)
    assert len(evaluator.requests) == evaluations


def test_the_same_network_twice_in_a_batch_is_measured_once() -> None:
    class Twice:
        def ask(self, count: int, context: SearchContext) -> list[Architecture]:
            return [Architecture("squares", choices) for choices in ((1, 2), (2, 1), (3, 3), (1, 2))]

        def tell(self, trials: Sequence[Trial]) -> None: ...

    evaluator = Counting()
    result = search(strategy=Twice(), evaluator=evaluator, trials=4)
    assert len(evaluator.requests) == 2
    assert [trial.cached for trial in result.trials] == [False, True, False, True]
    assert result.trials[0].measurement == result.trials[1].measurement == result.trials[3].measurement


def test_a_childs_seed_does_not_depend_on_when_it_is_trained() -> None:
    early, late = Counting(), Counting()
    search(evaluator=early, batch_size=4, trials=15)
    search(evaluator=late, batch_size=5, trials=15, strategy=RandomSearch(Squares(), seed=77))
    key = Squares().canonical_key

    def seeds(counting: Counting) -> dict[str, int]:
        return {key(request.architecture): request.seed for request in counting.requests}

    assert seeds(early) == seeds(late)
    assert len(set(seeds(early).values())) == 15


def test_a_failed_child_gets_the_floor_and_is_never_the_best() -> None:
    reward = PointwiseReward(lambda m: (m.accuracy or 0.0) - 5.0, needs=("accuracy",), floor=0.0)
    result = search(evaluator=Counting(failing=(3, 4, 5)), reward=reward, trials=15)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert failed
    assert all(trial.reward == 0.0 for trial in failed)
    assert result.best.state == "complete"


def test_where_every_child_failed_there_is_no_best() -> None:
    assert search(evaluator=Counting(failing=tuple(range(9)))).best is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_stops_the_search_before_the_log(value: float) -> None:
    log = Memory()
    with pytest.raises(ConfigError, match="finite"):
        search(log, reward=PointwiseReward(lambda m: value, needs=()))
    assert log.trials == []


def test_an_architecture_that_is_not_of_the_space_stops_the_search() -> None:
    class Wrong:
        def ask(self, count: int, context: SearchContext) -> list[Architecture]:
            return [Architecture("squares", (1, 7))]

        def tell(self, trials: Sequence[Trial]) -> None: ...

    with pytest.raises(ConfigError, match="choice 7"):
        search(strategy=Wrong())


def test_the_first_batch_sets_the_scale_of_a_reward_without_target() -> None:
    result = search(reward=soft(exponent=-1.0))
    scale = float(np.median([trial.measurement.cost.latency_s for trial in result.trials[:4]]))
    for trial in result.trials:
        latency_s, right = trial.measurement.cost.latency_s, trial.measurement.accuracy
        assert trial.reward == pytest.approx(right / max(latency_s / scale, 1.0))
