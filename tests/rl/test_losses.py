"""Losses against numbers worked out by hand, and their gradients."""

from __future__ import annotations

import torch

from rlnas_fast.rl.losses import reinforce_loss


def test_reinforce_loss_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
    entropies = torch.tensor([[0.6, 0.4], [0.2, 0.0]])
    loss = reinforce_loss(log_probs, torch.tensor([2.0, -1.0]), entropies, entropy_weight=0.5)
    # -(2 x -3 + 0.5 x 1.0) and -(-1 x -0.5 + 0.5 x 0.2), mean
    torch.testing.assert_close(loss, torch.tensor((5.5 - 0.6) / 2))


def test_the_gradient_of_a_softmax_is_advantage_times_indicator_minus_probability() -> None:
    logits = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
    log_all = torch.log_softmax(logits, dim=1)
    advantages = torch.tensor([1.7])
    reinforce_loss(log_all[:, 1:2], advantages, torch.zeros(1, 1), entropy_weight=0.0).backward()
    expected = -1.7 * (torch.tensor([[0.0, 1.0, 0.0]]) - log_all.exp().detach())
    torch.testing.assert_close(logits.grad, expected)


def test_no_gradient_goes_through_advantages() -> None:
    advantages = torch.ones(1, requires_grad=True)
    log_probs = torch.full((1, 2), -1.0, requires_grad=True)
    reinforce_loss(log_probs, advantages, torch.zeros(1, 2), entropy_weight=0.0).backward()
    assert advantages.grad is None
