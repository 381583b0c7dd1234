"""Returns and advantages against numbers worked out by hand."""

from __future__ import annotations

import torch

from rlnas_fast.rl.returns import final_rewards, generalised_advantages

VALUES = torch.tensor([[0.5, 0.2, 0.4], [1.0, 0.0, 0.0]])
PRESENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
REWARDS = torch.tensor([[0.0, 0.0, 2.0], [3.0, 0.0, 0.0]])


def test_rewards_come_at_the_last_decision() -> None:
    placed = final_rewards(torch.tensor([2.0, 3.0]), torch.tensor([3, 1]), 3)
    assert torch.equal(placed, REWARDS)


def test_advantages_by_hand() -> None:
    # differences: 0.9 x 0.2 - 0.5 = -0.32, 0.9 x 0.4 - 0.2 = 0.16, 2 - 0.4 = 1.6; decay 0.9 x 0.5 = 0.45
    advantages = generalised_advantages(REWARDS, VALUES, PRESENT, discount=0.9, trace=0.5)
    last, middle = 1.6, 0.16 + 0.45 * 1.6
    torch.testing.assert_close(
        advantages, torch.tensor([[-0.32 + 0.45 * middle, middle, last], [2.0, 0.0, 0.0]])
    )


def test_with_a_full_trace_it_is_the_return_minus_the_value() -> None:
    advantages = generalised_advantages(REWARDS, VALUES, PRESENT, discount=1.0, trace=1.0)
    expected = (torch.tensor([[2.0], [3.0]]) - VALUES) * PRESENT
    torch.testing.assert_close(advantages, expected)


def test_without_a_trace_it_is_the_one_step_difference() -> None:
    advantages = generalised_advantages(REWARDS, VALUES, PRESENT, discount=1.0, trace=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[-0.3, 0.2, 1.6], [2.0, 0.0, 0.0]]))
