"""REINFORCE learns, and says what is wrong with its settings."""

from __future__ import annotations

from typing import Any

import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Measurement, SearchContext, Trial
from rlnas_fast.strategies.reinforce import Reinforce


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_policy_moves_to_where_the_reward_is(grid: Any, cell: str) -> None:
    space = grid((4,) * 6)
    strategy = Reinforce(space, seed=0, cell=cell, allow_repeats=True)
    means = []
    for _ in range(40):
        asked = strategy.ask(10, SearchContext())
        rewards = [float(sum(choice == 2 for choice in a.choices)) for a in asked]
        means.append(sum(rewards) / 10)
        strategy.tell(
            [
                Trial(0, 0, a, space.canonical_key(a), Measurement(accuracy=r), r)
                for a, r in zip(asked, rewards, strict=True)
            ]
        )
    assert sum(means[:5]) / 5 < 2.5  # 6 decisions of 4 choices: 1.5 by chance
    assert sum(means[-5:]) / 5 > 4.5


@pytest.mark.parametrize(
    "settings",
    [
        {"cell": "rnn"},
        {"hidden": 0},
        {"temperature": 0.0},
        {"tanh_constant": -1.0},
        {"learning_rate": 0.0},
        {"entropy_weight": -1.0},
        {"baseline_decay": 1.0},
        {"epsilon": 1.5},
    ],
)
def test_a_setting_that_makes_no_sense_is_one_clear_error(grid: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(settings.values())))):
        Reinforce(grid(), seed=0, **settings)
