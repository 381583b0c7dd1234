"""Building a network choice by choice, as Gymnasium environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded

from ..errors import ConfigError
from ..search import Architecture, SearchSpace

Evaluate = Callable[[Architecture], tuple[float, Mapping[str, Any]]]

LAYER_TYPES = ("start", "conv", "pool", "fc", "end", "attention", "residual", "global-pool")


class Chain(SearchSpace, Protocol):
    """A space whose choices are layers, each a 7-tuple that begins with its depth and its type."""

    def layers(self, choices: tuple[int, ...]) -> tuple[Any, ...]: ...


class ArchitectureEnv(gymnasium.Env[np.ndarray, np.int64]):
    """Any search space, one decision a step; the only reward comes with the last.

    Observation: ``MultiDiscrete``, for each decision 0 while it is open and 1 + its choice afterwards.
    Action: ``Discrete``, the choice of the next decision.  ``info`` of the last step has ``choices``,
    ``network`` (one line), ``invalid_action`` and what ``evaluate`` adds.  The process is deterministic
    but for ``evaluate``; one episode never sees another.

    Args:
        space: what is built.
        evaluate: (reward, further ``info``) of a complete architecture.
        invalid_action: what an action outside the mask does: "terminate" ends the episode with the reward
            ``floor`` and ``info["invalid_action"]``; "raise" raises Gymnasium's InvalidAction.
        floor: the reward of an invalid action.
    Raises:
        ConfigError: ``invalid_action`` is neither.
        gymnasium.error.ResetNeeded: (from ``step``) the episode has ended, or none has begun.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(
        self,
        space: SearchSpace,
        evaluate: Evaluate,
        *,
        invalid_action: Literal["terminate", "raise"] = "terminate",
        floor: float = 0.0,
    ) -> None:
        if invalid_action not in ("terminate", "raise"):
            raise ConfigError(f"invalid_action = {invalid_action!r}: give 'terminate' or 'raise'")
        self.space = space
        self._evaluate = evaluate
        self._raises = invalid_action == "raise"
        self._floor = float(floor)
        sizes = [len(decision.choices) for decision in space.decisions]
        self.action_space = spaces.Discrete(max(sizes))
        self.observation_space = self._observations(sizes)
        self._actions = max(sizes)
        self._prefix: tuple[int, ...] = ()
        self._mask: np.ndarray | None = None  # no episode is under way

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an empty network."""
        super().reset(seed=seed)
        self._prefix = ()
        self._mask = self.space.mask(())
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one decision."""
        mask = self._mask
        if mask is None:
            raise ResetNeeded("the episode has ended, or none has begun: call reset()")
        choice = int(action)
        if not (0 <= choice < len(mask) and mask[choice]):
            if self._raises:
                raise InvalidAction(f"action {choice} is not valid after {self._prefix}: see action_masks()")
            self._mask = None
            info = {"choices": self._prefix, "network": "", "invalid_action": True}
            return self._observe(), self._floor, True, False, info
        self._prefix += (choice,)
        if not self.space.is_complete(self._prefix):
            self._mask = self.space.mask(self._prefix)
            return self._observe(), 0.0, False, False, {}
        self._mask = None
        architecture = Architecture(self.space.name, self._prefix)
        reward, more = self._evaluate(architecture)
        info = {
            "choices": self._prefix,
            "network": self.space.describe(architecture),
            "invalid_action": False,
            **more,
        }
        return self._observe(), float(reward), True, False, info

    def action_masks(self) -> np.ndarray:
        """Which actions are valid now: bool [actions]; none once the episode has ended."""
        masks = np.zeros(self._actions, dtype=bool)
        if self._mask is not None:
            masks[: len(self._mask)] = self._mask
        return masks

    def _observations(self, sizes: list[int]) -> spaces.MultiDiscrete:
        return spaces.MultiDiscrete([size + 1 for size in sizes])

    def _observe(self) -> np.ndarray:
        seen = np.zeros(len(self.space.decisions), dtype=np.int64)
        seen[: len(self._prefix)] = self._prefix
        seen[: len(self._prefix)] += 1
        return seen


class ChainCNNEnv(ArchitectureEnv):
    """The chain of layers as its published Markov decision process.

    The state is the 7-tuple of the last layer: depth, type, filter depth, filter size, stride, size of a
    fully connected layer, termination.  Its observation is ``MultiDiscrete``: depth as it is, type as a
    position in ``LAYER_TYPES``, each other number as a position in ``values``.  Action i adds the 7-tuple
    ``layers[i]``, one deeper than the state.  What fits the image depends on earlier layers too: ask
    ``action_masks()``.  All else is as in ``ArchitectureEnv``.

    Source: Sivaramakrishnan et al., Building Neural Networks using Deep Reinforcement Learning, after
    Baker et al. (2017).

    Attributes:
        layers: the 7-tuple behind each action, as it would be at the start.
        values: for each of the seven positions the numbers that it may have, ascending.
    """

    def __init__(
        self,
        space: Chain,
        evaluate: Evaluate,
        *,
        invalid_action: Literal["terminate", "raise"] = "terminate",
        floor: float = 0.0,
    ) -> None:
        if not hasattr(space, "layers") or len({len(d.choices) for d in space.decisions}) != 1:
            raise ConfigError(
                f"ChainCNN-v0 needs a space in which every decision is a layer, not {space.name!r} as it is "
                "set: use Architecture-v0"
            )
        actions = range(len(space.decisions[0].choices))
        self.layers = tuple(space.layers((action,))[0] for action in actions)
        depth = len(space.decisions)
        numbers = [tuple(sorted({0, *(layer[i] for layer in self.layers)})) for i in range(2, 7)]
        self.values = (tuple(range(depth + 1)), tuple(range(len(LAYER_TYPES))), *numbers)
        self._tuples = np.array([self._encoded(layer) for layer in self.layers], dtype=np.int64)
        self._ends = np.array([layer[1] == "end" for layer in self.layers])
        super().__init__(space, evaluate, invalid_action=invalid_action, floor=floor)

    def _encoded(self, layer: Any) -> list[int]:
        rest = [values.index(layer[i]) for i, values in enumerate(self.values) if i >= 2]
        return [0, LAYER_TYPES.index(layer[1]), *rest]

    def _observations(self, sizes: list[int]) -> spaces.MultiDiscrete:
        return spaces.MultiDiscrete([len(values) for values in self.values])

    def _observe(self) -> np.ndarray:
        if not self._prefix:
            return np.zeros(7, dtype=np.int64)
        last = self._prefix[-1]
        seen: np.ndarray = self._tuples[last].copy()
        seen[0] = len(self._prefix) - self._ends[last]
        return seen
