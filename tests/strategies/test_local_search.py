"""Local search climbs, knows when it has arrived, and starts again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, Measurement, SearchContext, Trial
from rlnas_fast.strategies.local_search import LocalSearch
from rlnas_fast.strategies.moves import mutate, neighbours, repair

CONTEXT = SearchContext()


def told(space: Any, architecture: Architecture, reward: float) -> Trial:
    return Trial(0, 0, architecture, space.canonical_key(architecture), Measurement(accuracy=reward), reward)


def distance(one: Architecture, other: Architecture) -> int:
    return sum(a != b for a, b in zip(one.choices, other.choices, strict=True))


def test_reaches_the_optimum_of_a_smooth_landscape_within_its_neighbourhoods(grid: Any) -> None:
    space = grid((4,) * 5)
    strategy = LocalSearch(space, seed=0)
    best = 0
    for _ in range(1 + 5 * 15):  # a start, then at most 5 improvements with at most 15 neighbours each
        (architecture,) = strategy.ask(1, CONTEXT)
        reward = sum(choice == 3 for choice in architecture.choices)
        best = max(best, reward)
        strategy.tell([told(space, architecture, float(reward))])
    assert best == 5


def test_moves_as_soon_as_a_neighbour_is_better_and_not_before(grid: Any) -> None:
    space = grid((3, 3, 3))
    strategy = LocalSearch(space, seed=0)
    (start,) = strategy.ask(1, CONTEXT)
    strategy.tell([told(space, start, 0.5)])
    (worse,) = strategy.ask(1, CONTEXT)
    assert distance(start, worse) == 1
    strategy.tell([told(space, worse, 0.4)])
    (better,) = strategy.ask(1, CONTEXT)
    assert distance(start, better) == 1
    strategy.tell([told(space, better, 0.6)])
    around = strategy.ask(3, CONTEXT)
    assert all(distance(better, architecture) == 1 for architecture in around)


def test_starts_elsewhere_from_a_local_optimum(grid: Any) -> None:
    space = grid((3, 3, 3))
    strategy = LocalSearch(space, seed=0)
    (start,) = strategy.ask(1, CONTEXT)
    strategy.tell([told(space, start, 1.0)])
    around = strategy.ask(6, CONTEXT)
    assert all(distance(start, architecture) == 1 for architecture in around)
    strategy.tell([told(space, architecture, 0.0) for architecture in around])
    (elsewhere,) = strategy.ask(1, CONTEXT)
    assert distance(start, elsewhere) > 1


def test_starts_from_the_best_of_what_it_was_told(grid: Any) -> None:
    space = grid((4, 4, 4))
    strategy = LocalSearch(space, seed=0)
    (start,) = strategy.ask(1, CONTEXT)
    warm = Architecture("grid", tuple((choice + 1) % 4 for choice in start.choices))
    strategy.tell([told(space, warm, 0.9), told(space, start, 0.2)])
    (architecture,) = strategy.ask(1, CONTEXT)
    assert distance(warm, architecture) == 1


def test_needs_a_start() -> None:
    with pytest.raises(ConfigError, match="starts = 0"):
        LocalSearch(None, seed=0, starts=0)  # type: ignore[arg-type]


def test_neighbours_of_a_fixed_length_differ_in_one_decision(grid: Any) -> None:
    space = grid((3, 2, 4))
    start = Architecture("grid", (0, 1, 2))
    found = neighbours(space, start, np.random.default_rng(0))
    assert len(set(found)) == len(found) == 2 + 1 + 3
    assert all(distance(start, architecture) == 1 for architecture in found)


def test_repair_keeps_what_it_can(chain: Any) -> None:
    space = chain(4)
    rng = np.random.default_rng(0)
    assert repair(space, (1, 2, 3, 1), rng).choices == (1, 2, 3, 1)
    assert repair(space, (1, 0, 3, 1), rng).choices == (1, 0)
    assert repair(space, (2, 2, 3, 1), rng).choices[0] == 2  # no type follows itself: only this is redrawn
    assert len(repair(space, (1, 2), rng).choices) >= 3


def test_mutation_changes_something_unless_nothing_can_change(grid: Any, chain: Any) -> None:
    rng = np.random.default_rng(0)
    fixed = Architecture("grid", (0, 0))
    assert mutate(grid((1, 1)), fixed, rng) == fixed
    start = Architecture("chain", (1, 2, 3, 1))
    assert all(mutate(chain(4), start, rng) != start for _ in range(50))


def test_a_limit_keeps_some_of_the_neighbours(grid: Any) -> None:
    space = grid((3, 3, 3))
    start = Architecture("grid", (0, 1, 2))
    everything = set(neighbours(space, start, np.random.default_rng(0)))
    some = neighbours(space, start, np.random.default_rng(0), limit=4)
    assert len(set(some)) == 4
    assert set(some) < everything
    assert set(neighbours(space, start, np.random.default_rng(0), limit=6)) == everything
