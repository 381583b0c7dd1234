"""Learners of Stable-Baselines3 in our loop."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlnas_fast.errors import ConfigError, RunError
from rlnas_fast.runs import resume, run
from rlnas_fast.search import Architecture, Measurement, Request, SearchContext, Strategy, Trial, validate
from rlnas_fast.spaces.chain_cnn import ChainCNN, TaskSpec
from rlnas_fast.strategies import sb3

MAKERS: dict[str, Callable[..., sb3.SB3]] = {
    "maskable-ppo": sb3.maskable_ppo,
    "ppo": sb3.ppo,
    "a2c": sb3.a2c,
    "dqn": sb3.dqn,
}
CONTEXT = SearchContext()


@pytest.fixture(params=MAKERS, ids=str)
def make(request: pytest.FixtureRequest) -> Callable[..., sb3.SB3]:
    return MAKERS[request.param]


def reward_of(architecture: Architecture) -> float:
    return float(np.mean([np.sin(3 * i + choice) ** 2 for i, choice in enumerate(architecture.choices)]))


def trial_of(space: Any, architecture: Architecture, number: int = 0) -> Trial:
    key = space.canonical_key(architecture)
    return Trial(number, 0, architecture, key, Measurement(accuracy=0.5), reward_of(architecture))


def search(strategy: Strategy, space: Any, batches: int, size: int = 4) -> list[list[Trial]]:
    told = []
    for _ in range(batches):
        asked = strategy.ask(size, CONTEXT)
        assert 0 < len(asked) <= size
        batch = [trial_of(space, architecture) for architecture in asked]
        strategy.tell(batch)
        told.append(batch)
    return told


def test_proposes_valid_architectures_and_is_a_strategy(make: Any, space: Any) -> None:
    strategy = make(space, seed=0)
    assert isinstance(strategy, Strategy)
    for batch in search(strategy, space, 12):
        for trial in batch:
            validate(space, trial.architecture)


def test_repeats_itself_whatever_others_do_with_the_global_generators(make: Any, chain: Any) -> None:
    space = chain()
    first = search(make(space, seed=3), space, 40)
    strategy = make(space, seed=3)
    again = []
    for batch in first:
        random.random()
        np.random.random()  # noqa: NPY002 - the point of the test
        torch.rand(3)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index] # noqa: NPY002
        asked = strategy.ask(4, CONTEXT)
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index] # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        again.append([trial_of(space, architecture) for architecture in asked])
        strategy.tell(batch)
    assert again == first
    assert search(make(space, seed=4), space, 40) != first


def test_generates_without_learning_while_it_waits(make: Any, chain: Any) -> None:
    space = chain()
    strategy = make(space, seed=1)
    search(strategy, space, 10)
    weights = [p.clone() for p in strategy._model.policy.parameters()]
    first = strategy.ask(50, CONTEXT)  # takes what was told into account, once
    weights = [p.clone() for p in strategy._model.policy.parameters()]
    generated = first
    while len(generated) < 50:
        generated = generated + strategy.ask(50 - len(generated), CONTEXT)
    assert len(generated) == 50
    for architecture in generated:
        validate(space, architecture)
    after = list(strategy._model.policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))


def test_maskable_ppo_learns_what_is_rewarded(grid: Any) -> None:
    space = grid((4, 4))
    strategy = sb3.maskable_ppo(space, seed=0, learning_rate=0.003, n_steps=32)
    for _ in range(20):
        asked = strategy.ask(16, CONTEXT)
        rewards = [((a.choices[0] == 2) + (a.choices[1] == 3)) / 2 for a in asked]
        strategy.tell(
            [Trial(0, 0, a, "", Measurement(), reward) for a, reward in zip(asked, rewards, strict=True)]
        )
    assert np.mean(rewards) >= 0.9  # 0.25 to begin with


class Length:
    """The longer the chain, the better."""

    def __init__(self, space: Any, task: Any) -> None: ...

    def identity(self) -> dict[str, str]:
        return {"evaluator": "length"}

    def evaluate(self, request: Request) -> Measurement:
        return Measurement(accuracy=len(request.architecture.choices) / 10)


def test_a_search_with_it_is_resumed_by_replay(tmp_path: Any) -> None:
    settings: dict[str, Any] = {
        "strategy": {"name": "sb3:maskable-ppo", "n_steps": 16}, "evaluator": Length, "batch_size": 4,
    }  # fmt: skip
    whole = run(trials=40, out=tmp_path / "whole", **settings)
    run(trials=21, out=tmp_path / "cut", **settings)
    again = resume(tmp_path / "cut", settings={"trials": 40}, objects={"evaluator": Length})
    assert [trial.key for trial in again.trials[:21]] == [trial.key for trial in whole.trials[:21]]
    assert len(again.trials) == 40


def test_trials_told_in_another_order_reach_their_own_episodes(chain: Any) -> None:
    space = chain()
    plain, shuffled = sb3.maskable_ppo(space, seed=5), sb3.maskable_ppo(space, seed=5)
    for _ in range(6):
        asked = plain.ask(5, CONTEXT)
        assert shuffled.ask(5, CONTEXT) == asked
        batch = [trial_of(space, architecture) for architecture in asked]
        plain.tell(batch)
        shuffled.tell(batch[::-1])


def test_a_chain_of_layers_is_seen_as_its_seven_numbers() -> None:
    strategy = sb3.maskable_ppo(ChainCNN(TaskSpec((1, 8, 8), 10)), seed=0)
    assert strategy._model.observation_space.nvec.shape == (7,)


def test_without_the_library_one_line_says_what_to_install(
    make: Any, chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(
        ConfigError, match=r"needs (stable-baselines3|sb3-contrib): pip install 'rlnas_fast\[sb3\]'"
    ):
        make(chain(), seed=0)


def test_a_setting_that_the_learner_does_not_know(make: Any, chain: Any) -> None:
    with pytest.raises(ConfigError, match="unheard_of"):
        make(chain(), seed=0, settings={"unheard_of": 1})


def test_a_learner_that_stays_invalid_is_stopped(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3, "INVALID_IN_A_ROW", 3)
    space = chain()
    monkeypatch.setattr(
        type(space), "mask", lambda self, prefix: np.array([len(prefix) > 9, False, False, False])
    )
    with pytest.raises(RunError, match="no valid architecture in 3 episodes"):
        sb3.ppo(space, seed=0).ask(1, CONTEXT)
