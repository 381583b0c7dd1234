"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rlnas_fast.rl.baselines import MovingAverage, ema_advantages

# Rewards 1, 3, 2 with decay 1/2.  Sums of weighted rewards 0.5, 1.75, 1.875; of weights 0.5, 0.75, 0.875.
REWARDS = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
BY_HAND = [0.0, 3.0 - 1.0, 2.0 - 1.75 / 0.75]


def test_advantages_by_hand() -> None:
    advantages, average = ema_advantages(REWARDS, MovingAverage(), decay=0.5)
    assert advantages.tolist() == pytest.approx(BY_HAND)
    assert average.mean == pytest.approx(1.875 / 0.875)
    squares = 0.5 * (0.5 * BY_HAND[1] ** 2) + 0.5 * BY_HAND[2] ** 2
    assert average.deviation == pytest.approx((squares / 0.75) ** 0.5)


def test_batches_do_not_matter() -> None:
    whole, average = ema_advantages(REWARDS, MovingAverage(), decay=0.5)
    state = MovingAverage()
    parts = []
    for reward in REWARDS:
        part, state = ema_advantages(reward[None], state, decay=0.5)
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)
    assert state == average


def test_nothing_seen_is_zero() -> None:
    assert MovingAverage().mean == 0.0
    assert MovingAverage().deviation == 0.0


def test_a_constant_reward_has_no_advantage() -> None:
    advantages, average = ema_advantages(torch.full((5,), 0.25), MovingAverage(), decay=0.75)
    assert advantages.tolist() == [0.0] * 5
    assert average.deviation == 0.0
