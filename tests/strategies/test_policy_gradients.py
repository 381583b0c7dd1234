"""Policy gradients learn, and say what is wrong with its settings."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Measurement, SearchContext, Trial
from rlnas_fast.strategies.ppo import PPO
from rlnas_fast.strategies.reinforce import Reinforce


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(Reinforce, cell="lstm"),
        functools.partial(Reinforce, cell="gru"),
        PPO,
        functools.partial(PPO, value_head=True, cell="gru"),
    ],
)
def test_the_policy_moves_to_where_the_reward_is(grid: Any, make: Any) -> None:
    space = grid((4,) * 6)
    strategy = make(space, seed=0, allow_repeats=True)
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
    assert means[0] < 2.5  # 6 decisions of 4 choices: 1.5 by chance
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


@pytest.mark.parametrize(
    "settings",
    [
        {"trace": 1.5},
        {"clip": 0.0},
        {"baseline_decay": 1.0},
        {"epsilon": -0.5},
        {"group": 0},
        {"epochs": 0},
        {"learning_rate": -1.0},
        {"value_weight": -1.0},
    ],
)
def test_so_it_is_for_ppo(grid: Any, settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"{name} = {value}"):
        PPO(grid(), seed=0, **settings)


def test_ppo_learns_when_a_group_is_full_however_it_was_told(grid: Any) -> None:
    space = grid((4,) * 6)
    one, ten = PPO(space, seed=0), PPO(space, seed=0)
    asked = one.ask(10, SearchContext())
    assert ten.ask(10, SearchContext()) == asked
    trials = [
        Trial(i, 0, a, space.canonical_key(a), Measurement(accuracy=0.5), float(sum(a.choices)))
        for i, a in enumerate(asked)
    ]
    ten.tell(trials)
    for trial in trials:
        one.tell([trial])
    assert one.ask(10, SearchContext()) == ten.ask(10, SearchContext())


@pytest.mark.parametrize("make", [Reinforce, PPO])
def test_a_schedule_that_has_ended_is_the_constant_it_ends_with(grid: Any, make: Any) -> None:
    space = grid((4,) * 5)

    def asked(**settings: Any) -> list[list[Any]]:
        strategy = make(space, seed=0, **settings)
        batches = []
        for _ in range(4):
            batches.append(strategy.ask(10, SearchContext()))
            strategy.tell(
                [
                    Trial(0, 0, a, space.canonical_key(a), Measurement(accuracy=0.5), float(sum(a.choices)))
                    for a in batches[-1]
                ]
            )
        return batches

    assert asked(epsilon="1:0:0", entropy_weight="9:0.1:0") == asked(entropy_weight=0.1)
    opening = asked(epsilon="1:0:10")
    assert opening[0] == asked(epsilon=1.0)[0]
    assert opening != asked(epsilon=1.0)
    assert asked(entropy_weight="9:0.1:20") != asked(entropy_weight=0.1)
