"""The networks, tables and choices behind bench_stage_selection.py.

What each seed may see is kept apart: 10,000 training images train the network and the blocks; agents and
bandits learn from a table of 20,000 validation images; the figures are of a table of the 10,000 test images,
each of which comes in every regime.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import stage_regimes
import torch
from torch import Tensor, nn

from rlnas_fast.nn.child_layers import conv_unit
from rlnas_fast.placement.agents import StageAgent, make_agent
from rlnas_fast.placement.supernet import (
    OutcomeTable,
    StageSupernet,
    best_actions,
    learn,
    outcome_table,
    train_supernet,
)
from rlnas_fast.search import Budget
from rlnas_fast.tasks.named import cifar10_jpeg
from rlnas_fast.tasks.task import Task
from rlnas_fast.training.data import DeviceData, on_device
from rlnas_fast.training.loop import train
from rlnas_fast.training.recipe import Recipe

STAGES = ("stage1", "stage2", "stage3")
LAYERS = ("stage1.0", "stage1")  # both before any block
BATCH = 128
DECISIONS = 3000
DELAY = 4  # decisions between a choice and its reward
PRETRAIN = Recipe(learning_rate=0.01, batch_size=BATCH, weight_decay=1e-3, augment=("flip",)), Budget(20)
BLOCKS = Recipe(learning_rate=0.02, batch_size=BATCH, weight_decay=1e-3, augment=("flip",)), Budget(8)
CPU = torch.device("cpu")


def small_cnn() -> nn.Sequential:
    """Three stages of 16, 32 and 64 channels at half, a quarter and an eighth of the side of the image."""
    layers: list[tuple[str, nn.Module]] = []
    before = 3
    for number, channels in enumerate((16, 32, 64), start=1):
        stage = nn.Sequential(conv_unit(before, channels, 3, stride=2), conv_unit(channels, channels, 3))
        layers.append((f"stage{number}", stage))
        before = channels
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
    return nn.Sequential(OrderedDict([*layers, ("head", head)]))


def every_regime(x: Tensor, generator: torch.Generator) -> Tensor:
    """A training batch with a fifth of its images in each regime, at a severity drawn for the batch."""
    parts = []
    for regime, part in zip(stage_regimes.REGIMES, x.tensor_split(len(stage_regimes.REGIMES)), strict=True):
        levels = stage_regimes.SEVERITIES[regime]
        level = levels[int(torch.randint(len(levels), (), generator=generator))]
        parts.append(stage_regimes.spoil(part, regime, level, generator))
    return torch.cat(parts)


def samples(data: DeviceData, x: Tensor, y: Tensor, *, seed: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Full batches of all images in every regime, the severities in turn; and the number of the regime."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    for number, rows in enumerate(order[: len(x) // BATCH * BATCH].split(BATCH)):
        images = data.normalise(x[rows])
        for group, (regime, levels) in enumerate(stage_regimes.SEVERITIES.items()):
            level = levels[number % len(levels)]
            yield stage_regimes.spoil(images, regime, level, generator), y[rows], group


def trained_supernet(task: Task, data: DeviceData, seed: int) -> StageSupernet:
    """A network trained on clean images, then blocks for it, which alone learn, trained on all regimes."""
    some = replace(data, x_validation=data.x_validation[:256], y_validation=data.y_validation[:256])
    torch.manual_seed(seed)
    network = small_cnn()
    train(network, some, *PRETRAIN, device=CPU, seed=seed)
    batch = data.normalise(data.x[:8])
    supernet = StageSupernet(network, batch, STAGES, freeze=True, seed=seed, subsample=2)
    train_supernet(supernet, some, *BLOCKS, device=CPU, seed=seed, change=every_regime)
    return supernet.eval()


def tables_of(seed: int) -> np.ndarray:
    """Validation and test table of a seed, packed: float32 [n, 1 + F + A + 1], of which 0 is validation."""
    torch.set_num_threads(1)
    task = cifar10_jpeg(train_size=10_000, validation_fraction=2 / 3, seed=seed)
    data = DeviceData.of(task, CPU)
    supernet = trained_supernet(task, data, seed)
    splits = (data.x_validation, data.y_validation), on_device(task.test_split(), CPU)
    packed = []
    for number, (x, y) in enumerate(splits):
        table = outcome_table(supernet, samples(data, x, y, seed=10 * seed + number), LAYERS)
        which = torch.full((len(table), 1), float(number))
        packed.append(torch.cat([which, table.states, table.outcomes, table.groups[:, None]], dim=1))
    return torch.cat(packed).numpy()


def unpacked(packed: np.ndarray) -> tuple[OutcomeTable, OutcomeTable]:
    """The validation and the test table of ``tables_of``."""
    values = torch.from_numpy(packed)
    actions = len(STAGES) + 1
    validation, test = (
        OutcomeTable(part[:, 1 : -actions - 1], part[:, -actions - 1 : -1], part[:, -1].long())
        for part in (values[values[:, 0] == number] for number in (0, 1))
    )
    return validation, test


def choices_of(
    name: str, learnt_from: OutcomeTable, table: OutcomeTable, seed: int, *, shuffled: bool = False
) -> Tensor:
    """What an agent, or "linear", chooses for each sample of ``table``: int64 [n].

    Args:
        learnt_from: the table of its ``DECISIONS`` decisions.
        shuffled: each sample of both tables shows it the state of another one, drawn once.
    """
    if shuffled:
        learnt_from, table = (
            replace(each, states=each.states[torch.randperm(len(each), generator=_generator(seed, number))])
            for number, each in enumerate((learnt_from, table))
        )
    agent = made(name, learnt_from, seed)
    learn(agent, learnt_from, decisions=DECISIONS, seed=seed, delay=DELAY)
    return best_actions(agent, table.states)


def made(name: str, table: OutcomeTable, seed: int) -> StageAgent | LinUCB:
    """An agent with the settings that did well on validation tables, or the linear bandit."""
    features, actions = table.states.shape[1], table.outcomes.shape[1]
    if name == "linear":
        return LinUCB(table.states, actions, seed=seed, **OPTIONS[name])
    return make_agent(name, features, actions, seed=seed, **OPTIONS[name])


# Agents: the best of 6 or 7 settings each by what they chose for one half of the validation tables of seeds 0
# and 1 after having learnt from the other half.  The linear bandit: the best of 15, on those of all seeds.
OPTIONS: dict[str, dict[str, object]] = {
    "q-table": {"radius": 0.8, "rows": 16, "epsilon": "1:0.1:1000"},
    "dqn": {"hidden": 8, "learning_rate": 0.001, "updates": 1, "epsilon": "1:0.2:2500"},
    "reinforce": {"group": 32, "learning_rate": 0.01, "entropy_weight": "0.3:0.03:2000"},
    "ppo": {"group": 128, "learning_rate": 0.003, "entropy_weight": "0.3:0.03:2000"},
    "linear": {"width": 20.0, "ridge": 1.0},
}


class LinUCB:
    """Disjoint linear upper confidence bounds: a ridge regression of the reward on the state, by action.

    Source: Li et al., A Contextual-Bandit Approach to Personalized News Article Recommendation (2010),
    algorithm 1.

    Args:
        states: [n, F]; states are standardised by these from the start, which no agent is.
        actions: A.
        width: alpha, in points of the reward.
        ridge: weight of the prior, in decisions.
    """

    def __init__(
        self, states: Tensor, actions: int, *, seed: int, width: float = 20.0, ridge: float = 1.0
    ) -> None:
        self._width, self._rng = width, np.random.default_rng(seed)
        self._mean = states.double().mean(dim=0).numpy()
        self._deviation = states.double().std(dim=0).numpy()
        size = len(self._mean) + 1
        self._squares = np.tile(ridge * np.eye(size), (actions, 1, 1))
        self._sums = np.zeros((actions, size))

    def select(self, state: Tensor, *, explore: bool = True) -> int:
        x = self._standard(state)
        inverses = np.linalg.inv(self._squares)
        scores = np.einsum("i,aij,aj->a", x, inverses, self._sums)
        if explore:
            scores += self._width * np.sqrt(np.einsum("i,aij,j->a", x, inverses, x))
        best = np.flatnonzero(scores == scores.max())
        return int(best[self._rng.integers(len(best))])

    def update(self, state: Tensor, action: int, reward: float) -> None:
        x = self._standard(state)
        self._squares[action] += np.outer(x, x)
        self._sums[action] += reward * x

    def _standard(self, state: Tensor) -> np.ndarray:
        return np.append((state.numpy() - self._mean) / self._deviation, 1.0)


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(10 * seed + number)
