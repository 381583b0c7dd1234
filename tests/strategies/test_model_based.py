"""Model-based search learns from every trial, whoever made it, and looks elsewhere when it is stuck."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, Measurement, SearchContext, Trial, sample_uniform
from rlnas_fast.strategies.model_based import ModelBased
from rlnas_fast.strategies.random import RandomSearch

CONTEXT = SearchContext()


def told(space: Any, architecture: Architecture, reward: float) -> Trial:
    return Trial(0, 0, architecture, space.canonical_key(architecture), Measurement(accuracy=reward), reward)


def pairs(architecture: Architecture) -> float:
    """1/2 for each choice that is right and 1 for each two right ones in a row: 11 at most, of 8."""
    right = [choice == i % 4 for i, choice in enumerate(architecture.choices)]
    return 0.5 * sum(right) + sum(a and b for a, b in pairwise(right))


def best_of(strategy: Any, space: Any, batch: int, trials: int) -> float:
    best = 0.0
    for _ in range(trials // batch):
        asked = strategy.ask(batch, CONTEXT)
        strategy.tell([told(space, a, pairs(a)) for a in asked])
        best = max(best, *(pairs(a) for a in asked))
    return best


@pytest.mark.parametrize("batch", [1, 10])
def test_finds_what_random_search_does_not(grid: Any, batch: int) -> None:
    space = grid((4,) * 8)  # 1 of 65,536 is best
    model = [best_of(ModelBased(space, seed=seed), space, batch, 80) for seed in range(3)]
    chance = [best_of(RandomSearch(space, seed=seed), space, batch, 80) for seed in range(3)]
    assert np.mean(model) >= 10
    assert np.mean(chance) <= 8


def test_uses_trials_it_never_asked_for(grid: Any) -> None:
    space = grid((4,) * 6)
    rng = np.random.default_rng(0)
    strategy = ModelBased(space, seed=0)
    strategy.tell(
        [told(space, a, -abs(sum(a.choices) - 17)) for a in (sample_uniform(space, rng) for _ in range(60))]
    )
    (first,) = strategy.ask(1, CONTEXT)
    assert sum(first.choices) >= 14  # 9 by chance, 18 at most


def test_a_batch_is_not_ten_times_the_same_idea(grid: Any) -> None:
    space = grid((4,) * 6)
    strategy = ModelBased(space, seed=0)
    asked = strategy.ask(20, CONTEXT)
    strategy.tell([told(space, a, pairs(a)) for a in asked])
    assert len(set(strategy.ask(10, CONTEXT))) == 10


def test_looks_elsewhere_after_patience_runs_out(grid: Any) -> None:
    space = grid((4,) * 6)

    def farthest(patience: int) -> int:
        """How many proposals lie far from the best, which was told first, once the model is in use."""
        strategy = ModelBased(space, seed=0, patience=patience)
        reward = {0: 1.0, 1: 0.9, 2: 0.8}
        distances = []
        for number in range(60):
            (architecture,) = strategy.ask(1, CONTEXT) if number else ([Architecture("grid", (0,) * 6)])
            away = sum(choice != 0 for choice in architecture.choices)
            strategy.tell([told(space, architecture, reward.get(away, 0.0))])
            distances.append(away)
        return sum(distance >= 4 for distance in distances[10:])

    assert farthest(patience=5) > farthest(patience=0)


def test_remembers_the_best_and_the_latest_when_memory_is_short(grid: Any) -> None:
    space = grid((4,) * 6)
    strategy = ModelBased(space, seed=0, memory=20)
    best = 0.0
    for _ in range(10):
        asked = strategy.ask(10, CONTEXT)
        assert len(asked) == 10
        strategy.tell([told(space, a, pairs(a)) for a in asked])
        best = max(best, *(pairs(a) for a in asked))
    assert best >= 5


@pytest.mark.parametrize(
    "settings",
    [{"initial": 1}, {"incumbents": 0}, {"memory": 3}, {"proposals": -1}, {"patience": -1}],
)
def test_a_setting_that_makes_no_sense_is_one_clear_error(grid: Any, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ModelBased(grid(), seed=0, **settings)
