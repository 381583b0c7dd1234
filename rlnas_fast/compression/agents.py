"""Agents that decide about layers and about groups of weights: PPO and deep Q-learning, and PPO for numbers.

The document's agent step, ``probabilities = policy(state); action = sample(probabilities)``, for any number
of decisions at once.  A decision is described by R rows of F features and chooses one of A actions of one of
its
rows: an upper agent decides once about R layers, a lower one decides about thousands of groups with R = 1.
One network reads all rows, so it is one policy however many layers or groups there are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..rl.baselines import MovingAverage, ema_advantages
from ..rl.losses import clipped_loss, value_loss
from ..rl.policies import entropy, masked_log_softmax
from ..rl.q_values import double_values, epsilon_greedy
from ..rl.schedules import schedule

__all__ = ["DQN", "PPO", "Agent", "GaussianPPO"]

_MOST_ROWS = 1024  # decisions of one reward that are learned from; more of them say the same


class Agent(Protocol):
    """Decides, and learns from the reward that its decisions led to."""

    def act(self, states: Tensor, allowed: Tensor | None = None) -> Tensor:
        """One action for each decision.

        Args:
            states: float32 [B, R, F].
            allowed: bool [B, R * A], at least one True in each row; None allows all.

        Returns:
            int64 [B], row * A + action.
        """
        ...

    def learn(self, reward: float) -> None:
        """Takes the reward that all decisions since the last call share."""
        ...


class _Scores(nn.Module):
    """One number for every action of every row: [B, R, F] to [B, R * A]; ``start`` of them at first."""

    def __init__(self, features: int, start: Tensor, hidden: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Linear(features, hidden)
            self.head = nn.Linear(hidden, len(start))
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.copy_(start)

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.body(states)))
        return found.flatten(1)


@dataclass(frozen=True, eq=False)
class _Decision:
    """What was decided: states [B, R, F], allowed [B, C], actions [B], log-probabilities [B]."""

    states: Tensor
    allowed: Tensor
    actions: Tensor
    log_probs: Tensor


class PPO:
    """Proximal policy optimisation; all decisions of one reward share its advantage.

    Rewards are compared with a moving average of those before, in units of their deviation.

    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), eq. 7.  Deviation: a reward is
    the whole return of the decisions before it, and a moving average takes the place of the critic.

    Args:
        features: F.
        start: logits of the A actions before anything was learned, float32 [A].
        seed: of the network and of every draw.
        group: rewards between two updates.
        epochs: steps of Adam in an update.
        clip: of the ratio of probabilities.
        entropy_weight: of the bonus, in deviations of the reward a nat.
        decay: weight of the past in the moving average.
    """

    def __init__(
        self,
        features: int,
        start: Tensor,
        *,
        seed: int,
        hidden: int = 32,
        learning_rate: float = 0.01,
        group: int = 4,
        epochs: int = 8,
        clip: float = 0.2,
        entropy_weight: float = 0.01,
        decay: float = 0.8,
    ) -> None:
        self.policy = _Scores(features, start, hidden, seed)
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=learning_rate)
        self._chance = torch.Generator().manual_seed(seed)
        self._group, self._epochs, self._clip = group, epochs, clip
        self._entropy_weight, self._decay = entropy_weight, decay
        self._average = MovingAverage()
        self._open: list[_Decision] = []
        self._waiting: list[tuple[_Decision, float]] = []

    @torch.no_grad()
    def act(self, states: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Draws one action a decision from the softmax (a roulette wheel); see ``Agent``."""
        logits = self.policy(states)
        allowed = torch.ones_like(logits, dtype=torch.bool) if allowed is None else allowed
        log_probs = masked_log_softmax(logits, allowed)
        actions = torch.multinomial(log_probs.exp(), 1, generator=self._chance)
        chosen = log_probs.gather(1, actions)[:, 0]
        self._open.append(_Decision(states, allowed, actions[:, 0], chosen))
        return actions[:, 0]

    def learn(self, reward: float) -> None:
        """Takes a reward, and improves the policy whenever ``group`` of them came in."""
        advantage, self._average = _in_deviations(reward, self._average, self._decay)
        self._waiting += [(_some(decision, self._chance), advantage) for decision in self._open]
        self._open = []
        if len(self._waiting) < self._group:
            return
        waiting, self._waiting = self._waiting, []
        for _ in range(self._epochs):
            loss = torch.zeros(())
            for decision, advantage in waiting:
                every = masked_log_softmax(self.policy(decision.states), decision.allowed)
                new = every.gather(1, decision.actions[:, None])[:, 0]
                ones = torch.ones_like(new)
                gain = clipped_loss(
                    new[None], decision.log_probs[None], advantage * ones[None], ones[None], clip=self._clip
                )
                loss = loss + gain - self._entropy_weight * entropy(every).mean()
            self._optimizer.zero_grad()
            torch.autograd.backward(loss / len(waiting))
            self._optimizer.step()


class DQN:
    """Double deep Q-learning with a replay memory and a slowly following target network.

    Source: Mnih et al., Human-level Control through Deep Reinforcement Learning (2015); van Hasselt et al.
    (2016), eq. 4.  Deviation: rewards are taken relative to their moving average, in units of its deviation.

    Args:
        features: F.
        start: values of the A actions before anything was learned, float32 [A].
        seed: of the network and of every draw.
        epsilon: probability of a uniform draw, a number or a schedule over rewards.
        discount: of the value of the next decision (of as many rows); 0 where decisions end with their
            reward.
        updates: steps of Adam after each reward.
        batch: transitions in each.
        target_rate: how far the target network moves in each.
    """

    def __init__(
        self,
        features: int,
        start: Tensor,
        *,
        seed: int,
        hidden: int = 32,
        learning_rate: float = 0.01,
        epsilon: float | str = "0.5:0.1:40",
        discount: float = 0.5,
        updates: int = 4,
        batch: int = 16,
        target_rate: float = 0.1,
        decay: float = 0.8,
    ) -> None:
        self.policy = _Scores(features, start, hidden, seed)
        self._target = copy.deepcopy(self.policy)
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=learning_rate)
        self._rng = np.random.default_rng(seed)
        self._chance = torch.Generator().manual_seed(seed)
        self._epsilon = schedule("epsilon", epsilon, high=1)
        self._discount, self._updates, self._batch = discount, updates, batch
        self._target_rate, self._decay = target_rate, decay
        self._average, self._rewards = MovingAverage(), 0
        self._open: list[_Decision] = []
        self._memory: list[tuple[_Decision, float]] = []

    @torch.no_grad()
    def act(self, states: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The action of the highest value, or any with probability epsilon; see ``Agent``."""
        values = self.policy(states)
        allowed = torch.ones_like(values, dtype=torch.bool) if allowed is None else allowed
        epsilon = self._epsilon.at(self._rewards)
        found = [
            epsilon_greedy(row, mask, epsilon, self._rng)
            for row, mask in zip(values.numpy(), allowed.numpy(), strict=True)
        ]
        actions = torch.tensor(found)
        self._open.append(_Decision(states, allowed, actions, torch.zeros(len(actions))))
        return actions

    def learn(self, reward: float) -> None:
        """Remembers what was decided, with the reward, and learns from some of what is remembered."""
        scaled, self._average = _in_deviations(reward, self._average, self._decay)
        self._rewards += 1
        self._memory += [(_some(decision, self._chance), scaled) for decision in self._open]
        self._open = []
        for _ in range(self._updates if self._memory else 0):
            rows = self._rng.integers(len(self._memory), size=self._batch)
            loss = torch.stack([self._loss(int(row)) for row in rows]).mean()
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(self._target.parameters(), self.policy.parameters(), strict=True):
                    slow.lerp_(fast, self._target_rate)

    def _loss(self, row: int) -> Tensor:
        decision, reward = self._memory[row]
        chosen = self.policy(decision.states).gather(1, decision.actions[:, None])[:, 0]
        wanted = torch.full_like(chosen, reward)
        following = self._memory[row + 1][0] if row + 1 < len(self._memory) else None
        if self._discount and following is not None and len(following.states) == len(decision.states):
            with torch.no_grad():
                online, frozen = self.policy(following.states), self._target(following.states)
            wanted = wanted + self._discount * double_values(online, frozen, following.allowed)
        return value_loss(chosen, wanted, torch.ones_like(chosen))


class GaussianPPO:
    """Chooses a vector of numbers from independent normal distributions, and moves their means by PPO.

    Draws come in mirrored pairs around the means, which halves the noise of what is learned from them.

    Source: Schulman et al. (2017), eq. 7, on the parameters of a policy, as in Sehnke et al.,
    Parameter-exploring Policy Gradients (2010).

    Args:
        deviation: of each number, float32 [D]; the means start at 0.
        seed: of every draw.
        group: rewards between two updates, an even number.
        learning_rate: of the means, in deviations.
        shrink: factor on the deviations after each update.
    """

    def __init__(
        self,
        deviation: Tensor,
        *,
        seed: int,
        group: int = 6,
        epochs: int = 8,
        learning_rate: float = 0.1,
        clip: float = 0.2,
        shrink: float = 0.93,
    ) -> None:
        self.mean = torch.zeros_like(deviation)
        self.deviation = deviation.clone()
        self._chance = torch.Generator().manual_seed(seed)
        self._group, self._epochs, self._clip = group, epochs, clip
        self._learning_rate, self._shrink = learning_rate, shrink
        self._mirror: Tensor | None = None
        self._drawn: list[Tensor] = []
        self._rewards: list[float] = []

    def act(self) -> Tensor:
        """The next vector, float32 [D]."""
        if self._mirror is None:
            noise = torch.randn(len(self.mean), generator=self._chance)
            self._mirror = -noise
        else:
            noise, self._mirror = self._mirror, None
        self._drawn.append(noise)
        return self.mean + self.deviation * noise

    def learn(self, reward: float) -> None:
        """Takes the reward of the last vector, and moves the means whenever ``group`` of them came in."""
        self._rewards.append(reward)
        if len(self._rewards) < self._group:
            return
        noise = torch.stack(self._drawn)
        rewards = torch.tensor(self._rewards)
        self._drawn, self._rewards = [], []
        scaled = (rewards - rewards.mean()) / rewards.std(correction=0).clamp_min(1e-6)
        moved = torch.zeros_like(self.mean, requires_grad=True)
        optimizer = torch.optim.Adam([moved], lr=self._learning_rate)
        ones = torch.ones_like(noise)
        for _ in range(self._epochs):
            log_probs, before = -((noise - moved) ** 2) / 2, -(noise**2) / 2
            loss = clipped_loss(log_probs, before, scaled[:, None] * ones, ones, clip=self._clip)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        self.mean = self.mean + self.deviation * moved.detach()
        self.deviation = self.deviation * self._shrink


def _in_deviations(reward: float, average: MovingAverage, decay: float) -> tuple[float, MovingAverage]:
    """The reward relative to those before, at most 3 deviations off, and the average after it."""
    advantages, after = ema_advantages(torch.tensor([reward], dtype=torch.float64), average, decay=decay)
    return max(-3.0, min(3.0, float(advantages) / (after.deviation or 1.0))), after


def _some(decision: _Decision, chance: torch.Generator) -> _Decision:
    """At most ``_MOST_ROWS`` of the decisions."""
    count = len(decision.actions)
    if count <= _MOST_ROWS:
        return decision
    rows = torch.randperm(count, generator=chance)[:_MOST_ROWS]
    return _Decision(
        decision.states[rows], decision.allowed[rows], decision.actions[rows], decision.log_probs[rows]
    )
