"""Agents that choose the stage which gets the non-local block: tabular and deep Q-learning, REINFORCE, PPO.

Each decision is an episode of its own: an agent sees a state, chooses, and is told much later what the
choice was worth.  There is no next state to look forward from, so the value of an action is its expected
reward, and nothing is discounted.  F features of a state, S stages, A = S + 1 actions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, ShapeError, unknown_name
from ..rl.baselines import MovingAverage, ema_advantages
from ..rl.losses import clipped_loss, reinforce_loss, value_loss
from ..rl.schedules import Schedule, Steps, schedule
from ..rl.threads import one_torch_thread

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
        self._scale = _RunningScale(features)
        self._prototypes = torch.zeros(rows, features)
        self._values = torch.zeros(rows, actions, dtype=torch.float64)
        self._visits = torch.zeros(rows, actions, dtype=torch.int64)
        self._founded = 0
        self._updates = 0

    def select(self, state: Tensor, *, explore: bool = True) -> int:
        if explore:
            return _draw(self.probabilities(state), self._generator)
        return _draw(_greedy(self._row_values(state, untried=-math.inf), 0.0), self._generator)

    def probabilities(self, state: Tensor) -> Tensor:
        return _greedy(self._row_values(state, untried=math.inf), self._epsilon.at(self._updates))

    def update(self, state: Tensor, action: int, reward: float) -> None:
        state = _checked(state, self._scale.features)
        _check_outcome(action, reward, self._values.shape[1])
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
        _check_state(state, self.state_dict())
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
        row, _ = self._nearest(_checked(state, self._scale.features))
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
        self._scale = _RunningScale(features)
        self._network = _network(features, hidden, actions, self._generator)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=learning_rate, fused=True)
        self._states = torch.zeros(memory, features)
        self._actions = torch.zeros(memory, dtype=torch.int64)
        self._rewards = torch.zeros(memory)
        self._told = 0

    def select(self, state: Tensor, *, explore: bool = True) -> int:
        probabilities = self.probabilities(state) if explore else _greedy(self._values(state), 0.0)
        return _draw(probabilities, self._generator)

    def probabilities(self, state: Tensor) -> Tensor:
        return _greedy(self._values(state), self._epsilon.at(self._told))

    def update(self, state: Tensor, action: int, reward: float) -> None:
        state = _checked(state, self._scale.features)
        _check_outcome(action, reward, self._action_count)
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
            "network": _cloned(self._network.state_dict()),
            "optimizer": _cloned(self._optimizer.state_dict()),
            "states": self._states[:known].clone(),
            "actions": self._actions[:known].clone(),
            "rewards": self._rewards[:known].clone(),
            "told": self._told,
            "scale": self._scale.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_state(state, self.state_dict(), growing=("states", "actions", "rewards"))
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(_cloned(state["optimizer"]))
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
        _step(self._optimizer, value_loss(chosen, wanted, torch.ones_like(chosen)))

    @torch.no_grad()
    def _values(self, state: Tensor) -> Tensor:
        values: Tensor = self._network(self._scale(_checked(state, self._scale.features)))
        return values


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
        self._scale = _RunningScale(features)
        self._policy = _network(features, hidden, actions, self._generator)
        self._value = _network(features, hidden, 1, self._generator)
        parameters = [*self._policy.parameters(), *self._value.parameters()]
        self._optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
        self._average = MovingAverage()
        self._waiting: list[tuple[Tensor, int, float]] = []
        self._told = 0

    def select(self, state: Tensor, *, explore: bool = True) -> int:
        probabilities = self.probabilities(state)
        return _draw(probabilities if explore else _greedy(probabilities, 0.0), self._generator)

    @torch.no_grad()
    def probabilities(self, state: Tensor) -> Tensor:
        return self._log_probs(self._scale(_checked(state, self._scale.features))).exp()

    def update(self, state: Tensor, action: int, reward: float) -> None:
        state = _checked(state, self._scale.features)
        _check_outcome(action, reward, self._action_count)
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
            "policy": _cloned(self._policy.state_dict()),
            "value": _cloned(self._value.state_dict()),
            "optimizer": _cloned(self._optimizer.state_dict()),
            "average": [average.total, average.square, average.weight, average.square_weight],
            "waiting": [(state.clone(), action, reward) for state, action, reward in self._waiting],
            "told": self._told,
            "scale": self._scale.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_state(state, self.state_dict())
        self._policy.load_state_dict(state["policy"])
        self._value.load_state_dict(state["value"])
        self._optimizer.load_state_dict(_cloned(state["optimizer"]))
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
        _step(self._optimizer, loss + value_loss(values, rewards, torch.ones_like(values)))

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
            _step(self._optimizer, loss + value_loss(values, rewards, everything))


AGENTS: dict[str, Callable[..., StageAgent]] = {
    "q-table": QTableAgent,
    "dqn": DQNAgent,
    "reinforce": ReinforceAgent,
    "ppo": PPOAgent,
}


class _RunningScale:
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


def _network(features: int, hidden: int, outputs: int, generator: torch.Generator) -> nn.Sequential:
    """Two hidden layers; the last one starts at 0, so that a new agent has no opinion."""
    sizes = (features, hidden), (hidden, hidden), (hidden, outputs)
    # skip_init draws nothing of the caller's generator.
    layers = [nn.utils.skip_init(nn.Linear, *size) for size in sizes]  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for layer in layers[:2]:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            layer.bias.zero_()
        layers[2].weight.zero_()
        layers[2].bias.zero_()
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _greedy(values: Tensor, epsilon: float) -> Tensor:
    """Float32 [A]: the best share 1 - epsilon, and all share epsilon."""
    best = (values == values.max()).float()
    return (1 - epsilon) * best / best.sum() + epsilon / len(values)


def _draw(probabilities: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _checked(state: Tensor, features: int) -> Tensor:
    if state.shape != (features,):
        raise ShapeError(f"state has shape {list(state.shape)}; expected [{features}]")
    state = state.detach().to("cpu", torch.float32)
    if not state.isfinite().all():
        feature = int((~state.isfinite()).nonzero()[0])
        raise DataError(f"state: feature {feature} is {float(state[feature])}; has the network diverged?")
    return state


def _check_outcome(action: int, reward: float, actions: int) -> None:
    if not 0 <= action < actions:
        raise ConfigError(f"action = {action}: there are {actions}, counted from 0")
    if not math.isfinite(reward):
        raise DataError(f"reward = {reward} for action {action}: give a finite number")


def _cloned(value: Any) -> Any:
    """A copy that shares no tensor: networks and optimizers hand out the ones they work on."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _cloned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cloned(item) for item in value]
    return value


def _check_state(state: Mapping[str, Any], own: Mapping[str, Any], *, growing: tuple[str, ...] = ()) -> None:
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
