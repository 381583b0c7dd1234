"""Agents that choose the stage which gets the non-local block: what all of them keep to, and their names.

Each decision is an episode of its own: an agent sees a state, chooses, and is told much later what the
choice was worth.  There is no next state to look forward from, so the value of an action is its expected
reward, and nothing is discounted.  F features of a state, S stages, A = S + 1 actions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ..errors import ConfigError, unknown_name
from .policy_agents import PPOAgent, ReinforceAgent
from .value_agents import DQNAgent, QTableAgent

__all__ = ["AGENTS", "DQNAgent", "PPOAgent", "QTableAgent", "ReinforceAgent", "StageAgent", "make_agent"]


class StageAgent(Protocol):
    """Chooses an action for a state.  Action 0 is "none", 1 to S are the stages."""

    def select(self, state: Tensor, *, explore: bool = True) -> int:
        """The action for a state, float32 [F]; without ``explore`` the one that is thought best."""
        ...

    def update(self, state: Tensor, action: int, reward: float) -> None:
        """Learns what ``action``, taken in ``state`` at any time before, turned out to be worth."""
        ...

    def probabilities(self, state: Tensor) -> Tensor:
        """Float32 [A], with which ``select`` would choose each action now if it explores."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on bit for bit; ``torch.load(..., weights_only=True)`` reads it back."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict`` of an agent of the same kind, features, actions and options."""
        ...


def make_agent(name: str, features: int, actions: int, *, seed: int, **options: Any) -> StageAgent:
    """Makes an agent by its name.

    Args:
        name: "q-table", "dqn", "reinforce" or "ppo".
        features: F, length of a state.
        actions: A, stages and "none".
        seed: of everything that it draws.
        options: of its class.
    Raises:
        ConfigError: an unknown name or option, or a value out of range.
    """
    if name not in AGENTS:
        raise unknown_name("agent", name, AGENTS)
    if features < 1 or actions < 2:
        raise ConfigError(f"features = {features}, actions = {actions}: give at least 1 and 2")
    known = set(inspect.signature(AGENTS[name]).parameters) - {"features", "actions", "seed"}
    for option in options:
        if option not in known:
            raise unknown_name(f"option of agent {name!r}", option, known)
    return AGENTS[name](features, actions, seed=seed, **options)


AGENTS: dict[str, Callable[..., StageAgent]] = {
    "q-table": QTableAgent,
    "dqn": DQNAgent,
    "reinforce": ReinforceAgent,
    "ppo": PPOAgent,
}
