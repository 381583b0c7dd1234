"""Agents learn what pays: in one decision among layers, and in many decisions at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlnas_fast.compression.agents import DQN, PPO, Agent, GaussianPPO


def agents(features: int, start: Tensor, seed: int = 0) -> dict[str, Agent]:
    return {"ppo": PPO(features, start, seed=seed), "dqn": DQN(features, start, seed=seed, discount=0.0)}


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_the_upper_decision_finds_the_layer_that_pays(name: str) -> None:
    agent = agents(3, torch.zeros(2))[name]
    states = torch.eye(3)[None]
    for _ in range(160):
        action = int(agent.act(states))
        agent.learn(1.0 if action == 2 * 2 + 1 else 0.0)
    late = [int(agent.act(states)) for _ in range(40)]
    assert late.count(5) > 20, "uniform draws find it 7 times in 40"


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_one_policy_decides_about_thousands_of_groups_by_their_features(name: str) -> None:
    agent = agents(2, torch.zeros(2))[name]
    chance = torch.Generator().manual_seed(1)
    shares = []
    for _ in range(120):
        feature = torch.randn(3000, 1, generator=chance)
        states = torch.stack([feature, torch.ones_like(feature)], dim=2)
        actions = agent.act(states)
        right = float((actions == (feature[:, 0] > 0)).double().mean())
        shares.append(right)
        agent.learn(right)
    assert sum(shares[-20:]) / 20 > sum(shares[:20]) / 20 + 0.05


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_what_is_not_allowed_is_never_chosen_and_seeds_repeat(name: str) -> None:
    allowed = torch.tensor([[False, True, False, True, False, False]]).expand(50, -1)
    states = torch.randn(50, 2, 4, generator=torch.Generator().manual_seed(0))
    first, second = (agents(4, torch.zeros(3), seed=7)[name] for _ in range(2))
    for reward in (0.3, 0.1, 0.9, 0.2, 0.5):
        actions = first.act(states, allowed)
        assert set(actions.tolist()) <= {1, 3}
        assert torch.equal(actions, second.act(states, allowed))
        first.learn(reward)
        second.learn(reward)


def test_the_first_draws_follow_the_start() -> None:
    states = torch.randn(4000, 1, 3, generator=torch.Generator().manual_seed(0))
    actions = PPO(3, torch.tensor([0.0, 2.0]), seed=0).act(states)
    # A softmax of (0, 2) gives 0.881; four standard errors are 0.02.
    assert float(actions.double().mean()) == pytest.approx(0.881, abs=0.021)


def test_numbers_move_towards_what_pays() -> None:
    agent = GaussianPPO(torch.full((3,), 0.3), seed=0)
    wanted = torch.tensor([0.5, -0.5, 0.0])
    for _ in range(60):
        drawn = agent.act()
        agent.learn(-float((drawn - wanted).square().sum()))
    assert float((agent.mean - wanted).norm()) < 0.5 * float(wanted.norm())
    assert bool((agent.deviation < 0.3).all())


def test_numbers_come_in_mirrored_pairs() -> None:
    agent = GaussianPPO(torch.ones(4), seed=3)
    first, second = agent.act(), agent.act()
    assert torch.allclose(first, -second)
