"""Targets, tables, schedules and the prefix network against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlnas_fast.rl.q_values import (
    PrefixNetwork,
    double_values,
    epsilon_greedy,
    lambda_returns,
    replay_episode,
)


def test_returns_by_hand() -> None:
    following = torch.tensor([[2.0, 4.0, 7.0], [9.0, 9.0, 9.0]])
    rewards, lengths = torch.tensor([1.0, 5.0]), torch.tensor([3, 1])
    # 1; 0.75 x 4 + 0.25 x 1 = 3.25; 0.75 x 2 + 0.25 x 3.25 = 2.3125; a sequence of one: its reward
    expected = torch.tensor([[2.3125, 3.25, 1.0], [5.0, 0.0, 0.0]])
    torch.testing.assert_close(lambda_returns(rewards, following, lengths, trace=0.25), expected)
    one_step = torch.tensor([[2.0, 4.0, 1.0], [5.0, 0.0, 0.0]])
    torch.testing.assert_close(lambda_returns(rewards, following, lengths, trace=0.0), one_step)
    final = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    torch.testing.assert_close(lambda_returns(rewards, following, lengths, trace=1.0), final)


def test_the_double_estimate_is_what_the_other_network_says_of_the_preferred_choice() -> None:
    online = torch.tensor([[1.0, 3.0, 9.0], [2.0, 1.0, 0.0]])
    frozen = torch.tensor([[5.0, 4.0, 8.0], [-1.0, 7.0, 7.0]])
    masks = torch.tensor([[True, True, False], [True, True, True]])
    assert double_values(online, frozen, masks).tolist() == [4.0, -1.0]


def test_a_replayed_episode_by_hand() -> None:
    table = np.array([[0.0, 1.0], [2.0, 9.0]])
    masks = [np.array([True, True]), np.array([True, False])]
    replay_episode(table, [0, 1], [1, 0], masks, 4.0, rate=0.5, trace=0.25)
    # last: 2 + 0.5 x (4 - 2) = 3.  First: towards 0.75 x 3 + 0.25 x 4 = 3.25, choice 1 there being invalid
    np.testing.assert_allclose(table, [[0.0, 1.0 + 0.5 * 2.25], [3.0, 9.0]])


def test_replaying_a_table_gives_the_returns_of_the_batched_form() -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((4, 3))
    before = table.copy()
    masks = [rng.random(3) < 0.5 for _ in range(4)]
    for mask in masks:
        mask[0] = True
    replay_episode(table, [0, 1, 2, 3], [0, 0, 0, 0], masks, 1.5, rate=1.0, trace=0.6)
    following = [table[step + 1][masks[step + 1]].max() for step in range(3)]  # rate 1: already moved
    returns = lambda_returns(
        torch.tensor([1.5], dtype=torch.float64),
        torch.tensor([[*following, 0.0]]),
        torch.tensor([4]),
        trace=0.6,
    )
    np.testing.assert_allclose(table[:, 0], returns[0].numpy())
    np.testing.assert_array_equal(table[:, 1:], before[:, 1:])


def test_epsilon_greedy_is_greedy_breaks_ties_and_explores_among_the_valid() -> None:
    rng = np.random.default_rng(0)
    values, mask = np.array([1.0, 5.0, 1.0, 9.0]), np.array([True, True, True, False])
    assert {epsilon_greedy(values, mask, 0.0, rng) for _ in range(50)} == {1}
    ties = [epsilon_greedy(np.zeros(4), mask, 0.0, rng) for _ in range(3000)]
    explored = [epsilon_greedy(values, mask, 0.6, rng) for _ in range(3000)]
    # five standard errors of 3000 draws
    assert np.bincount(ties, minlength=4) / 3000 == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.043)
    assert np.bincount(explored, minlength=4) / 3000 == pytest.approx([0.2, 0.6, 0.2, 0], abs=0.045)


def test_the_network_sees_what_was_chosen_before_and_nothing_else() -> None:
    network = PrefixNetwork((3, 2, 4), hidden=8, generator=torch.Generator().manual_seed(0))
    one, other = torch.tensor([[2, 0, 1]]), torch.tensor([[2, 1, 3]])
    assert not network(one).any()  # it starts at 0
    with torch.no_grad():
        network.head_weight.normal_(generator=torch.Generator().manual_seed(1))
    a, b = network(one), network(other)
    torch.testing.assert_close(a[:, :2], b[:, :2])
    assert not torch.allclose(a[:, 2], b[:, 2])
    torch.testing.assert_close(network(torch.tensor([[2, 0]])), a[:, :2])  # a shorter prefix


def test_the_first_layer_is_a_dense_layer_on_one_hot_codes() -> None:
    sizes, hidden = (3, 2, 4), 5
    network = PrefixNetwork(sizes, hidden=hidden, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        network.head_weight.normal_(generator=torch.Generator().manual_seed(3))
    choices = torch.tensor([[2, 1, 0]])
    code = torch.zeros(3, 4, dtype=torch.float64)  # one-hot code of the first two decisions
    code[0, 2] = code[1, 1] = 1.0
    first = torch.relu(code.flatten() @ network.embedding.reshape(12, hidden) + network.position[2])
    second = torch.relu(network.middle.weight @ first + network.middle.bias)
    expected = network.head_weight[2] @ second + network.head_bias[2]
    torch.testing.assert_close(network(choices)[0, 2], expected)
