"""Controllers that are told a target: what they hear, and that they learn to tell targets apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rlnas_fast.rl.policies import RecurrentPolicy
from rlnas_fast.search import Measurement, SearchContext, Strategy, Trial
from rlnas_fast.strategies.conditioning import Baselines, Conditioning
from rlnas_fast.strategies.ppo import PPO
from rlnas_fast.strategies.reinforce import Reinforce

from .conftest import Chain, Grid


class Sum:
    """Each decision costs its choice."""

    def estimate(self, prefix: tuple[int, ...]) -> dict[str, float]:
        return {"latency_s": float(sum(prefix))}


def test_it_says_the_target_and_the_cost_so_far() -> None:
    conditioning = Conditioning()
    assert conditioning.of(SearchContext()) is None
    first = conditioning.of(SearchContext(targets={"latency_s": 2.0}, cost_model=Sum()))
    second = conditioning.of(SearchContext(targets={"latency_s": 8.0}, cost_model=Sum()))
    alone = conditioning.of(SearchContext(targets={"latency_s": 8.0}))
    assert first is not None
    assert second is not None
    assert alone is not None
    assert first((1, 2)) == (0.0, 1.5)
    assert second((1, 2)) == (pytest.approx(math.log(4)), 0.375)
    assert second((90, 9)) == (pytest.approx(math.log(4)), 4.0)
    assert alone((1, 2)) == (pytest.approx(math.log(4)), 0.0)


def test_each_architecture_keeps_the_condition_it_was_asked_under() -> None:
    conditioning = Conditioning()
    first = conditioning.of(SearchContext(targets={"latency_s": 1.0}))
    conditioning.remember([(0,), (1,)])
    second = conditioning.of(SearchContext(targets={"latency_s": 2.0}))
    conditioning.remember([(2,)])
    assert conditioning.recall([(1,), (2,), (3,)]) == [first, second, second]
    assert conditioning.recall([(1,)]) == [second]  # forgotten


def test_each_target_has_its_own_baseline() -> None:
    conditioning = Conditioning()
    tight, loose = (conditioning.of(SearchContext(targets={"latency_s": t})) for t in (1.0, 2.0))
    mixed, alone = Baselines(0.9), Baselines(0.9)
    conditions = [tight, loose, tight, loose, tight]
    rewards = [0.1, 0.9, 0.2, 0.7, 0.1]
    both = mixed.advantages(rewards, conditions)
    assert torch.equal(both[[0, 2, 4]], alone.advantages([0.1, 0.2, 0.1], [None] * 3))
    assert both[2] > 0 > both[3]


def test_sampling_and_scoring_hear_the_same() -> None:
    space = Chain(4)
    generator = torch.Generator().manual_seed(0)
    policy = RecurrentPolicy([len(d.choices) for d in space.decisions], generator=generator)
    with torch.no_grad():
        policy.condition_weight.normal_(generator=generator)
    conditions = [lambda prefix, k=k: (float(k), 0.3 * sum(prefix)) for k in range(3)]
    for condition in conditions:
        sequences, _ = policy.sample(200, space.mask, space.is_complete, generator, condition=condition)
        distinct = sorted(set(sequences))
        scored = policy(policy.episodes(distinct, space.mask, conditions=[condition] * len(distinct)))
        expected = scored.log_probs.sum(dim=1).exp().tolist()
        for sequence, probability in zip(distinct, expected, strict=True):
            seen = sequences.count(sequence) / 200
            assert abs(seen - probability) < 5 * math.sqrt(probability * (1 - probability) / 200) + 1e-9


def test_without_a_condition_nothing_changes() -> None:
    space = Chain(4)
    policy = RecurrentPolicy([4] * 4, generator=torch.Generator().manual_seed(0))
    sequences = [(1, 2, 0), (3, 1, 2, 1)]
    plain = policy.episodes(sequences, space.mask)
    mixed = policy.episodes(sequences, space.mask, conditions=[None, lambda prefix: (1.0, 0.5)])
    assert plain.conditions is None
    assert mixed.conditions is not None
    assert not mixed.conditions[0].any()
    with torch.no_grad():
        policy.condition_weight.fill_(0.3)
    assert torch.equal(policy(plain).log_probs[0], policy(mixed).log_probs[0])
    assert not torch.equal(policy(plain).log_probs[1], policy(mixed).log_probs[1])


@pytest.mark.parametrize("make", [Reinforce, PPO])
def test_one_controller_learns_what_each_target_wants(make: Callable[..., Strategy]) -> None:
    space = Grid((4, 4, 4))
    strategy = make(space, seed=0, allow_repeats=True)
    found: dict[float, list[float]] = {1.0: [], 8.0: []}
    for number in range(120):
        target = (1.0, 8.0)[number % 2]
        asked = strategy.ask(10, SearchContext(targets={"latency_s": target}))
        wanted = 0 if target == 1.0 else 3
        rewards = [float(np.mean([choice == wanted for choice in a.choices])) for a in asked]
        found[target] += rewards
        strategy.tell(
            [
                Trial(0, number, a, str(a.choices), Measurement(accuracy=r), r)
                for a, r in zip(asked, rewards, strict=True)
            ]
        )
    last = [np.mean(rewards[-200:]) for rewards in found.values()]
    assert np.mean(last) > 0.65  # what is not told the target can do no better than 0.5
