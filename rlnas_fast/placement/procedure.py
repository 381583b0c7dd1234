"""The training procedure: for each batch choose a stage, insert, train, reward, learn, perhaps take back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, DataError, unknown_name
from .agents import StageAgent
from .batches import Batch, Batches
from .inserter import NonLocalInserter
from .probe import ActivationProbe
from .rewards import METRICS, AddedLatency, Decision, RewardRule
from .stages import observing

__all__ = ["DECIDE", "Collapse", "FixedAgent", "Placement", "collapse_of"]

DECIDE = ("batch", "regime", "epoch")


class FixedAgent:
    """Chooses the same action always: what a learned choice has to beat."""

    def __init__(self, action: int, actions: int) -> None:
        self._action, self._actions = action, actions

    def select(self, state: Tensor, *, explore: bool = True) -> int:
        return self._action

    def update(self, state: Tensor, action: int, reward: float) -> None: ...

    def probabilities(self, state: Tensor) -> Tensor:
        return F.one_hot(torch.tensor(self._action), self._actions).float()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Collapse:
    """Whether a policy has come to think one action best whatever the state.

    Attributes:
        action: the one that was thought best most often lately.
        share: how often, of the last quarter of the decisions.
        since: the training pass from which on it always was, or None if it was not to the end.
        collapsed: ``share`` is at least 95 %, of at least 8 decisions.
    """

    action: int
    share: float
    since: int | None
    collapsed: bool


def collapse_of(best: list[tuple[int, int]]) -> Collapse | None:
    """Judges decisions, each (training pass, action thought best); None where there is none."""
    if not best:
        return None
    lately = [action for _, action in best[-max(8, len(best) // 4) :]]
    action, often = Counter(lately).most_common(1)[0]
    since = None
    for step, each in reversed(best):
        if each != action:
            break
        since = step
    share = often / len(lately)
    return Collapse(action, share, since, share >= 0.95 and len(lately) >= 8)


class Placement:
    """Trains a network in place while an agent learns which stage to give a non-local block.

    For each batch: where a decision is due, the probe reads the activations of the network without a block,
    the agent chooses, and the block is inserted; the network trains; decisions that are ``rule.delay`` passes
    old are rewarded and the agent learns from them.

    What is scored for a reward normalises with the statistics of the validation batch wherever BatchNorm
    trains: its running ones are of the stages that the last passes had, and fit no single one.  What
    is reported (``validate``) uses the running ones, as the trained network will.  Source: Guo et al., Single
    Path One-Shot Neural Architecture Search (2020), where statistics are collected anew for each path.
    Deviation: from the batch that is judged, since a reward comes every few passes.

    Args:
        inserter: of the network, with its optimiser.
        probe: of the same network; its statistics are the state.
        agent: knows ``probe.features`` features and as many actions as ``inserter.names``.
        optimizer: of the network.
        batches: to train on and to validate with.
        rate: the learning rate after a share of the training, 0 to 1.
        epochs: how many.
        rule: what a decision is worth.
        decide: a new decision for every "batch", at every change of the "regime", or every "epoch".
        revert_below: after a smaller reward the network, its blocks and its optimiser are set back to what
            they were before the decision, and decisions taken since are forgotten; None never does.
        explore_until: share of the training after which the agent only does what it thinks best, so that
            the chosen block is trained for most of the passes, as one that always was there would be, and
            the network ends with the statistics of BatchNorm that it will be used with.
        label_smoothing: of the training loss.
        added_latency: of each action, where it has a price.
        forward: what answers in training passes, such as a compiled form of the network; None is the network.

    Attributes:
        step: training passes so far; ``total`` is how many there will be.
        epoch: the one that ``train_epoch`` goes on with, from 0.
        taken: (epoch, action) of every decision.
        best: (training pass, action that the agent thought best) of every decision.
        rewarded: what is known of every decision that has had its reward, as plain data.
        reverted: how many decisions were taken back.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(
        self,
        inserter: NonLocalInserter,
        probe: ActivationProbe,
        agent: StageAgent,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        *,
        rate: Callable[[float], float],
        epochs: int,
        rule: RewardRule | None = None,
        decide: str = "batch",
        revert_below: float | None = None,
        explore_until: float = 0.3,
        label_smoothing: float = 0.0,
        added_latency: AddedLatency | None = None,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if decide not in DECIDE:
            raise unknown_name("decide", decide, DECIDE)
        if epochs < 1:
            raise ConfigError(f"epochs = {epochs}: give at least 1")
        if not 0 <= explore_until <= 1:
            raise ConfigError(f"explore_until = {explore_until}: give a share of the training, 0 to 1")
        if revert_below is not None and not math.isfinite(revert_below):
            raise ConfigError(f"revert_below = {revert_below}: give a finite number")
        self.inserter, self.probe, self.agent = inserter, probe, agent
        self.network = inserter.network
        self.rule = rule or RewardRule()
        self.added_latency = added_latency or AddedLatency((0.0,) * len(inserter.names))
        self.rewarded: list[dict[str, Any]] = []
        self.best: list[tuple[int, int]] = []
        self.taken: list[tuple[int, int]] = []
        self.step = 0
        self.reverted = 0
        self._device = batches.validation[0].x.device
        self._optimizer, self._batches, self._rate = optimizer, batches, rate
        self._epochs, self._decide, self._revert_below = epochs, decide, revert_below
        self._smoothing, self._explore_until = label_smoothing, explore_until
        self._waiting: list[Decision] = []
        self._held: int | None = None  # the action in force
        self._held_for: tuple[int, str] | None = None
        self._forward = self.network if forward is None else forward
        self.epoch, self._position = 0, 0
        self._random: Mapping[str, Any] | None = None  # torch's generators, where a saved epoch goes on
        self._random_at_epoch = _random_state(self._device)
        self._judges: dict[str, list[int]] = {}
        for number, batch in enumerate(batches.validation):
            self._judges.setdefault(batch.regime, []).append(number)
        self._without: tuple[int, int, float] | None = None

    @property
    def total(self) -> int:
        """Training passes from beginning to end."""
        return self._epochs * len(self._batches)

    def train_epoch(self) -> Iterator[int]:
        """Trains for an epoch, or for the rest of one, and yields ``step`` after each batch.

        Wherever it has yielded, and after it, the state may be saved.

        Raises:
            DataError: nothing came to train on, or training diverged; the message says where.
        """
        passed = self._position
        if not passed:
            self._random_at_epoch = _random_state(self._device)
        elif self._random is not None:
            _set_random_state(self._random_at_epoch, self._device)
        for position, batch in enumerate(self._batches.epoch(self.epoch)):
            if position >= passed:
                self._take(batch)
                self._position = position + 1
                yield self.step
            elif position == passed - 1 and self._random is not None:
                _set_random_state(self._random, self._device)
        if not self._position:
            raise DataError("the training loader yields nothing")
        self._random = None
        self.epoch, self._position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """All that ``train_epoch`` needs to go on bit for bit; of generators, torch's are in it."""
        return {
            "inserter": self.inserter.state_dict(),
            "agent": self.agent.state_dict(),
            "waiting": [vars(decision) for decision in self._waiting],
            "held": self._held,
            "held_for": self._held_for,
            "best": self.best,
            "taken": self.taken,
            "at": (self.epoch, self._position, self.step, self.reverted),
            "random": _random_state(self._device),
            "random_at_epoch": self._random_at_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict``; ``rewarded`` is the caller's to bring back."""
        self.inserter.load_state_dict(state["inserter"])
        self.agent.load_state_dict(state["agent"])
        self._waiting = [Decision(**decision) for decision in state["waiting"]]
        self._held, self._held_for = state["held"], state["held_for"]
        self.best, self.taken = list(state["best"]), list(state["taken"])
        self.epoch, self._position, self.step, self.reverted = state["at"]
        self._random, self._random_at_epoch = state["random"], state["random_at_epoch"]
        _set_random_state(self._random, self._device)
        self._without = None

    @property
    def validation(self) -> Sequence[Batch]:
        """The validation batches, in the order of ``choices``."""
        return self._batches.validation

    def choices(self) -> list[int]:
        """What the agent thinks best for each validation batch, with the network as it is."""
        inserted = self.inserter.inserted
        self.inserter.remove()
        chosen = [
            self.agent.select(self.probe.observe(batch.x), explore=False)
            for batch in self._batches.validation
        ]
        self.inserter.insert_again(inserted)
        return chosen

    def validate(self, actions: list[int]) -> Tensor:
        """Float64 [N]: 1 where the network is right, with ``actions[i]`` inserted for validation batch i."""
        right = [
            (self._logits(action, batch.x).argmax(dim=1) == batch.y).double()
            for action, batch in zip(actions, self._batches.validation, strict=True)
        ]
        return torch.cat(right).cpu()

    def _take(self, batch: Batch) -> None:
        self.network.train()
        if self._is_due(batch):
            self._choose(batch)
        assert self._held is not None
        self.inserter.insert(self._held)
        self._train(batch)
        self.step += 1
        due = [decision for decision in self._waiting if self.step - decision.step >= self.rule.delay]
        for decision in due:
            if decision in self._waiting:  # unless it was forgotten meanwhile
                self._reward(decision)

    def _is_due(self, batch: Batch) -> bool:
        wanted = (self.epoch, batch.regime if self._decide == "regime" else "")
        if self._decide != "batch" and self._held is not None and self._held_for == wanted:
            return False
        self._held_for = wanted
        return True

    def _choose(self, batch: Batch) -> None:
        self.inserter.remove()
        state = self.probe.observe(batch.x)
        action = self.agent.select(state, explore=self.step < self._explore_until * self.total)
        if not 0 <= action < len(self.inserter.names):
            raise ConfigError(f"the agent chose action {action}; there are {len(self.inserter.names)}")
        best = self.agent.select(state, explore=False)
        judges = self._judges.get(batch.regime) or list(range(len(self._batches.validation)))
        judge = judges[self.epoch % len(judges)]
        saved = None if self._revert_below is None else self.inserter.state_dict()
        self._waiting.append(
            Decision(
                self.step,
                self.epoch,
                batch.regime,
                state,
                action,
                best,
                judge,
                self._score_without(judge),
                saved,
            )
        )
        self.best.append((self.step, best))
        self.taken.append((self.epoch, action))
        self._held = action

    def _train(self, batch: Batch) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(self.step / self.total)
        loss = F.cross_entropy(self._forward(batch.x), batch.y, label_smoothing=self._smoothing)
        value = float(loss.detach())
        if not math.isfinite(value):
            where = f"epoch {self.epoch + 1}, batch {self._position + 1}"
            raise DataError(f"training diverged in {where}: the loss is {value}; lower the learning rate")
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._optimizer.step()

    def _reward(self, decision: Decision) -> None:
        without = self._score_without(decision.judge)
        after = without
        if decision.action:
            after = self._score(decision.action, decision.judge)
        reward = self.rule.reward(decision.before, after, without, self.added_latency.shares[decision.action])
        self._waiting.remove(decision)
        self.agent.update(decision.state, decision.action, reward)
        reverted = self._revert_below is not None and reward < self._revert_below
        self.rewarded.append(
            {
                "step": decision.step,
                "epoch": decision.epoch,
                "regime": decision.regime,
                "stage": self.inserter.names[decision.action],
                "best": self.inserter.names[decision.best],
                "before": decision.before,
                "after": after,
                "without": without,
                "reward": reward,
                "reverted": reverted,
                "state": [round(value, 6) for value in decision.state.tolist()],
            }
        )
        if reverted:
            assert decision.saved is not None
            self._waiting = [other for other in self._waiting if other.step < decision.step]
            self.inserter.load_state_dict(decision.saved)
            self._held = None
            self._without = None
            self.reverted += 1

    def _score_without(self, judge: int) -> float:
        if self._without is None or self._without[:2] != (self.step, judge):
            self._without = (self.step, judge, self._score(0, judge))
        return self._without[2]

    def _score(self, action: int, judge: int) -> float:
        # Running statistics are of whatever stages the last passes had: they fit no one of them, and say
        # more about what was chosen before than about what a block is worth.
        batch = self._batches.validation[judge]
        logits = self._logits(action, batch.x, batch_statistics=len(batch.y) > 1)
        return METRICS[self.rule.metric](logits, batch.y)

    def _logits(self, action: int, x: Tensor, *, batch_statistics: bool = False) -> Tensor:
        inserted = self.inserter.inserted
        self.inserter.remove()
        self.inserter.insert_again(action)
        try:
            with observing(self.network, batch_statistics=batch_statistics):
                logits: Tensor = self.network(x)
                return logits
        finally:
            self.inserter.remove()
            self.inserter.insert_again(inserted)


def _random_state(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "gpu": gpu}


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["gpu"] is not None:
        torch.cuda.set_rng_state(state["gpu"], device)
