"""Agents that learn what each action is worth: tabular and deep Q-learning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..rl.losses import value_loss
from ..rl.schedules import schedule
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

__all__ = ["DQNAgent", "QTableAgent"]


class QTableAgent:
    """Keeps a table of values, one row for each kind of state it has met, and explores epsilon-greedily.

    A state belongs to the nearest row's prototype.  One that is further than ``radius`` from all of them
    founds a row of its own while there is room.  What was never tried in a row counts as best while
    exploring (optimism, Sutton and Barto 2018, section 2.6) and as worst otherwise.

    Source: Watkins and Dayan, Q-Learning (1992); rows by the leader algorithm of Hartigan, Clustering
    Algorithms (1975).  Deviation: the rate is 1 / visits until it has fallen to ``learning_rate``.

    Args:
        radius: root mean square distance over the features, in their running standard deviations.
        rows: most of them.
        learning_rate: of a value towards a reward, once it has been visited 1 / ``learning_rate`` times.
        epsilon: probability of a uniform draw; a number or a schedule over updates, "start:end:updates".
    """

    def __init__(
        self,
        features: int,
        actions: int,
        *,
        seed: int,
        radius: float = 0.5,
        rows: int = 32,
        learning_rate: float = 0.02,
        epsilon: float | str = "0.5:0.05:200",
    ) -> None:
        if radius <= 0 or rows < 1 or not 0 < learning_rate <= 1:
            raise ConfigError(
                f"radius = {radius}, rows = {rows}, learning_rate = {learning_rate}: "
                "all must be above 0, the rate at most 1"
            )
        self._radius, self._rate = radius, learning_rate
        self._epsilon = schedule("epsilon", epsilon, high=1)
        self._generator = torch.Generator().manual_seed(seed)
        self._scale = RunningScale(features)
        self._prototypes = torch.zeros(rows, features)
        self._values = torch.zeros(rows, actions, dtype=torch.float64)
        self._visits = torch.zeros(rows, actions, dtype=torch.int64)
        self._founded = 0
        self._updates = 0

    def select(self, state: Tensor, *, explore: bool = True) -> int:
        if explore:
            return draw(self.probabilities(state), self._generator)
        return draw(greedy(self._row_values(state, untried=-math.inf), 0.0), self._generator)

    def probabilities(self, state: Tensor) -> Tensor:
        return greedy(self._row_values(state, untried=math.inf), self._epsilon.at(self._updates))

    def update(self, state: Tensor, action: int, reward: float) -> None:
        state = checked_state(state, self._scale.features)
        check_outcome(action, reward, self._values.shape[1])
        self._scale.add(state)
        self._updates += 1
        row, distance = self._nearest(state)
        if distance > self._radius and self._founded < len(self._prototypes):
            row = self._founded
            self._prototypes[row] = state
            self._founded += 1
        self._visits[row, action] += 1
        rate = max(1 / int(self._visits[row, action]), self._rate)
        self._values[row, action] += rate * (reward - self._values[row, action])

    def state_dict(self) -> dict[str, Any]:
        return {
            "prototypes": self._prototypes.clone(),
            "values": self._values.clone(),
            "visits": self._visits.clone(),
            "founded": self._founded,
            "updates": self._updates,
            "scale": self._scale.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_saved(state, self.state_dict())
        self._prototypes = state["prototypes"].clone()
        self._values, self._visits = state["values"].clone(), state["visits"].clone()
        self._founded, self._updates = state["founded"], state["updates"]
        self._scale.load_state_dict(state["scale"])
        self._generator.set_state(state["generator"])

    def _nearest(self, state: Tensor) -> tuple[int, float]:
        if not self._founded:
            return 0, math.inf
        apart = self._scale(self._prototypes[: self._founded]) - self._scale(state)
        distance, row = apart.square().mean(dim=1).sqrt().min(dim=0)
        return int(row), float(distance)

    def _row_values(self, state: Tensor, *, untried: float) -> Tensor:
        row, _ = self._nearest(checked_state(state, self._scale.features))
        return self._values[row].masked_fill(self._visits[row] == 0, untried)


class DQNAgent:
    """Predicts the reward of every action with a small network that learns from remembered decisions.

    Source: Mnih et al., Human-Level Control through Deep Reinforcement Learning (2015).  Deviations: an
    episode is one decision, so a target is its reward and no target network is needed; rewards are
    standardised by those in memory.

    Args:
        hidden: width of both hidden layers.
        learning_rate: of Adam.
        updates: steps of Adam after each reward.
        batch: remembered decisions in each step.
        memory: how many decisions are kept, the latest.
        epsilon: probability of a uniform draw; a number or a schedule over updates, "start:end:updates".
    """

    def __init__(
        self,
        features: int,
        actions: int,
        *,
        seed: int,
        hidden: int = 32,
        learning_rate: float = 0.003,
        updates: int = 2,
        batch: int = 32,
        memory: int = 4096,
        epsilon: float | str = "1:0.05:200",
    ) -> None:
        if min(hidden, updates, batch, memory) < 1 or learning_rate <= 0:
            raise ConfigError(
                f"hidden = {hidden}, updates = {updates}, batch = {batch}, memory = {memory}, "
                f"learning_rate = {learning_rate}: all must be above 0"
            )
        self._action_count, self._updates, self._batch = actions, updates, batch
        self._epsilon = schedule("epsilon", epsilon, high=1)
        self._generator = torch.Generator().manual_seed(seed)
        self._scale = RunningScale(features)
        self._network = small_network(features, hidden, actions, self._generator)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=learning_rate, fused=True)
        self._states = torch.zeros(memory, features)
        self._actions = torch.zeros(memory, dtype=torch.int64)
        self._rewards = torch.zeros(memory)
        self._told = 0

    def select(self, state: Tensor, *, explore: bool = True) -> int:
        probabilities = self.probabilities(state) if explore else greedy(self._values(state), 0.0)
        return draw(probabilities, self._generator)

    def probabilities(self, state: Tensor) -> Tensor:
        return greedy(self._values(state), self._epsilon.at(self._told))

    def update(self, state: Tensor, action: int, reward: float) -> None:
        state = checked_state(state, self._scale.features)
        check_outcome(action, reward, self._action_count)
        self._scale.add(state)
        slot = self._told % len(self._states)
        self._states[slot], self._actions[slot], self._rewards[slot] = state, action, reward
        self._told += 1
        with one_torch_thread(), torch.enable_grad():
            for _ in range(self._updates):
                self._learn()

    def state_dict(self) -> dict[str, Any]:
        known = min(self._told, len(self._states))
        return {
            "network": cloned(self._network.state_dict()),
            "optimizer": cloned(self._optimizer.state_dict()),
            "states": self._states[:known].clone(),
            "actions": self._actions[:known].clone(),
            "rewards": self._rewards[:known].clone(),
            "told": self._told,
            "scale": self._scale.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_saved(state, self.state_dict(), growing=("states", "actions", "rewards"))
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(cloned(state["optimizer"]))
        known = len(state["rewards"])
        self._states[:known], self._actions[:known] = state["states"], state["actions"]
        self._rewards[:known] = state["rewards"]
        self._told = state["told"]
        self._scale.load_state_dict(state["scale"])
        self._generator.set_state(state["generator"])

    def _learn(self) -> None:
        known = min(self._told, len(self._states))
        rows = torch.randint(known, (self._batch,), generator=self._generator)
        rewards = self._rewards[:known]
        centre, spread = rewards.mean(), rewards.std(correction=0).clamp_min(1e-8)
        values = self._network(self._scale(self._states[rows]))
        chosen = values.gather(1, self._actions[rows, None])
        wanted = (rewards[rows, None] - centre) / spread
        learn_step(self._optimizer, value_loss(chosen, wanted, torch.ones_like(chosen)))

    @torch.no_grad()
    def _values(self, state: Tensor) -> Tensor:
        values: Tensor = self._network(self._scale(checked_state(state, self._scale.features)))
        return values
