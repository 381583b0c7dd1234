"""A curriculum opens a space from small to large, and in the end all of it."""

from __future__ import annotations

from typing import Any

import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, Measurement, SearchContext, Trial
from rlnas_fast.strategies.curriculum import Curriculum
from rlnas_fast.strategies.random import RandomSearch

CONTEXT = SearchContext()


def searching(space: Any, open: str, trials: int, strategy: Any = RandomSearch) -> list[tuple[int, ...]]:
    curriculum = Curriculum(space, lambda part: strategy(part, seed=0), seed=0, open=open)
    asked = []
    for _ in range(trials):
        asked += curriculum.ask(1, CONTEXT)
        key = space.canonical_key(asked[-1])
        curriculum.tell([Trial(len(asked), 0, asked[-1], key, Measurement(accuracy=0.5), 0.5)])
    return [a.choices for a in asked]


def test_choices_open_one_after_the_other_where_all_architectures_are_as_long(grid: Any) -> None:
    asked = searching(grid((4,) * 5), "0.25:1:60", 80)
    largest = [max(choices) for choices in asked]
    # fraction 0.25 + 0.0125 n of 4 choices, rounded up; the single architecture of one choice goes first
    assert largest[0] == 0
    assert max(largest[:21]) == 1
    assert max(largest[:41]) == 2
    assert max(largest) == 3


def test_after_a_log_that_was_only_told_it_is_as_open_as_it_was(grid: Any) -> None:
    space = grid((4,) * 5)
    curriculum = Curriculum(space, lambda part: RandomSearch(part, seed=0), seed=0, open="0.25:1:60")
    log = [Architecture(space.name, (i % 4, i // 4 % 4, i // 16, 0, 0)) for i in range(60)]
    curriculum.tell([Trial(0, 0, a, space.canonical_key(a), Measurement(accuracy=0.5), 0.5) for a in log])
    assert max(max(a.choices) for a in curriculum.ask(10, CONTEXT)) == 3


def test_length_opens_where_architectures_may_end(chain: Any) -> None:
    asked = searching(chain(depth=6), "0.3:1:60", 90)
    length = [sum(choice != 0 for choice in choices) for choices in asked]
    # at most 6 (0.3 + 0.7 n / 60) layers, rounded up
    assert max(length[:3]) <= 2
    assert max(length[:18]) == 3
    assert max(length) == 6


def test_opens_wider_when_nothing_new_is_left(chain: Any) -> None:
    asked = searching(chain(depth=4), "0.25:1:1000", 45)
    assert len(set(asked)) == 45 == chain(depth=4).count


def test_what_lies_outside_is_told_once_it_is_open(grid: Any) -> None:
    heard: list[int] = []

    class Listener(RandomSearch):
        def tell(self, trials: Any) -> None:
            heard.extend(trial.number for trial in trials)
            super().tell(trials)

    space = grid((4, 4, 4))
    curriculum = Curriculum(space, lambda part: Listener(part, seed=0), seed=0, open="0.5:1:10")
    curriculum.ask(1, CONTEXT)
    strangers = [(1, 1, 0), (3, 3, 3), (0, 0, 0), (2, 0, 0)]
    told = [Architecture("grid", choices) for choices in strangers]
    curriculum.tell(
        [Trial(i, 0, a, space.canonical_key(a), Measurement(accuracy=0.5), 0.5) for i, a in enumerate(told)]
    )
    assert heard == [0, 2]
    rest = curriculum.ask(70, CONTEXT)
    assert sorted(heard) == [0, 1, 2, 3]
    assert {a.choices for a in rest}.isdisjoint({(1, 1, 0), (0, 0, 0)})


@pytest.mark.parametrize("open", ["0.5", "0.5:0.9:10", "2:1:10", "x"])
def test_a_curriculum_that_never_opens_is_one_clear_error(grid: Any, open: str) -> None:
    with pytest.raises(ConfigError, match="open = "):
        Curriculum(grid(), lambda part: RandomSearch(part, seed=0), seed=0, open=open)
