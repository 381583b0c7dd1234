"""All blocks in one network: which stage suits which batch is then a table, and an agent learns in seconds.

S stages, A = S + 1 actions: 0 is "none", s is the block behind stage s.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError, DataError
from ..search import Budget
from ..training.data import DeviceData
from ..training.loop import TrainResult, train
from ..training.recipe import Recipe
from .agents import StageAgent
from .probe import ActivationProbe
from .stages import find_stages, fitted_block, observing, plain_network

__all__ = ["OutcomeTable", "StageSupernet", "best_actions", "learn", "outcome_table", "train_supernet"]


class StageSupernet(nn.Module):
    """A copy of a network with a block behind each candidate stage, of which at most one is used at a time.

    Up to its block a path is the network itself, and so is all of path "none".  Behind the block the
    weights are shared.  Where the network learns too, each BatchNorm behind the block has a copy for that
    path alone, as what flows there differs.

    Source: single-path training as in Guo et al., Single Path One-Shot Neural Architecture Search with
    Uniform Sampling (2020); a BatchNorm for each path as in Yu et al., Slimmable Neural Networks (2019).

    Args:
        network: any module that ``find_stages`` takes; stays as it is.
        batch: [B, ...] that shows what flows where.
        stages: names of modules; None finds the last at each spatial size.
        freeze: only the blocks learn; the network's weights and statistics stay as given, and its modules
            in evaluation mode.  For a network that is trained.
        seed: of the blocks' weights; None draws them from torch's generator.
        options: of ``NonLocalBlock``.

    Attributes:
        names: of the actions, ("none", *stages).
        action: which of them ``forward`` takes; settable.
        network: the copy.
        blocks: S of them.
    """

    def __init__(
        self,
        network: nn.Module,
        batch: Tensor,
        stages: Sequence[str] | None = None,
        *,
        freeze: bool = False,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(plain_network(network))
        self.freeze = freeze
        self._route = _Route()
        found = find_stages(self.network, batch, stages)
        self.names = ("none", *(stage.name for stage in found))
        if freeze:
            self.network.requires_grad_(False)
        else:
            _copy_norms(self.network, len(self.names), self._route)
        self.blocks = nn.ModuleList()
        for action, name in enumerate(self.names[1:], start=1):
            block = fitted_block(
                found[action - 1],
                device=batch.device,
                seed=None if seed is None else seed + action,
                **options,
            )
            self.blocks.append(block)
            self.network.get_submodule(name).register_forward_hook(_Insertion(action, block, self._route))
        self.train(network.training)

    @property
    def action(self) -> int:
        return self._route.action

    @action.setter
    def action(self, action: int) -> None:
        if not 0 <= action < len(self.names):
            raise ConfigError(f"action = {action}: there are {len(self.names)}, counted from 0")
        self._route.action = action

    def draw(self, generator: torch.Generator) -> None:
        """Takes an action uniformly, of those that have anything to learn."""
        first = 1 if self.freeze else 0
        self.action = int(torch.randint(first, len(self.names), (), generator=generator))

    def train(self, mode: bool = True) -> StageSupernet:
        """Sets the mode; a frozen network stays in evaluation."""
        super().train(mode)
        if self.freeze:
            self.network.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        """What the network answers with the block of ``action`` in it."""
        self._route.passed = 0
        return self.network(x)


def train_supernet(
    supernet: StageSupernet,
    data: DeviceData,
    recipe: Recipe,
    budget: Budget,
    *,
    device: torch.device,
    seed: int,
    change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> TrainResult:
    """Trains ``supernet`` in place, a stage being drawn uniformly for each batch.

    Args:
        change: what to make of each normalised training batch, with a generator on the CPU; None nothing.
        supernet, data, recipe, budget, device, seed: as for ``training.loop.train``.
    Returns:
        As ``training.loop.train``; the accuracies are those of the path that was last drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    supernet.draw(generator)
    result = train(
        _Changed(supernet, change, generator), data, recipe, budget,
        device=device, seed=seed, on_step=lambda: supernet.draw(generator),
    )  # fmt: skip
    supernet.action = 0
    return result


@dataclass(frozen=True, eq=False)
class OutcomeTable:
    """What every action gives for every sample.  n samples, each a batch of images of one group.

    Attributes:
        states: float32 [n, F], of the network without a block.
        outcomes: float32 [n, A], the fraction of the batch that is right.
        groups: int64 [n], where the sample comes from; for the analysis, an agent never sees it.
    """

    states: Tensor
    outcomes: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def regret(self, actions: Tensor) -> Tensor:
        """Float [n]: how much more of each batch the best action of all would have got right.

        Args:
            actions: int64 [n].
        """
        return self.outcomes.max(dim=1).values - self.of(actions)

    def of(self, actions: Tensor) -> Tensor:
        """Float [n]: the outcome of one action for each sample."""
        return self.outcomes.gather(1, actions[:, None]).squeeze(1)

    def best_fixed(self) -> int:
        """The action that is best on average."""
        return int(self.outcomes.mean(dim=0).argmax())

    def best_by_group(self) -> Tensor:
        """Int64 [n]: for each sample, the action that is best on average over its group."""
        best = torch.zeros_like(self.groups)
        for group in set(self.groups.tolist()):
            members = self.groups == group
            best[members] = self.outcomes[members].mean(dim=0).argmax()
        return best


def outcome_table(
    supernet: StageSupernet, samples: Iterable[tuple[Tensor, Tensor, int]], layers: Sequence[str]
) -> OutcomeTable:
    """Runs every path on every sample.

    Args:
        supernet: trained; as it was afterwards, but for its action, which is 0.
        samples: normalised images [B, ...], labels int64 [B], and a number for where they come from.
        layers: modules of the network whose statistics are the state; they must come before the first
            block, or at it.
    Raises:
        DataError: there is no sample; or as ``ActivationProbe.state``.
    """
    states, outcomes, groups = [], [], []
    with ActivationProbe(supernet.network, layers) as probe, observing(supernet):
        for x, y, group in samples:
            row = []
            for action in range(len(supernet.names)):
                supernet.action = action
                row.append(float((supernet(x).argmax(dim=1) == y).float().mean()))
                if action == 0:
                    states.append(probe.state())
            outcomes.append(row)
            groups.append(group)
    supernet.action = 0
    if not states:
        raise DataError("there is no sample to make a table of")
    return OutcomeTable(torch.stack(states), torch.tensor(outcomes), torch.tensor(groups))


def learn(
    agent: StageAgent, table: OutcomeTable, *, decisions: int, seed: int, delay: int = 0
) -> tuple[Tensor, Tensor]:
    """Lets an agent decide about samples drawn at random, and tells it what its own choices changed.

    The reward of a choice is its outcome minus that of "none" for the same sample, in percent points: what
    the block that was inserted changed.

    Args:
        agent: of as many features and actions as the table has.
        decisions: how many.
        seed: of the order of the samples.
        delay: how many more decisions are made before the reward of one comes.
    Returns:
        What it chose, int64 [decisions], and the exact regret of each choice in points, float [decisions].
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(table), (decisions,), generator=generator)
    rewards = 100 * (table.outcomes - table.outcomes[:, :1])
    chosen = torch.zeros(decisions, dtype=torch.int64)

    def reward(decision: int) -> None:
        row, action = int(rows[decision]), int(chosen[decision])
        agent.update(table.states[row], action, float(rewards[row, action]))

    for decision, row in enumerate(rows.tolist()):
        chosen[decision] = agent.select(table.states[row])
        if decision >= delay:
            reward(decision - delay)
    for decision in range(max(0, decisions - delay), decisions):
        reward(decision)
    regret = rewards[rows].max(dim=1).values - rewards[rows, chosen]
    return chosen, regret


def best_actions(agent: StageAgent, states: Tensor) -> Tensor:
    """What an agent thinks best for each state [n, F], without exploring: int64 [n]."""
    return torch.tensor([agent.select(state, explore=False) for state in states])


@dataclass
class _Route:
    """Which block is to be used, and which one the pass under way has been through."""

    action: int = 0
    passed: int = 0


class _Insertion:
    """A forward hook that lets a stage's output pass through its block, where the route says so."""

    def __init__(self, action: int, block: nn.Module, route: _Route) -> None:
        self._action, self._block, self._route = action, block, route

    def __call__(self, stage: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        if self._route.action != self._action:
            return output
        self._route.passed = self._action
        answer: Tensor = self._block(output)
        return answer


class _PathNorm(nn.Module):
    """A BatchNorm for each path; the first is the network's own, and serves all up to their blocks."""

    def __init__(self, norm: nn.Module, actions: int, route: _Route) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm, *(copy.deepcopy(norm) for _ in range(1, actions))])
        self._route = route

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norms[self._route.passed](x)
        return answer


def _copy_norms(network: nn.Module, actions: int, route: _Route) -> None:
    made: dict[nn.Module, _PathNorm] = {}  # a norm that is used in two places stays one
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out the second place
            if isinstance(child, _BatchNorm):
                if child not in made:
                    made[child] = _PathNorm(child, actions, route)
                setattr(parent, name, made[child])


class _Changed(nn.Module):
    """Changes training batches before the supernet sees them."""

    def __init__(
        self,
        supernet: StageSupernet,
        change: Callable[[Tensor, torch.Generator], Tensor] | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.supernet, self._change, self._generator = supernet, change, generator

    def forward(self, x: Tensor) -> Any:
        if self.training and self._change is not None:
            x = self._change(x, self._generator)
        return self.supernet(x)
