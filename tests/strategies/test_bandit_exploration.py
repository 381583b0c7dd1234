"""A bandit explores around any strategy, less and less."""

from __future__ import annotations

from typing import Any

import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, Measurement, SearchContext, Trial
from rlnas_fast.strategies.bandit import Bandit
from rlnas_fast.strategies.bandit_exploration import BanditExploration
from rlnas_fast.strategies.random import RandomSearch

CONTEXT = SearchContext()


def told(space: Any, architecture: Architecture, reward: float) -> Trial:
    return Trial(0, 0, architecture, space.canonical_key(architecture), Measurement(accuracy=0.5), reward)


def reached(grid: Any, epsilon: str, trials: int = 120) -> list[int]:
    """How many of 6 choices are right, for each trial; the strategy itself is random."""
    space = grid((4,) * 6)
    strategy = BanditExploration(space, lambda part: RandomSearch(part, seed=0), seed=0, epsilon=epsilon)
    right = []
    for _ in range(trials):
        (architecture,) = strategy.ask(1, CONTEXT)
        right.append(sum(choice == i % 4 for i, choice in enumerate(architecture.choices)))
        strategy.tell([told(space, architecture, float(right[-1]))])
    return right


def test_a_bandit_finds_good_operations_and_random_search_does_not(grid: Any) -> None:
    assert sum(reached(grid, "1")[60:]) > 60 * 2.5  # 1.5 each by chance
    assert sum(reached(grid, "0")[60:]) < 60 * 2


def test_the_schedule_says_how_often(grid: Any) -> None:
    assert reached(grid, "1:0:0") == reached(grid, "0")
    falling = reached(grid, "1:0:60")
    assert sum(falling[30:60]) > sum(falling[90:120])


def test_after_a_log_that_was_only_told_it_explores_as_little_as_it_did(grid: Any) -> None:
    space = grid((4,) * 6)
    log = [told(space, Architecture(space.name, (i % 4, i // 4, 0, 0, 0, 0)), 0.0) for i in range(16)]
    within = BanditExploration(space, lambda part: RandomSearch(part, seed=0), seed=0, epsilon="1:0:16")
    alone = RandomSearch(space, seed=0)
    for strategy in (within, alone):
        strategy.tell(log)
    assert within.ask(20, CONTEXT) == alone.ask(20, CONTEXT)


def test_both_learn_from_everything(grid: Any) -> None:
    heard: list[float] = []

    class Listener(RandomSearch):
        def tell(self, trials: Any) -> None:
            heard.extend(trial.reward for trial in trials)
            super().tell(trials)

    space = grid((3, 3))
    strategy = BanditExploration(space, lambda part: Listener(part, seed=0), seed=0, epsilon=0.5)
    asked = strategy.ask(6, CONTEXT)
    strategy.tell([told(space, a, float(i)) for i, a in enumerate(asked)])
    assert heard == [0, 1, 2, 3, 4, 5]


def test_what_makes_no_sense_is_one_clear_error(grid: Any) -> None:
    with pytest.raises(ConfigError, match="it is one already"):
        BanditExploration(grid(), lambda part: Bandit(part, seed=0), seed=0)
    with pytest.raises(ConfigError, match=r"epsilon = 2.*from 0 to 1"):
        BanditExploration(grid(), lambda part: RandomSearch(part, seed=0), seed=0, epsilon=2.0)
