"""Values of decisions: targets, tables and a network that reads a prefix.

B sequences of T decisions with at most C choices each; a sequence's one reward comes at its end, and
nothing is discounted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


def lambda_returns(rewards: Tensor, next_values: Tensor, lengths: Tensor, *, trace: float) -> Tensor:
    """What each decision led to: the final reward, mixed with the values met on the way.

    target(t) = (1 - trace) x next_values(t) + trace x target(t + 1), and the reward at the last decision.
    With trace 0 it is the one-step target of Q-learning, with 1 the final reward itself.

    Source: Peng and Williams, Incremental Multi-Step Q-Learning (1996), the uncorrected return.

    Args:
        rewards: float [B].
        next_values: float [B, T], of the best next decision after each; unused at the last and after it.
        lengths: int64 [B], at least 1.
        trace: lambda, 0 to 1.
    Returns:
        Float [B, T]; 0 after the end of a sequence.
    """
    steps = next_values.shape[1]
    target = torch.zeros_like(rewards)
    columns = []
    for step in reversed(range(steps)):
        later = (1 - trace) * next_values[:, step] + trace * target
        target = torch.where(lengths - 1 == step, rewards, later)
        target = torch.where(lengths > step, target, torch.zeros_like(target))
        columns.append(target)
    return torch.stack(columns[::-1], dim=1)


def double_values(online: Tensor, frozen: Tensor, masks: Tensor) -> Tensor:
    """The value of the decision that ``online`` prefers, as ``frozen`` sees it.

    Source: van Hasselt et al., Deep Reinforcement Learning with Double Q-Learning (2016), eq. 4.

    Args:
        online, frozen: float [..., C].
        masks: bool [..., C], at least one True in each row.
    Returns:
        Float [...].
    """
    best = online.masked_fill(~masks, -torch.inf).argmax(dim=-1, keepdim=True)
    return frozen.gather(-1, best).squeeze(-1)


def replay_episode(
    table: np.ndarray,
    states: Sequence[int],
    actions: Sequence[int],
    masks: Sequence[np.ndarray],
    reward: float,
    *,
    rate: float,
    trace: float,
) -> None:
    """Moves the values of one episode's decisions towards their ``lambda_returns``, the last one first.

    Args:
        table: float [states, C]; changed in place.
        states, actions: T of them, rows and columns of ``table``.
        masks: for each decision, bool [C]: what was valid.
        rate: how far to move, 0 to 1.
    """
    target = reward
    for step in reversed(range(len(states))):
        if step < len(states) - 1:
            best = table[states[step + 1]][masks[step + 1]].max()
            target = (1 - trace) * best + trace * target
        row = table[states[step]]
        row[actions[step]] += rate * (target - row[actions[step]])


def epsilon_greedy(values: np.ndarray, mask: np.ndarray, epsilon: float, rng: np.random.Generator) -> int:
    """The best valid choice, ties broken at random; with probability ``epsilon`` any valid one.

    Args:
        values: float [C].
        mask: bool [C].
    """
    valid = np.flatnonzero(mask)
    if rng.random() >= epsilon:
        valid = valid[values[valid] == values[valid].max()]
    return int(valid[rng.integers(len(valid))])


class PrefixNetwork(nn.Module):
    """Reads the choices made so far and answers with a number for each choice of the next decision.

    One hidden layer sees the sum of the embeddings of what was chosen at each decision (which is a dense
    layer on their one-hot codes), a second one follows, and each decision has its own output weights,
    which start at 0.

    Args:
        sizes: how many choices each decision has, [T].
        hidden: width of both layers.
        generator: draws the initial weights.
    """

    def __init__(self, sizes: Sequence[int], *, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        steps, widest = len(sizes), max(sizes)
        self.embedding = nn.Parameter(torch.empty(steps, widest, hidden))
        self.position = nn.Parameter(torch.empty(steps, hidden))
        self.middle = nn.Linear(hidden, hidden)
        self.head_weight = nn.Parameter(torch.zeros(steps, widest, hidden))
        self.head_bias = nn.Parameter(torch.zeros(steps, widest))
        with torch.no_grad():
            for parameter, inputs in (
                (self.embedding, steps),
                (self.position, 1),
                (self.middle.weight, hidden),
                (self.middle.bias, hidden),
            ):
                bound = inputs**-0.5
                parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, choices: Tensor) -> Tensor:
        """Float [B, T, C] for the choices int64 [B, T]: row t depends on those before t alone."""
        steps = choices.shape[1]
        chosen = self.embedding[torch.arange(steps), choices]
        before = chosen.cumsum(dim=1) - chosen
        hidden = torch.relu(before + self.position[:steps])
        hidden = torch.relu(self.middle(hidden))
        return torch.einsum("bth,tch->btc", hidden, self.head_weight[:steps]) + self.head_bias[:steps]
