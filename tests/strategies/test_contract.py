"""What every strategy promises, on spaces small enough to exhaust."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from rlnas_fast.errors import ReplayMismatch
from rlnas_fast.search import (
    Architecture,
    Budget,
    Evaluator,
    Measurement,
    Request,
    SearchContext,
    SearchResult,
    SearchSpace,
    Strategy,
    Trial,
    run_search,
    sample_uniform,
    validate,
)
from rlnas_fast.search.rewards import accuracy
from rlnas_fast.strategies.a3c import A3C
from rlnas_fast.strategies.bandit import Bandit
from rlnas_fast.strategies.bandit_exploration import BanditExploration
from rlnas_fast.strategies.composite import Composite
from rlnas_fast.strategies.curriculum import Curriculum
from rlnas_fast.strategies.dqn import DQN
from rlnas_fast.strategies.evolution import Evolution
from rlnas_fast.strategies.local_search import LocalSearch
from rlnas_fast.strategies.model_based import ModelBased
from rlnas_fast.strategies.nsga2 import Nsga2
from rlnas_fast.strategies.ppo import PPO
from rlnas_fast.strategies.q_learning import QLearning
from rlnas_fast.strategies.random import RandomSearch
from rlnas_fast.strategies.reinforce import Reinforce
from rlnas_fast.strategies.sac import SAC
from rlnas_fast.strategies.trpo import TRPO

Make = Callable[..., Strategy]


def within(exploration: Callable[..., Strategy], make: Make, **options: Any) -> Make:
    """``make`` with the exploration around it."""

    def made(space: SearchSpace, *, seed: int, **inner: Any) -> Strategy:
        return exploration(space, lambda part: make(part, seed=seed, **inner), seed=seed, **options)

    return made


STRATEGIES: dict[str, Make] = {
    "random": RandomSearch,
    "evolution": Evolution,
    "local-search": LocalSearch,
    "local-search, 4 starts": functools.partial(LocalSearch, starts=4),
    "a3c": A3C,
    "a3c gru, no value head": functools.partial(A3C, cell="gru", value_head=False),
    "bandit, thompson": Bandit,
    "bandit, ucb": functools.partial(Bandit, rule="ucb"),
    "dqn": functools.partial(DQN, epsilon="1:0.1:10"),
    "model-based": ModelBased,
    "model-based, early": functools.partial(ModelBased, initial=2, patience=1, memory=6),
    "composite": functools.partial(Composite, initial=4, memory=12),
    "nsga2": functools.partial(Nsga2, population=4),
    "ppo": functools.partial(PPO, group=4, epsilon="0:0.3:8"),
    "ppo, value head": functools.partial(PPO, group=3, value_head=True),
    "q-learning": functools.partial(QLearning, epsilon="1:0.1:10"),
    "q-learning, history 2": functools.partial(QLearning, history=2, epsilon=0.1),
    "reinforce": Reinforce,
    "reinforce, value head": functools.partial(Reinforce, value_head=True),
    "sac": functools.partial(SAC, updates=1),
    "trpo": functools.partial(TRPO, group=4),
    "trpo gru": functools.partial(TRPO, group=3, cell="gru"),
    "curriculum, reinforce": within(Curriculum, Reinforce, open="0.3:1:9"),
    "curriculum, model-based": within(Curriculum, functools.partial(ModelBased, initial=2), open="0:1:15"),
    "curriculum, local-search": within(Curriculum, LocalSearch, open="0.5:1:12"),
    "bandit around evolution": within(BanditExploration, Evolution),
    "bandit around reinforce": within(BanditExploration, Reinforce, epsilon=0.5, rule="ucb"),
    "reinforce gru": functools.partial(Reinforce, cell="gru", epsilon="0.5:0:20", entropy_weight="1:0:9"),
}
CONTEXT = SearchContext()


@pytest.fixture(params=STRATEGIES.values(), ids=STRATEGIES.keys())
def make(request: pytest.FixtureRequest) -> Make:
    strategy: Make = request.param
    return strategy


def reward_of(architecture: Architecture) -> float:
    """Some fixed number from 0 to 1 with a little structure."""
    return float(np.mean([np.sin(3 * i + choice) ** 2 for i, choice in enumerate(architecture.choices)]))


def trial_of(space: SearchSpace, architecture: Architecture, number: int = 0, failed: bool = False) -> Trial:
    measurement = Measurement(failure="out of memory") if failed else Measurement(accuracy=0.5)
    key = space.canonical_key(architecture)
    return Trial(number, 0, architecture, key, measurement, 0.0 if failed else reward_of(architecture))


def never(number: int) -> bool:
    """No trial fails."""
    return False


def search(
    strategy: Strategy, space: SearchSpace, batches: Sequence[int], fails: Callable[[int], bool] = never
) -> list[list[Trial]]:
    """Asks and tells batches of these sizes; ``fails`` says by its number which trial fails."""
    told: list[list[Trial]] = []
    number = 0
    for size in batches:
        asked = strategy.ask(size, CONTEXT)
        assert len(asked) <= size
        batch = [trial_of(space, a, number + i, fails(number + i)) for i, a in enumerate(asked)]
        number += len(batch)
        strategy.tell(batch)
        told.append(batch)
    return told


def keys_of(batches: Sequence[Sequence[Trial]]) -> list[str]:
    return [trial.key for batch in batches for trial in batch]


def test_follows_the_protocol(make: Make, space: Any) -> None:
    assert isinstance(make(space, seed=0), Strategy)


def test_proposes_valid_architectures_once_each_until_the_space_is_exhausted(make: Make, space: Any) -> None:
    batches = search(make(space, seed=3), space, [4] * (space.count // 4 + 3))
    for batch in batches:
        for trial in batch:
            validate(space, trial.architecture)
    keys = keys_of(batches)
    assert len(keys) == len(set(keys)) == space.count
    assert batches[-1] == []


def test_one_at_a_time_exhausts_the_space_too(make: Make, space: Any) -> None:
    keys = keys_of(search(make(space, seed=4), space, [1] * (space.count + 1)))
    assert len(keys) == len(set(keys)) == space.count


def test_a_batch_larger_than_the_space_is_answered_with_the_whole_space(make: Make, space: Any) -> None:
    asked = make(space, seed=5).ask(space.count + 10, CONTEXT)
    assert len({space.canonical_key(a) for a in asked}) == len(asked) == space.count


def test_the_same_seed_gives_the_same_search_and_the_global_generators_do_not_matter(
    make: Make, space: Any
) -> None:
    first = search(make(space, seed=7), space, [3, 1, 2, 5])
    np.random.seed(1)  # noqa: NPY002 - the point of the test
    second = search(make(space, seed=7), space, [3, 1, 2, 5])
    assert first == second


def test_seeds_differ(make: Make, grid: Any) -> None:
    space = grid((5, 5, 5, 5))
    searches = {tuple(keys_of(search(make(space, seed=seed), space, [5]))) for seed in range(4)}
    assert len(searches) == 4


def test_telling_a_log_brings_a_fresh_strategy_to_the_same_place(make: Make, grid: Any) -> None:
    space = grid((4, 4, 4, 4))
    whole = search(make(space, seed=9), space, [6] * 8)
    resumed = make(space, seed=9)
    for batch in whole[:5]:
        assert resumed.ask(len(batch), CONTEXT) == [trial.architecture for trial in batch]
        resumed.tell(batch)
    for batch in whole[5:]:
        assert resumed.ask(6, CONTEXT) == [trial.architecture for trial in batch]
        resumed.tell(batch)


def test_learns_from_trials_it_never_asked_for_and_does_not_propose_them(make: Make, space: Any) -> None:
    rng = np.random.default_rng(0)
    warm = {space.canonical_key(a): a for a in (sample_uniform(space, rng) for _ in range(space.count))}
    strategy = make(space, seed=1)
    strategy.tell([trial_of(space, a, i) for i, a in enumerate(warm.values())])
    keys = keys_of(search(strategy, space, [3] * (space.count // 3 + 2)))
    assert set(keys).isdisjoint(warm)
    assert len(keys) == space.count - len(warm)


def test_told_nothing_is_nothing(make: Make, space: Any) -> None:
    strategy = make(space, seed=1)
    strategy.tell([])
    assert strategy.ask(1, CONTEXT)


def test_survives_failed_trials(make: Make, space: Any) -> None:
    def often(number: int) -> bool:
        return number % 3 != 0

    def always(number: int) -> bool:
        return True

    for fails in (often, always):
        keys = keys_of(search(make(space, seed=2), space, [2] * (space.count // 2 + 1), fails))
        assert len(keys) == space.count


def test_rewards_that_are_all_equal_or_huge_do_no_harm(make: Make, grid: Any) -> None:
    space = grid((4, 4, 4))
    for scale in (0.0, 1e9, -1e9):
        strategy = make(space, seed=2)
        for _ in range(8):
            asked = strategy.ask(4, CONTEXT)
            assert len(asked) == 4
            strategy.tell(
                [
                    Trial(0, 0, a, space.canonical_key(a), Measurement(accuracy=0.5), scale * reward_of(a))
                    for a in asked
                ]
            )


def test_proposes_again_what_it_has_proposed_if_that_is_allowed(make: Make, space: Any) -> None:
    keys = keys_of(search(make(space, seed=0, allow_repeats=True), space, [5] * 8))
    assert len(keys) == 40


def test_several_batches_may_be_asked_before_any_is_told(make: Make, grid: Any) -> None:
    space = grid((4, 4, 4))
    strategy = make(space, seed=11)
    asked = [strategy.ask(4, CONTEXT) for _ in range(3)]
    for batch in reversed(asked):
        strategy.tell([trial_of(space, a) for a in batch])
    later = strategy.ask(4, CONTEXT)
    everything = [space.canonical_key(a) for batch in (*asked, later) for a in batch]
    assert len(set(everything)) == 16


ASYNCHRONOUS = {name: make for name, make in STRATEGIES.items() if name.startswith("a3c")}
SYNCHRONOUS = {name: make for name, make in STRATEGIES.items() if name not in ASYNCHRONOUS}


class Looked:
    """Accuracy from the choices; keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def identity(self) -> Mapping[str, str]:
        return {"space": "grid"}

    def evaluate(self, request: Request) -> Measurement:
        self.requests.append(request)
        return Measurement(accuracy=reward_of(request.architecture))


class AnyOrder:
    """Finishes what waits in an order of its own: drawn, or that in which ``choices`` are listed."""

    def __init__(self, seed: int, choices: Sequence[tuple[int, ...]] = ()) -> None:
        self._rng = np.random.default_rng(seed)
        self._rank = {choice: rank for rank, choice in enumerate(choices)}

    def run(
        self, evaluator: Evaluator, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Measurement, float]]:
        left: set[int] = set()
        taken = 0
        while True:
            left |= set(range(taken, len(requests)))
            taken = len(requests)
            if not left:
                return
            drawn = self._rng.permutation(sorted(left)).tolist()
            position = min(drawn, key=lambda p: self._rank.get(requests[p].architecture.choices, 10**6))
            left.remove(position)
            yield position, evaluator.evaluate(requests[position]), 0.25


class InOrder:
    """Finishes what waits in the order asked."""

    def run(
        self, evaluator: Evaluator, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Measurement, float]]:
        for position, request in enumerate(requests):
            yield position, evaluator.evaluate(request), 0.25


class Memory:
    """A log in memory."""

    def __init__(self, trials: Sequence[Trial] = ()) -> None:
        self.trials = list(trials)

    def read(self) -> list[Trial]:
        return list(self.trials)

    def append(self, trials: Sequence[Trial]) -> None:
        self.trials += trials


def whole_search(make: Callable[..., Strategy], space: Any, executor: Any, **changes: Any) -> SearchResult:
    """30 trials, 8 at a time."""
    parts: dict[str, Any] = {
        "space": space,
        "strategy": make(space, seed=5),
        "evaluator": Looked(),
        "reward": accuracy(),
        "executor": executor,
        "log": Memory(),
        "trials": 30,
        "batch_size": 8,
        "budget": Budget(epochs=1),
        "seed": 0,
    }
    return run_search(**{**parts, **changes})


@pytest.mark.parametrize("make", SYNCHRONOUS.values(), ids=SYNCHRONOUS.keys())
def test_in_parallel_and_resumed_it_is_the_search_that_it_is_alone(make: Any, grid: Any) -> None:
    space = grid((4, 3, 4))
    alone = whole_search(make, space, InOrder()).trials
    assert len(alone) == 30
    assert whole_search(make, space, AnyOrder(1)).trials == alone
    assert whole_search(make, space, AnyOrder(2), log=Memory(alone[:16])).trials == alone


@pytest.mark.parametrize("make", ASYNCHRONOUS.values(), ids=ASYNCHRONOUS.keys())
def test_replaying_the_log_of_eight_workers_gives_the_same_trials(make: Any, grid: Any) -> None:
    space = grid((4, 3, 4))
    whole = whole_search(make, space, AnyOrder(3)).trials
    assert len({trial.key for trial in whole}) == 30
    assert [trial.number for trial in whole] == list(range(30))
    assert [trial.batch for trial in whole] != sorted(trial.batch for trial in whole)  # events overtook
    evaluator = Looked()
    assert whole_search(make, space, InOrder(), evaluator=evaluator, log=Memory(whole)).trials == whole
    assert evaluator.requests == []
    order = [trial.architecture.choices for trial in whole]
    for cut in (0, 1, 5, 8, 19, 29):
        evaluator = Looked()
        resumed = whole_search(
            make, space, AnyOrder(4, order), evaluator=evaluator, log=Memory(whole[:cut])
        ).trials
        assert resumed == whole  # the same children finish in the same order: the same search
        assert len(evaluator.requests) == 30 - cut
        other = whole_search(make, space, AnyOrder(5), log=Memory(whole[:cut])).trials
        assert other[:cut] == whole[:cut]
        flying = {t.key for t in whole[cut:] if t.batch <= cut} if cut <= 22 else set()
        assert flying <= {trial.key for trial in other[cut:]}  # in flight at the cut: evaluated again


@pytest.mark.parametrize("make", ASYNCHRONOUS.values(), ids=ASYNCHRONOUS.keys())
def test_the_order_of_events_decides_what_is_asked(make: Any, grid: Any) -> None:
    space = grid((6, 6, 6))
    one = whole_search(make, space, AnyOrder(1)).trials
    other = whole_search(make, space, AnyOrder(2)).trials
    assert {t.key for t in one if t.batch == 0} == {t.key for t in other if t.batch == 0}
    assert {t.key for t in one} != {t.key for t in other}


def test_a_log_of_another_search_is_a_mismatch(grid: Any) -> None:
    space, make = grid((4, 3, 4)), ASYNCHRONOUS["a3c"]
    other = whole_search(make, space, AnyOrder(3), strategy=make(space, seed=6)).trials
    with pytest.raises(ReplayMismatch, match="trial 0: the log has architecture"):
        whole_search(make, space, InOrder(), log=Memory(other))
    told = whole_search(make, space, InOrder(), log=Memory(other), trials=36, replay=False).trials
    assert told[:30] == other
    assert len({trial.key for trial in told}) == 36
    assert min(trial.batch for trial in told[30:]) > max(trial.batch for trial in other)


def test_an_asynchronous_search_ends_with_its_space_its_time_and_not_before(grid: Any) -> None:
    space, make = grid((3, 2, 2)), ASYNCHRONOUS["a3c"]
    result = whole_search(make, space, AnyOrder(0))
    assert (result.stopped, len(result.trials)) == ("space", 12)
    stopped = whole_search(make, grid((6, 6)), AnyOrder(0), max_seconds=0.0)
    assert (stopped.stopped, stopped.trials) == ("seconds", ())
    longer = whole_search(make, space, AnyOrder(0), log=Memory(result.trials))
    assert longer.trials == result.trials


def test_what_the_cache_holds_is_told_at_once_and_not_measured_again(grid: Any) -> None:
    class Cache(dict[str, Measurement]):
        def put(self, key: str, measurement: Measurement) -> None:
            self[key] = measurement

    space, make, cache = grid((4, 3, 4)), ASYNCHRONOUS["a3c"], Cache()
    evaluator = Looked()
    whole_search(make, space, AnyOrder(1), cache=cache, evaluator=evaluator)
    assert len(evaluator.requests) == 30
    again = Looked()
    trials = whole_search(make, space, AnyOrder(1), cache=cache, evaluator=again).trials
    assert len(trials) == 30
    assert sum(trial.cached for trial in trials) == 30 - len(again.requests) >= 8


def test_an_executor_that_does_not_look_again_only_costs_time(grid: Any) -> None:
    class Fixed:
        def run(
            self, evaluator: Any, requests: Sequence[Request]
        ) -> Iterator[tuple[int, Measurement, float]]:
            for position, request in enumerate(list(requests)):
                yield position, evaluator.evaluate(request), 0.0

    trials = whole_search(ASYNCHRONOUS["a3c"], grid((4, 3, 4)), Fixed()).trials
    assert len({trial.key for trial in trials}) == 30
