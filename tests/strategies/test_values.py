"""Methods that learn values find where the reward is, and say what is wrong with their settings."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, Measurement, SearchContext, Trial
from rlnas_fast.strategies.bandit import Bandit
from rlnas_fast.strategies.dqn import DQN
from rlnas_fast.strategies.q_learning import QLearning
from rlnas_fast.strategies.sac import SAC

CONTEXT = SearchContext()


def told(space: Any, architecture: Architecture, reward: float) -> Trial:
    return Trial(0, 0, architecture, space.canonical_key(architecture), Measurement(accuracy=0.5), reward)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(QLearning, epsilon="1:0.1:60"),
        functools.partial(QLearning, epsilon="1:0.1:60", history=0),
        functools.partial(DQN, epsilon="1:0.1:60"),
        functools.partial(SAC, entropy=0.2),
        Bandit,
        functools.partial(Bandit, rule="ucb"),
    ],
)
def test_proposals_move_to_where_the_reward_is(grid: Any, make: Any) -> None:
    space = grid((4,) * 6)
    strategy = make(space, seed=0, allow_repeats=True)
    rewards = []
    for _ in range(150):
        (architecture,) = strategy.ask(1, CONTEXT)
        rewards.append(float(sum(choice == 2 for choice in architecture.choices)))
        strategy.tell([told(space, architecture, rewards[-1])])
    assert np.mean(rewards[:10]) < 3  # 6 decisions of 4 choices: 1.5 by chance
    assert np.mean(rewards[-30:]) > 3.5


def test_the_table_tells_what_an_early_choice_was_worth_though_the_state_forgets_it(grid: Any) -> None:
    space = grid((3, 3, 3, 3))
    rng = np.random.default_rng(0)
    drawn = [Architecture("grid", tuple(rng.integers(3, size=4).tolist())) for _ in range(300)]
    trials = [told(space, a, float(a.choices[0] == 1)) for a in drawn]
    strategy = QLearning(space, seed=0, allow_repeats=True, epsilon=0.1)
    strategy.tell(trials)
    first = [a.choices[0] for a in strategy.ask(200, CONTEXT)]
    # at epsilon 0.1, one in 15 is another one by chance: 186.7 expected, standard deviation 3.5
    assert first.count(1) > 165


def test_a_table_that_would_not_fit_is_one_clear_error(grid: Any) -> None:
    with pytest.raises(ConfigError, match=r"q-learning does not fit space 'grid': .*history = 6, or use dqn"):
        QLearning(grid((20,) * 10), seed=0, history=6)


def test_what_waits_counts_for_what_is_asked_next(grid: Any) -> None:
    space = grid((4,))
    strategy = Bandit(space, seed=0, rule="ucb", allow_repeats=True)
    asked = [strategy.ask(1, CONTEXT)[0].choices for _ in range(4)]
    assert sorted(asked) == [(0,), (1,), (2,), (3,)]  # each arm once before any is told


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (QLearning, {"learning_rate": 0.0}),
        (QLearning, {"trace": 1.5}),
        (QLearning, {"history": -1}),
        (QLearning, {"replays": 0}),
        (QLearning, {"epsilon": 1.5}),
        (DQN, {"hidden": 0}),
        (DQN, {"learning_rate": 0.0}),
        (DQN, {"updates": 0}),
        (DQN, {"batch": 0}),
        (DQN, {"trace": -0.1}),
        (DQN, {"target_rate": 0.0}),
        (DQN, {"epsilon": 1.5}),
        (SAC, {"hidden": 0}),
        (SAC, {"learning_rate": -1.0}),
        (SAC, {"updates": 0}),
        (SAC, {"batch": 0}),
        (SAC, {"trace": 2.0}),
        (SAC, {"target_rate": 1.5}),
        (SAC, {"entropy": 1.0}),
        (Bandit, {"rule": "greedy"}),
        (Bandit, {"width": 0.0}),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_clear_error(
    grid: Any, make: Any, settings: dict[str, Any]
) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"{name} = {value!r}"):
        make(grid(), seed=0, **settings)
