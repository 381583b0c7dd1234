"""Soft values and the temperature against numbers worked out by hand."""

from __future__ import annotations

import math

import torch
from torch.distributions import Categorical

from rlnas_fast.rl.policies import masked_log_softmax
from rlnas_fast.rl.soft import soft_values, temperature_loss


def test_soft_values_by_hand() -> None:
    log_probs = torch.tensor([0.25, 0.75]).log()
    first, second = torch.tensor([4.0, 1.0]), torch.tensor([2.0, 8.0])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = torch.tensor(0.25 * 2 + 0.75 * 1 + 0.5 * entropy)
    torch.testing.assert_close(soft_values(log_probs, first, second, torch.tensor(0.5)), expected)


def test_the_best_policy_is_the_softmax_of_the_values_and_its_worth_their_soft_maximum() -> None:
    values = torch.tensor([0.3, -1.0, 0.9, 5.0])
    mask = torch.tensor([True, True, True, False])
    temperature = torch.tensor(0.7)
    best = masked_log_softmax(values / temperature, mask)
    worth = soft_values(best, values, values, temperature)
    torch.testing.assert_close(worth, temperature * (values[:3] / temperature).logsumexp(dim=0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = masked_log_softmax(values / temperature + torch.randn(4, generator=generator), mask)
        assert soft_values(other, values, values, temperature) < worth


def test_entropy_is_that_of_torch_distributions() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    worth = soft_values(logits.log_softmax(dim=-1), torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor(2.0))
    torch.testing.assert_close(worth, 2 * Categorical(logits=logits).entropy())


def test_the_temperature_grows_where_entropy_is_missing() -> None:
    log_temperature = torch.tensor(math.log(0.5), requires_grad=True)
    entropies = torch.tensor([[0.2, 0.4, 9.0]], requires_grad=True)
    present = torch.tensor([[1.0, 1.0, 0.0]])
    loss = temperature_loss(log_temperature, entropies, torch.full((1, 3), 0.5), present)
    torch.testing.assert_close(loss, torch.tensor(0.5 * -0.2))  # (-0.3 - 0.1) / 2
    loss.backward()
    assert log_temperature.grad is not None
    assert log_temperature.grad < 0  # a step down the loss raises it
    assert entropies.grad is None
