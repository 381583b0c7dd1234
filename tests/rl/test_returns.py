"""Returns and advantages against numbers worked out by hand."""

from __future__ import annotations

import torch

from rlnas_fast.rl.returns import final_rewards, generalised_advantages, v_trace

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


def test_v_trace_by_hand() -> None:
    ratios = torch.tensor([[0.5, 3.0, 1.0], [2.0, 7.0, 7.0]])
    targets, advantages = v_trace(ratios.log(), REWARDS, VALUES, PRESENT, discount=0.9, largest_weight=1.5)
    # weights 0.5, 1.5, 1 and traces 0.5, 1, 1; differences as above: 0.5 x -0.32, 1.5 x 0.16, 1.6
    last, middle = 1.6, 0.24 + 0.9 * 1.6
    first = -0.16 + 0.9 * 0.5 * middle
    torch.testing.assert_close(
        targets, torch.tensor([[0.5 + first, 0.2 + middle, 0.4 + last], [1.0 + 1.5 * 2.0, 0.0, 0.0]])
    )
    by_hand = [0.5 * (0.9 * (0.2 + middle) - 0.5), 1.5 * (0.9 * 2.0 - 0.2), 1.6]
    torch.testing.assert_close(advantages, torch.tensor([by_hand, [3.0, 0.0, 0.0]]))


def test_v_trace_of_the_policy_itself_gives_the_returns() -> None:
    targets, advantages = v_trace(
        torch.zeros(2, 3), REWARDS, VALUES, PRESENT, discount=1.0, largest_weight=1.0
    )
    torch.testing.assert_close(targets, torch.tensor([[2.0], [3.0]]) * PRESENT)
    torch.testing.assert_close(
        advantages, generalised_advantages(REWARDS, VALUES, PRESENT, discount=1.0, trace=1.0)
    )
