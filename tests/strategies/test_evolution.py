"""Regularised evolution ages: the best does not live for ever."""

from __future__ import annotations

from typing import Any

import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, Measurement, SearchContext, Trial
from rlnas_fast.strategies.evolution import Evolution


def told(space: Any, choices: tuple[int, ...], reward: float) -> Trial:
    architecture = Architecture(space.name, choices)
    return Trial(0, 0, architecture, space.canonical_key(architecture), Measurement(accuracy=reward), reward)


def test_children_are_one_mutation_from_the_winner_until_it_dies_of_age(grid: Any) -> None:
    space = grid((9,) * 6)
    strategy = Evolution(space, seed=0, population=4, sample=4)  # every member is met
    strategy.tell([told(space, (8,) * 6, 1.0)])
    strategy.tell([told(space, (i,) * 6, 0.1 * i) for i in range(3)])
    for child in strategy.ask(5, SearchContext()):
        assert sum(choice == 8 for choice in child.choices) == 5
    strategy.tell([told(space, (3,) * 6, 0.3)])  # the fifth trial: the first leaves
    for child in strategy.ask(5, SearchContext()):
        assert sum(choice == 3 for choice in child.choices) == 5


def test_draws_at_random_until_the_population_is_full(grid: Any) -> None:
    space = grid((9,) * 6)
    strategy = Evolution(space, seed=0)
    strategy.tell([told(space, (8,) * 6, 1.0)] * 9)
    assert all(sum(choice == 8 for choice in a.choices) < 5 for a in strategy.ask(9, SearchContext()))


@pytest.mark.parametrize("settings", [{"population": 2}, {"sample": 0}, {"sample": 11}])
def test_a_setting_that_makes_no_sense_is_one_clear_error(grid: Any, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="sample must be from 1"):
        Evolution(grid(), seed=0, **settings)
