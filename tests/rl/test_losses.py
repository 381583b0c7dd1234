"""Losses against numbers worked out by hand, and their gradients."""

from __future__ import annotations

import math

import torch

from rlnas_fast.rl.losses import clipped_loss, reinforce_loss, value_loss


def test_reinforce_loss_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
    entropies = torch.tensor([[0.6, 0.4], [0.2, 0.0]])
    advantages = torch.tensor([[2.0, 1.0], [-1.0, 3.0]])
    loss = reinforce_loss(log_probs, advantages, entropies, entropy_weight=0.5)
    # -(2 x -1 + 1 x -2 + 0.5 x 1.0) and -(-1 x -0.5 + 0.5 x 0.2), mean
    torch.testing.assert_close(loss, torch.tensor((3.5 - 0.6) / 2))


def test_the_gradient_of_a_softmax_is_advantage_times_indicator_minus_probability() -> None:
    logits = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
    log_all = torch.log_softmax(logits, dim=1)
    advantages = torch.tensor([[1.7]])
    reinforce_loss(log_all[:, 1:2], advantages, torch.zeros(1, 1), entropy_weight=0.0).backward()
    expected = -1.7 * (torch.tensor([[0.0, 1.0, 0.0]]) - log_all.exp().detach())
    torch.testing.assert_close(logits.grad, expected)


def test_no_gradient_goes_through_advantages() -> None:
    advantages = torch.ones(1, 2, requires_grad=True)
    log_probs = torch.full((1, 2), -1.0, requires_grad=True)
    reinforce_loss(log_probs, advantages, torch.zeros(1, 2), entropy_weight=0.0).backward()
    assert advantages.grad is None


def test_clipped_loss_by_hand() -> None:
    # ratios 2, 0.5, 1.1, 0.5 with clip 0.2; the fifth is padding
    ratios = torch.tensor([[2.0, 0.5, 1.1, 0.5, 9.0]])
    advantages = torch.tensor([[1.0, 1.0, -2.0, -1.0, 7.0]])
    present = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    loss = clipped_loss(ratios.log(), torch.zeros(1, 5), advantages, present, clip=0.2)
    gains = [1.2, 0.5, -2.2, -0.8]
    torch.testing.assert_close(loss, torch.tensor(-sum(gains) / 4))


def test_beyond_the_clip_there_is_no_gradient_for_more() -> None:
    log_probs = torch.tensor([[math.log(1.5), math.log(0.5)]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0]])
    clipped_loss(log_probs, torch.zeros(1, 2), advantages, torch.ones(1, 2), clip=0.2).backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, -0.25]]))


def test_unmoved_it_has_the_gradient_of_reinforce() -> None:
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[3.0, 3.0]])
    clipped_loss(log_probs, log_probs, advantages, torch.ones(1, 2), clip=0.2).backward()
    clipped = log_probs.grad
    log_probs.grad = None
    reinforce_loss(log_probs, torch.full((1, 2), 3.0), torch.zeros(1, 2), entropy_weight=0.0).backward()
    torch.testing.assert_close(clipped, log_probs.grad / 2)  # a mean over decisions, not a sum


def test_value_loss_by_hand() -> None:
    values, returns = torch.tensor([[1.0, 5.0, 0.0]]), torch.tensor([[3.0, 4.0, 9.0]])
    loss = value_loss(values, returns, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(loss, torch.tensor((0.5 * 4 + 0.5 * 1) / 2))
