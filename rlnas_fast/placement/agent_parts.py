"""What agents of both kinds are made of: scaled states, small networks, draws, checks of what comes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, ShapeError

__all__ = [
    "RunningScale",
    "check_outcome",
    "check_saved",
    "checked_state",
    "cloned",
    "draw",
    "greedy",
    "learn_step",
    "small_network",
]


class RunningScale:
    """Mean and deviation of the states so far (Welford 1962); a feature that never varied becomes 0."""

    def __init__(self, features: int) -> None:
        self.features = features
        self._count = 0
        self._mean = torch.zeros(features, dtype=torch.float64)
        self._squares = torch.zeros(features, dtype=torch.float64)

    def add(self, state: Tensor) -> None:
        self._count += 1
        before = state - self._mean
        self._mean = self._mean + before / self._count
        self._squares = self._squares + before * (state - self._mean)

    def __call__(self, states: Tensor) -> Tensor:
        """Float32 [..., F], of deviation 1 and bounded, as a network wants them."""
        deviation = (self._squares / max(self._count, 1)).sqrt()
        inverse = torch.where(deviation > 1e-12, 1 / deviation, 0.0)
        return ((states - self._mean) * inverse).clamp(-5, 5).float()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "mean": self._mean.clone(), "squares": self._squares.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count = state["count"]
        self._mean, self._squares = state["mean"].clone(), state["squares"].clone()


def small_network(features: int, hidden: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
    """Two hidden layers; the last one starts at 0, so that a new agent has no opinion."""
    sizes = (features, hidden), (hidden, hidden), (hidden, outputs)
    # On the meta device a layer's own initialisation draws nothing of the caller's generator.
    layers = [nn.Linear(*size, device="meta").to_empty(device="cpu") for size in sizes]
    with torch.no_grad():
        for layer in layers[:2]:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            layer.bias.zero_()
        layers[2].weight.zero_()
        layers[2].bias.zero_()
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def learn_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of ``optimizer`` down the gradient of ``loss``."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def greedy(values: Tensor, epsilon: float) -> Tensor:
    """Float32 [A]: the best share 1 - epsilon, and all share epsilon."""
    best = (values == values.max()).float()
    return (1 - epsilon) * best / best.sum() + epsilon / len(values)


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """An action, with ``probabilities`` [A]."""
    return int(torch.multinomial(probabilities, 1, generator=generator))


def checked_state(state: Tensor, features: int) -> Tensor:
    """``state`` as float32 on the CPU; ShapeError or DataError where it is not ``features`` numbers."""
    if state.shape != (features,):
        raise ShapeError(f"state has shape {list(state.shape)}; expected [{features}]")
    state = state.detach().to("cpu", torch.float32)
    if not state.isfinite().all():
        feature = int((~state.isfinite()).nonzero()[0])
        raise DataError(f"state: feature {feature} is {float(state[feature])}; has the network diverged?")
    return state


def check_outcome(action: int, reward: float, actions: int) -> None:
    """Raises ConfigError for an action that there is not, DataError for a reward that is not finite."""
    if not 0 <= action < actions:
        raise ConfigError(f"action = {action}: there are {actions}, counted from 0")
    if not math.isfinite(reward):
        raise DataError(f"reward = {reward} for action {action}: give a finite number")


def cloned(value: Any) -> Any:
    """A copy that shares no tensor: networks and optimizers hand out the ones they work on."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: cloned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cloned(item) for item in value]
    return value


def check_saved(state: Mapping[str, Any], own: Mapping[str, Any], *, growing: tuple[str, ...] = ()) -> None:
    """Raises ConfigError where ``state`` is of an agent of another kind or size."""
    if set(state) != set(own):
        raise ConfigError(f"state of another kind of agent: it holds {sorted(state)}, not {sorted(own)}")
    for name, value in own.items():
        if isinstance(value, Tensor) and name not in growing and state[name].shape != value.shape:
            raise ConfigError(
                f"state of an agent of another size: {name} is {list(state[name].shape)}, "
                f"not {list(value.shape)}"
            )
    if state["scale"]["mean"].shape != own["scale"]["mean"].shape:
        raise ConfigError(
            f"state of an agent with {len(state['scale']['mean'])} features, not {len(own['scale']['mean'])}"
        )
