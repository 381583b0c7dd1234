"""Proximal policy optimisation with a recurrent controller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..rl.losses import clipped_loss, value_loss
from ..rl.returns import final_rewards, generalised_advantages
from ..rl.schedules import schedule
from ..rl.threads import one_torch_thread
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .controller import Controller, Group


class PPO:
    """Learns an autoregressive controller by several clipped steps on each group of trials.

    Rewards are taken relative to a moving average (one for each target it is told) and in units of its
    moving deviation.

    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), with the recurrent controller
    of Zoph and Le (2017).
    Deviations: a trial is one episode whose only reward is its last, without discount; what was proposed
    before is drawn again, from a policy that is flatter each time.

    Args:
        space: where to search.
        seed: of its own generators.
        allow_repeats: proposes an architecture again although it was asked or told before.
        cell: "lstm" or "gru".
        hidden: width of the controller.
        learning_rate: of Adam.
        group: how many trials are told between two updates.
        epochs: steps of Adam on each group.
        clip: how far the probability of a decision may move, as a ratio.
        entropy_weight: nats of entropy a decision are worth this many deviations of the reward; a number or a
            schedule "start:end:trials".
        value_head: learns the expected reward before each decision as the baseline; without it the
            moving average is the baseline.
        value_weight: of the value head's loss.
        trace: lambda of the generalised advantages; needs the value head.
        baseline_decay: weight of the past in the moving average.
        temperature: divides the logits.
        tanh_constant: bounds the logits to +- this; 0 leaves them free.
        epsilon: probability of a uniform draw at each decision; a number or a schedule.
    """

    conditioned = True  # can be told a target

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool = False,
        cell: str = "lstm",
        hidden: int = 64,
        learning_rate: float = 0.01,
        group: int = 10,
        epochs: int = 10,
        clip: float = 0.2,
        entropy_weight: float | str = 0.01,
        value_head: bool = False,
        value_weight: float = 0.5,
        trace: float = 0.95,
        baseline_decay: float = 0.9,
        temperature: float = 1.0,
        tanh_constant: float = 2.5,
        epsilon: float | str = 0.0,
    ) -> None:
        if not 0 <= trace <= 1:
            raise ConfigError(f"trace = {trace}: give a number from 0 to 1")
        if not 0 < clip < 1:
            raise ConfigError(f"clip = {clip}: give a number between 0 and 1")
        if learning_rate <= 0 or group < 1 or epochs < 1:
            raise ConfigError(
                f"learning_rate = {learning_rate}, group = {group}, epochs = {epochs}: all must be above 0"
            )
        if value_weight < 0:
            raise ConfigError(f"value_weight = {value_weight}: give at least 0")
        self._controller = Controller(
            space, seed=seed, allow_repeats=allow_repeats, cell=cell, hidden=hidden, value_head=value_head,
            baseline_decay=baseline_decay, temperature=temperature, tanh_constant=tanh_constant,
            epsilon=epsilon,
        )  # fmt: skip
        self._optimizer = torch.optim.Adam(self._controller.policy.parameters(), lr=learning_rate, fused=True)
        self._group = group
        self._epochs = epochs
        self._clip = clip
        self._entropy_weight = schedule("entropy_weight", entropy_weight)
        self._value_weight = value_weight
        self._trace = trace

    @one_torch_thread()
    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures from the policy; fewer only when the space has no more."""
        return self._controller.ask(count, context)

    @one_torch_thread()
    def tell(self, trials: Sequence[Trial]) -> None:
        """Updates the policy whenever a group is full; trials it never asked for count like its own."""
        for group in self._controller.groups(trials, self._group):
            self._update(group)

    def _update(self, group: Group) -> None:
        policy, episodes, present = self._controller.policy, group.episodes, group.episodes.present
        with torch.no_grad():
            old = policy(episodes)
            advantages, returns = self._advantages(group.advantages, episodes.lengths, old.values, present)
        entropy_weight = self._entropy_weight.at(self._controller.told)
        for _ in range(self._epochs):
            scored = policy(episodes)
            loss = clipped_loss(scored.log_probs, old.log_probs, advantages, present, clip=self._clip)
            loss = loss - entropy_weight * scored.entropies.sum() / present.sum()
            if scored.values is not None:
                loss = loss + self._value_weight * value_loss(scored.values, returns, present)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

    def _advantages(
        self, relative: Tensor, lengths: Tensor, values: Tensor | None, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns of each decision: two float [B, T]."""
        returns = relative[:, None] * present
        if values is None:
            return returns, returns
        rewards = final_rewards(relative, lengths, present.shape[1])
        advantages = generalised_advantages(rewards, values, present, discount=1.0, trace=self._trace)
        return advantages, advantages + values
