"""What every strategy promises, on spaces small enough to exhaust."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from rlnas_fast.search import (
    Architecture,
    Measurement,
    SearchContext,
    SearchSpace,
    Strategy,
    Trial,
    sample_uniform,
    validate,
)
from rlnas_fast.strategies.composite import Composite
from rlnas_fast.strategies.evolution import Evolution
from rlnas_fast.strategies.local_search import LocalSearch
from rlnas_fast.strategies.model_based import ModelBased
from rlnas_fast.strategies.nsga2 import Nsga2
from rlnas_fast.strategies.ppo import PPO
from rlnas_fast.strategies.random import RandomSearch
from rlnas_fast.strategies.reinforce import Reinforce

Make = Callable[..., Strategy]

STRATEGIES: dict[str, Make] = {
    "random": RandomSearch,
    "evolution": Evolution,
    "local-search": LocalSearch,
    "local-search, 4 starts": functools.partial(LocalSearch, starts=4),
    "model-based": ModelBased,
    "model-based, early": functools.partial(ModelBased, initial=2, patience=1, memory=6),
    "composite": functools.partial(Composite, initial=4, memory=12),
    "nsga2": functools.partial(Nsga2, population=4),
    "ppo": functools.partial(PPO, group=4, epsilon="0:0.3:8"),
    "ppo, value head": functools.partial(PPO, group=3, value_head=True),
    "reinforce": Reinforce,
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
