"""Q-learning by the book: raw rewards, one-step targets, epsilon in steps."""

from __future__ import annotations

import hashlib

import numpy as np

from rlnas_fast.search import Measurement, SearchContext, TaskSpec, Trial
from rlnas_fast.spaces.chain_cnn import ChainCNN
from rlnas_fast.strategies.novelty import enumerate_space
from rlnas_fast.strategies.q_learning import QLearning


def reward(choices: tuple[int, ...]) -> float:
    return int.from_bytes(hashlib.sha256(repr(choices).encode()).digest()[:4], "big") / 2**32


def test_its_table_is_that_of_value_iteration_and_its_greedy_chain_the_best() -> None:
    space = ChainCNN(TaskSpec((1, 4, 4), 3), max_depth=2)  # a state knows its whole past
    strategy = QLearning(  # a whole number as optimism, as a command line gives it
        space, seed=0, allow_repeats=True, trace=0.0, scale="none", epsilon="1x2500,0x1", replays=30,
        optimism=0,
    )  # fmt: skip
    for _ in range(2500):
        (asked,) = strategy.ask(1, SearchContext())
        strategy.tell([Trial(0, 0, asked, "", Measurement(), reward(asked.choices))])

    def value(prefix: tuple[int, ...]) -> float:
        if space.is_complete(prefix):
            return reward(prefix)
        return max(value((*prefix, choice)) for choice in np.flatnonzero(space.mask(prefix)).tolist())

    for prefix in [(), *((choice,) for choice in np.flatnonzero(space.mask(())).tolist())]:
        for choice in np.flatnonzero(space.mask(prefix)).tolist():
            assert abs(strategy.values(prefix)[choice] - value((*prefix, choice))) <= 1e-3
    best = max(enumerate_space(space), key=lambda architecture: reward(architecture.choices))
    assert strategy.ask(1, SearchContext()) == [best]  # epsilon is 0 by now


def test_generates_the_same_greedy_network_without_updates() -> None:
    space = ChainCNN(TaskSpec((1, 8, 8), 3))
    strategy = QLearning(space, seed=1, allow_repeats=True, scale="none", trace=0.0, epsilon="1x30,0x1")
    for _ in range(30):
        (asked,) = strategy.ask(1, SearchContext())
        strategy.tell([Trial(0, 0, asked, "", Measurement(), reward(asked.choices))])
    before = strategy.values(())
    assert len(strategy.ask(50, SearchContext())) == 50
    assert (strategy.values(()) == before).all()
