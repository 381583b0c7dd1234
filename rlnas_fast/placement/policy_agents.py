"""Agents that follow the gradient of the expected reward of a policy: REINFORCE and PPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..rl.baselines import MovingAverage, ema_advantages
from ..rl.losses import clipped_loss, reinforce_loss, value_loss
from ..rl.schedules import Schedule, Steps, schedule
from ..rl.threads import one_torch_thread
from .agent_parts import (
    RunningScale,
    check_outcome,
    check_saved,
    checked_state,
    cloned,
    draw,
    greedy,
    learn_step,
    small_network,
)

__all__ = ["PPOAgent", "ReinforceAgent"]


class ReinforceAgent:
    """Follows the gradient of the expected reward of a softmax policy, with a learned baseline.

    Rewards are taken relative to a moving average and in units of its moving deviation; a second head
    learns what is left of them from the state, and an advantage is the reward minus its answer.  The
    policy that acts and learns is (1 - epsilon) softmax + epsilon / A.

    Source: Williams, Simple Statistical Gradient-Following Algorithms (1992); entropy bonus as in Mnih et
    al., Asynchronous Methods for Deep Reinforcement Learning (2016).  Deviation: a reward that comes late
    counts as if the policy of now had made the choice.

    Args:
        hidden: width of both hidden layers; the two heads have a body each.
        learning_rate: of Adam.
        group: rewards to one step.
        entropy_weight: a nat of entropy is worth so many deviations of the reward; a number or a schedule
            over updates, "start:end:updates".
        epsilon: the least that each action gets is epsilon / A; a number or a schedule likewise.
        baseline_decay: weight of the past in the moving average.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        *,
        seed: int,
        hidden: int = 32,
        learning_rate: float = 0.01,
        group: int = 8,
        entropy_weight: float | str = "0.1:0.005:400",
        epsilon: float | str = 0.02,
        baseline_decay: float = 0.98,
    ) -> None:
        if min(hidden, group) < 1 or learning_rate <= 0 or not 0 <= baseline_decay < 1:
            raise ConfigError(
                f"hidden = {hidden}, group = {group}, learning_rate = {learning_rate}, "
                f"baseline_decay = {baseline_decay}: all must be above 0, the decay below 1"
            )
        self._action_count, self._group, self._decay = actions, group, baseline_decay
        self._entropy_weight = schedule("entropy_weight", entropy_weight)
        self._epsilon: Schedule | Steps = schedule("epsilon", epsilon, high=1)
        self._generator = torch.Generator().manual_seed(seed)
        self._scale = RunningScale(features)
        self._policy = small_network(features, hidden, actions, self._generator)
        self._value = small_network(features, hidden, 1, self._generator)
        parameters = [*self._policy.parameters(), *self._value.parameters()]
        self._optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
        self._average = MovingAverage()
        self._waiting: list[tuple[Tensor, int, float]] = []
        self._told = 0

    def select(self, state: Tensor, *, explore: bool = True) -> int:
        probabilities = self.probabilities(state)
        return draw(probabilities if explore else greedy(probabilities, 0.0), self._generator)

    @torch.no_grad()
    def probabilities(self, state: Tensor) -> Tensor:
        return self._log_probs(self._scale(checked_state(state, self._scale.features))).exp()

    def update(self, state: Tensor, action: int, reward: float) -> None:
        state = checked_state(state, self._scale.features)
        check_outcome(action, reward, self._action_count)
        self._scale.add(state)
        (relative,), self._average = ema_advantages(
            torch.tensor([reward], dtype=torch.float64), self._average, decay=self._decay
        )
        self._told += 1
        self._waiting.append((state, action, float(relative) / max(self._average.deviation, 1e-8)))
        if len(self._waiting) == self._group:
            states, actions, rewards = zip(*self._waiting, strict=True)
            self._waiting = []
            with one_torch_thread(), torch.enable_grad():
                self._learn(
                    self._scale(torch.stack(states)),
                    torch.tensor(actions)[:, None],
                    torch.tensor(rewards).clamp(-5, 5)[:, None],
                )

    def state_dict(self) -> dict[str, Any]:
        average = self._average
        return {
            "policy": cloned(self._policy.state_dict()),
            "value": cloned(self._value.state_dict()),
            "optimizer": cloned(self._optimizer.state_dict()),
            "average": [average.total, average.square, average.weight, average.square_weight],
            "waiting": [(state.clone(), action, reward) for state, action, reward in self._waiting],
            "told": self._told,
            "scale": self._scale.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_saved(state, self.state_dict())
        self._policy.load_state_dict(state["policy"])
        self._value.load_state_dict(state["value"])
        self._optimizer.load_state_dict(cloned(state["optimizer"]))
        self._average = MovingAverage(*state["average"])
        self._waiting = [(kept.clone(), action, reward) for kept, action, reward in state["waiting"]]
        self._told = state["told"]
        self._scale.load_state_dict(state["scale"])
        self._generator.set_state(state["generator"])

    def _learn(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None:
        """One step on a group: standardised states [B, F], actions int64 [B, 1], scaled rewards [B, 1]."""
        log_probs, entropies, values = self._scored(states, actions)
        loss = reinforce_loss(
            log_probs, rewards - values, entropies, entropy_weight=self._entropy_weight.at(self._told)
        )
        learn_step(self._optimizer, loss + value_loss(values, rewards, torch.ones_like(values)))

    def _scored(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of ``actions``, entropies in nats, and the baseline: three float [B, 1]."""
        log_all = self._log_probs(states)
        entropies = -(log_all.exp() * log_all).sum(dim=1, keepdim=True)
        return log_all.gather(1, actions), entropies, self._value(states)

    def _log_probs(self, states: Tensor) -> Tensor:
        """Float [..., A] for standardised states [..., F]."""
        chosen: Tensor = self._policy(states).softmax(dim=-1)
        epsilon = self._epsilon.at(self._told)
        return ((1 - epsilon) * chosen + epsilon / chosen.shape[-1]).clamp_min(1e-12).log()


class PPOAgent(ReinforceAgent):
    """Like ``ReinforceAgent``, with several clipped steps on each group.

    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), eq. 7.  Deviation: the old
    policy is that of the time when a group is full, as rewards of a group come later than its choices.

    Args:
        hidden, learning_rate, entropy_weight, epsilon, baseline_decay: as for ``ReinforceAgent``.
        group: rewards to one round of steps.
        epochs: steps of Adam a group.
        clip: how far the probability of a choice may move in a round, as a ratio.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        *,
        seed: int,
        hidden: int = 32,
        learning_rate: float = 0.005,
        group: int = 32,
        epochs: int = 8,
        clip: float = 0.2,
        entropy_weight: float | str = "0.05:0.005:400",
        epsilon: float | str = 0.02,
        baseline_decay: float = 0.98,
    ) -> None:
        if epochs < 1 or not 0 < clip < 1:
            raise ConfigError(f"epochs = {epochs}, clip = {clip}: give at least 1, and between 0 and 1")
        super().__init__(
            features, actions, seed=seed, hidden=hidden, learning_rate=learning_rate, group=group,
            entropy_weight=entropy_weight, epsilon=epsilon, baseline_decay=baseline_decay,
        )  # fmt: skip
        self._epochs, self._clip = epochs, clip

    def _learn(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None:
        with torch.no_grad():
            old, _, values = self._scored(states, actions)
            advantages = rewards - values
        everything = torch.ones_like(advantages)
        for _ in range(self._epochs):
            log_probs, entropies, values = self._scored(states, actions)
            loss = clipped_loss(log_probs, old, advantages, everything, clip=self._clip)
            loss = loss - self._entropy_weight.at(self._told) * entropies.mean()
            learn_step(self._optimizer, loss + value_loss(values, rewards, everything))
