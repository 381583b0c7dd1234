"""The search as Gymnasium environments."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import rlnas_fast.envs  # noqa: F401 - registers
from rlnas_fast.envs.construction import LAYER_TYPES
from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, validate
from rlnas_fast.spaces.chain_cnn import Layer

IDS = ("rlnas_fast/ChainCNN-v0", "rlnas_fast/Architecture-v0")


def length(architecture: Architecture) -> float:
    return len(architecture.choices) / 10


def make(name: str, **settings: Any) -> Any:
    return gymnasium.make(name, **{"evaluate": length, **settings}).unwrapped


def play(env: Any, rng: np.random.Generator) -> tuple[list[np.ndarray], float, dict[str, Any]]:
    """One episode of random valid actions: observations, sum of the rewards, last info."""
    seen, info = env.reset()
    observations, total, ended = [seen], 0.0, False
    while not ended:
        action = rng.choice(np.flatnonzero(env.action_masks()))
        seen, reward, ended, truncated, info = env.step(action)
        assert not truncated
        assert seen in env.observation_space
        assert ended or reward == 0
        observations.append(seen)
        total += reward
    return observations, total, info


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("checker", [check_env, sb3_check_env])
def test_checkers_find_nothing(name: str, checker: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checker(make(name))


@pytest.mark.parametrize("name", IDS)
def test_it_works_on_digits_without_arguments_and_trains_a_network_once(name: str) -> None:
    env = gymnasium.make(name, epochs=1).unwrapped
    results = []
    for _ in range(2):
        env.reset(seed=0)
        first = int(np.flatnonzero(env.action_masks())[0])
        env.step(first)
        _, reward, ended, _, info = env.step(int(np.flatnonzero(env.action_masks())[-1]))  # the end
        assert ended
        results.append((reward, info))
    assert results[0] == results[1]
    assert 0 < results[0][1]["accuracy"] <= 1
    assert results[0][1]["parameters"] > 0
    gymnasium.make(name).close()  # with every default


@pytest.mark.parametrize("name", IDS)
def test_random_valid_play_gives_valid_networks_and_one_reward(name: str) -> None:
    env = make(name)
    rng = np.random.default_rng(0)
    for _ in range(100):
        _, total, info = play(env, rng)
        architecture = Architecture(env.space.name, info["choices"])
        validate(env.space, architecture)
        assert total == length(architecture)
        assert info["network"] == env.space.describe(architecture)
        assert not info["invalid_action"]


def test_states_are_the_seven_numbers_of_the_last_layer() -> None:
    env = make("rlnas_fast/ChainCNN-v0")
    names = env.space.decisions[0].choices
    states = [env.reset()[0]] + [
        env.step(names.index(layer))[0] for layer in ("conv5x5-32", "pool3x3/2", "fc-256", "end")
    ]
    types = LAYER_TYPES
    decoded = [
        Layer(int(s[0]), types[s[1]], *(values[i] for values, i in zip(env.values[2:], s[2:], strict=True)))
        for s in states
    ]
    assert decoded == [
        Layer(0, "start"),
        Layer(1, "conv", 32, 5),
        Layer(2, "pool", 0, 3, 2),
        Layer(3, "fc", 0, 0, 0, 256),
        Layer(3, "end", 0, 0, 0, 0, 1),
    ]


def test_the_published_numbers_are_the_observation_space() -> None:
    env = make("rlnas_fast/ChainCNN-v0")
    depth, _, *numbers = env.values
    assert depth == tuple(range(9))
    assert numbers == [(0, 10, 20, 32, 64), (0, 1, 3, 5), (0, 2, 3), (0, 64, 128, 256, 512), (0, 1)]


@pytest.mark.parametrize("name", IDS)
def test_the_mask_says_exactly_what_is_valid(name: str) -> None:
    for depth in range(3):
        env = make(name)
        for action in range(env.action_space.n):
            env.reset()
            for _ in range(depth):
                env.step(int(np.flatnonzero(env.action_masks())[0]))
            allowed = env.action_masks()[action]
            *_, info = env.step(action)
            assert info.get("invalid_action", False) != allowed


@pytest.mark.parametrize("name", IDS)
def test_invalid_actions(name: str) -> None:
    env = make(name)
    env.reset()
    for action in (-1, env.action_space.n, int(np.flatnonzero(~env.action_masks())[0])):
        env.reset()
        _, reward, ended, truncated, info = env.step(action)
        assert (reward, ended, truncated, info["invalid_action"]) == (0.0, True, False, True)
        assert not env.action_masks().any()
        with pytest.raises(ResetNeeded):
            env.step(0)
    strict = make(name, invalid_action="raise")
    strict.reset()
    with pytest.raises(InvalidAction, match="action 999 is not valid"):
        strict.step(999)
    strict.step(int(np.flatnonzero(strict.action_masks())[0]))  # the episode goes on


@pytest.mark.parametrize("name", IDS)
def test_stepping_before_the_first_reset(name: str) -> None:
    with pytest.raises(ResetNeeded, match="call reset"):
        make(name).step(0)


def test_every_space_of_ours_can_be_played() -> None:
    rng = np.random.default_rng(1)
    for space in ("chain-cnn", "macro-cnn", "cell-201", "nasbench-macro"):
        env = make("rlnas_fast/Architecture-v0", space=space)
        observations, _, info = play(env, rng)
        assert [int(c) - 1 for c in observations[-1] if c] == list(info["choices"])
        for earlier, later in itertools.pairwise(observations):
            assert (earlier != later).sum() == 1


def test_options_of_the_space_reach_it() -> None:
    env = make("rlnas_fast/ChainCNN-v0", space={"attention": True, "max_depth": 3})
    assert "attention" in [layer.type for layer in env.layers]
    assert env.observation_space.nvec[0] == 4
    sb3_check_env(env)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (IDS[0], {"space": "chain-cmn"}, "unknown space 'chain-cmn': did you mean 'chain-cnn'"),
        (IDS[1], {"space": "nothing"}, "unknown space 'nothing'"),
        (IDS[0], {"space": "macro-cnn"}, "use Architecture-v0"),
        (IDS[0], {"invalid_action": "stop"}, "invalid_action = 'stop'"),
        (IDS[0], {"tsk": "digits"}, "unknown setting 'tsk'"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **settings)
