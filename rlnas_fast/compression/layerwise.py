"""The document's procedure as written: layer by layer, act on a subset, fine-tune, reward, update."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..rl.baselines import MovingAverage, ema_advantages
from ..rl.losses import clipped_loss
from ..search import child_seed
from . import layers as masking
from .autoencoder import Autoencoder
from .compressed import save_tensors
from .heuristics import scores as rule
from .latency import masked_latency_s
from .layers import KEEP, PRUNE, Masks, prunable
from .operations import OPERATIONS, Groups, operate
from .problem import Prices, Problem, fine_tune
from .statistics import LayerState, observe

__all__ = ["PRICES", "Layerwise", "Procedure", "sample_action"]

PRICES = Prices(density=0.3, reconstruction=0.05)
_STATE = len(fields(LayerState))
_GROUP = 4  # features of a group: size of its weights, their LAMP score, share kept, share in int8
_SAVE = "layerwise.safetensors"


@dataclass(frozen=True)
class Procedure:
    """How the document's procedure is run.

    Attributes:
        steps: training steps for each layer.
        epochs: of fine-tuning within each step ("a few").
        subset: share of a layer's groups that a step acts on.
        swaps: allow the document's shuffle, the swap with a neighbour.
        prices: of the reward.
        learning_rate: of the policy.
        updates: PPO epochs over a step's actions.
        clip: of PPO's ratio.
        decay: of the moving average that a reward is compared with.
    """

    steps: int = 8
    epochs: int = 1
    subset: float = 0.5
    swaps: bool = True
    prices: Prices = PRICES
    learning_rate: float = 0.01
    updates: int = 4
    clip: float = 0.2
    decay: float = 0.8


class _Policy(nn.Module):
    """From a layer's state and a group's features to probabilities of the operations, one policy for all."""

    def __init__(self, allowed: Tensor) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(_STATE + _GROUP, 32), nn.Tanh(), nn.Linear(32, len(OPERATIONS)))
        # Most groups are told to keep or prune at first; a network with a quarter of its weights moved would
        # be no starting point.
        self.register_buffer("leaning", torch.tensor([1.0, 1.0, 0.0, -3.0]).where(allowed, -math.inf))

    def forward(self, x: Tensor) -> Tensor:
        """[groups, state + group] to log-probabilities [groups, operations]."""
        logits: Tensor = self.body(x) + self.leaning
        return logits.log_softmax(1)


def sample_action(log_probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """The document's SampleAction: a roulette wheel for every row, [groups, operations] to [groups]."""
    wheel = log_probabilities.exp().cumsum(1)
    spin = torch.rand(len(wheel), 1, generator=generator).to(wheel) * wheel[:, -1:]
    return (spin >= wheel).sum(1).clamp_max(wheel.shape[1] - 1)


class Layerwise:
    """Runs the procedure on a problem; each finished step is on disk before the next one starts.

    The layers are taken in order.  In each of a layer's steps the agent sees the layer's state and the
    features of a random subset of its groups, chooses an operation for each of them by a softmax, the whole
    network is fine-tuned for a few epochs under the masks so far, and validation accuracy, density and
    reconstruction error make the reward by which PPO updates the policy.  Then the next layer.

    Deviations: a layer is left as it was after its best step, or untouched where no step was better, for the
    document does not say which of them stays; at the end the masks are projected to exactly the asked
    density, since a price of density alone meets no budget.

    Args:
        problem: the network and its task.
        density: of the whole network, at the end.
        procedure: how it is run.
        int8: allow quantising; ``keep`` and ``prune`` are always there.
        seed: of the policy and of every draw.
        folder: where steps are saved; None saves nothing.
        on_step: called with the steps done and their number.
    """

    def __init__(
        self,
        problem: Problem,
        density: float,
        *,
        procedure: Procedure | None = None,
        int8: bool = False,
        seed: int = 0,
        folder: Path | None = None,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.problem, self.density, self.int8, self.seed = problem, density, int8, seed
        self.procedure = procedure or Procedure()
        self._folder, self._on_step = folder, on_step
        layers = problem.layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            allowed = torch.tensor([True, True, int8, self.procedure.swaps])
            self._policy = _Policy(allowed).to(problem.device)
        self._optimizer = torch.optim.Adam(self._policy.parameters(), lr=self.procedure.learning_rate)
        self._autoencoder = Autoencoder(layers, seed=seed)
        self._network = copy.deepcopy(problem.model)
        self._states: Masks = {
            layer.name: torch.full_like(layer.weight, KEEP, dtype=torch.uint8) for layer in layers
        }
        self._best = (-math.inf, self._network, self._states)
        self._average = MovingAverage()
        self._history: list[dict[str, Any]] = []
        self._done = 0
        self._load()

    def run(self) -> tuple[nn.Module, Masks, list[dict[str, Any]]]:
        """The fine-tuned network, its masks at exactly the asked density, and one row for every step."""
        names = [layer.name for layer in self.problem.layers]
        total = len(names) * self.procedure.steps
        while self._done < total:
            self._step(names, names[self._done // self.procedure.steps])
            self._done += 1
            if self._done % self.procedure.steps == 0:  # the layer is finished: as after its best step
                self._network, self._states = copy.deepcopy(self._best[1]), dict(self._best[2])
                self._best = (-math.inf, self._network, self._states)
            self._save()
            self._on_step(self._done, total)
        return self._network, self._projected(), self._history

    def _step(self, names: list[str], name: str) -> None:
        procedure, problem, groups = self.procedure, self.problem, self.problem.groups
        if self._done % procedure.steps == 0:
            accuracy, _ = self._judge(self._network, self._states)
            self._best = (
                self._reward(accuracy, name, self._network, self._states),
                self._network,
                self._states,
            )
        chance = torch.Generator().manual_seed(child_seed(self.seed, f"layerwise {self._done}"))
        layers = prunable(self._network)
        seen = observe(
            self._network,
            layers,
            self._states,
            problem.data,
            density=self.density,
            autoencoder=self._autoencoder,
            layout=groups.layout,
            undecided=frozenset(names[names.index(name) :]),
        )[name]
        weight = layers.weights[name]
        features = _group_features(name, weight, self._states[name], groups)
        count = max(1, round(procedure.subset * len(features)))
        chosen = torch.randperm(len(features), generator=chance)[:count].sort().values.to(problem.device)
        x = torch.cat([seen.vector().to(problem.device).expand(count, -1), features[chosen]], dim=1)
        with torch.no_grad():
            old = self._policy(x)
        actions = sample_action(old, chance)
        moved, state = operate(name, weight, self._states[name], groups, chosen, actions)
        states = {**self._states, name: state}
        network = self._tuned(name, moved, states)
        accuracy, loss = self._judge(network, states)
        reward = self._reward(accuracy, name, network, states)
        self._update(x, actions, old.gather(1, actions[:, None])[:, 0], reward)
        self._network, self._states = network, states
        if reward > self._best[0]:
            self._best = (reward, network, states)
        counts = actions.bincount(minlength=len(OPERATIONS)).tolist()
        self._history.append(
            {
                "layer": name,
                "step": self._done % procedure.steps,
                "accuracy": accuracy,
                "loss": loss,
                "density": masking.density(states),
                "reconstruction": self._autoencoder.error(name, self._left(name, network, states)),
                "reward": reward,
                "actions": dict(zip(OPERATIONS, counts, strict=True)),
            }
        )

    def _tuned(self, name: str, weight: Tensor, states: Masks) -> nn.Module:
        """The network with a layer's new weight, fine-tuned; what is pruned keeps its value underneath."""
        start = copy.deepcopy(self._network)
        with torch.no_grad():
            prunable(start).weights[name].copy_(weight)
        tuned = fine_tune(
            start,
            states,
            self.problem.data,
            self.procedure.epochs,
            self.problem.recipe,
            child_seed(self.seed, f"fine-tune {self._done}"),
            self.problem.groups.layout,
        )
        before = prunable(start).weights
        for layer in prunable(tuned):
            gone = states[layer.name] == PRUNE
            layer.weight[gone] = before[layer.name][gone]
        return tuned

    def _judge(self, network: nn.Module, states: Masks) -> tuple[float, float]:
        with masking.masked(network, states, self.problem.groups.layout):
            return self.problem.accuracy(network)

    def _left(self, name: str, network: nn.Module, states: Masks) -> Tensor:
        weight = prunable(network).weights[name]
        return masking.effective(name, weight, states[name], self.problem.groups.layout)

    def _reward(self, accuracy: float, name: str, network: nn.Module, states: Masks) -> float:
        prices = self.procedure.prices
        latency_s = 0.0
        if prices.latency_ms:
            latency_s = masked_latency_s(self.problem, network, states, prices.latency_batch)
        return prices.reward(
            accuracy,
            density=masking.bits(states) / (masking.KEEP_BITS * self.problem.layers.total),
            reconstruction=self._autoencoder.error(name, self._left(name, network, states)),
            latency_s=latency_s,
        )

    def _update(self, x: Tensor, actions: Tensor, old: Tensor, reward: float) -> None:
        """PPO on the step's actions, which share one advantage, in deviations of the rewards so far."""
        advantage, average = ema_advantages(
            torch.tensor([reward], dtype=torch.float64), self._average, decay=self.procedure.decay
        )
        self._average = average
        scaled = float(advantage) / (average.deviation or 1.0)
        advantages = torch.full_like(old, max(-3.0, min(3.0, scaled)))
        for _ in range(self.procedure.updates):
            new = self._policy(x).gather(1, actions[:, None])[:, 0]
            loss = clipped_loss(
                new[None], old[None], advantages[None], torch.ones_like(old[None]), clip=self.procedure.clip
            )
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()

    def _projected(self) -> Masks:
        """The masks at exactly the asked density: LAMP decides among what was kept, and then the rest."""
        layers = prunable(self._network)
        # LAMP's scores lie from 0 to 1.
        scores = {
            name: score + (self._states[name] != PRUNE).double()
            for name, score in rule("lamp", layers).items()
        }
        if not self.int8:
            return self.problem.project(scores, self.density)
        tiles = Groups("tiles", self.problem.groups.layout)
        quantised = {
            name: tiles.pooled(name, (state == masking.INT8).double()) > 0
            for name, state in self._states.items()
        }
        return self.problem.project(scores, self.density, int8=quantised)

    def _save(self) -> None:
        """All of it or none of it: networks, states, policy and its optimiser, and the history."""
        if self._folder is None:
            return
        tensors = {f"policy.{key}": value for key, value in self._policy.state_dict().items()}
        for index, (_, slots) in enumerate(sorted(self._optimizer.state_dict()["state"].items())):
            tensors |= {f"optimizer.{index}.{key}": value for key, value in slots.items()}
        for which, network, states in (("now", self._network, self._states), ("best", *self._best[1:])):
            tensors |= {f"{which}.network.{key}": value for key, value in network.state_dict().items()}
            tensors |= {f"{which}.state.{key}": value for key, value in states.items()}
        note = {
            "settings": self._settings(),
            "done": self._done,
            "best": self._best[0],
            "average": asdict(self._average),
            "history": self._history,
        }
        save_tensors(tensors, self._folder / _SAVE, {"layerwise": json.dumps(note)})

    def _load(self) -> None:
        """Goes on where a saved procedure stopped."""
        if self._folder is None or not (self._folder / _SAVE).is_file():
            return
        from safetensors import SafetensorError, safe_open

        file = self._folder / _SAVE
        try:
            with safe_open(file, "pt", device=str(self.problem.device)) as saved:
                note = json.loads(saved.metadata()["layerwise"])
                tensors = {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} cannot be read: {error}; choose another --out") from error
        if note["settings"] != self._settings():
            raise RunError(f"{file} was made with other settings: {note['settings']}; choose another --out")

        def part(prefix: str) -> dict[str, Tensor]:
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

        self._policy.load_state_dict(part("policy."))
        whole = self._optimizer.state_dict()
        count = len(whole["param_groups"][0]["params"])
        whole["state"] = {index: part(f"optimizer.{index}.") for index in range(count)}
        self._optimizer.load_state_dict(whole)
        self._network.load_state_dict(part("now.network."))
        self._states = part("now.state.")
        best = copy.deepcopy(self._network)
        best.load_state_dict(part("best.network."))
        self._best = (note["best"], best, part("best.state."))
        self._average = MovingAverage(**note["average"])
        self._history, self._done = note["history"], note["done"]

    def _settings(self) -> dict[str, Any]:
        own = json.loads(json.dumps(asdict(self.procedure)))
        return {
            **own,
            "density": self.density,
            "int8": self.int8,
            "seed": self.seed,
            "groups": str(self.problem.groups),
        }


def _group_features(name: str, weight: Tensor, state: Tensor, groups: Groups) -> Tensor:
    """float32 [groups, 4]: mean size in deviations, mean LAMP score, share kept, share in int8."""
    size = weight.abs() / weight.std(correction=0).clamp_min(1e-12)
    squares = weight.flatten().double().square()
    order = squares.sort(descending=True, stable=True).indices
    lamp = torch.zeros_like(squares)
    lamp[order] = squares[order] / squares[order].cumsum(0).clamp_min(1e-300)
    number = groups.numbers(name, weight).flatten()
    count = int(number.max()) + 1
    sizes = number.bincount(minlength=count)
    columns = []
    for values in (
        size.flatten().double(),
        lamp,
        (state != PRUNE).double(),
        (state == masking.INT8).double(),
    ):
        sums = torch.zeros(count, dtype=torch.float64, device=weight.device)
        columns.append(sums.index_add_(0, number, values.flatten()) / sizes)
    found = torch.stack(columns, 1)
    found[:, 1] = (found[:, 1] + 1e-9).log10() / 6
    return found.float()
