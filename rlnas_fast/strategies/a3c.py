"""Asynchronous advantage actor-critic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..rl.losses import value_loss
from ..rl.policies import Choices
from ..rl.returns import final_rewards, v_trace
from ..rl.schedules import schedule
from ..rl.threads import one_torch_thread
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .controller import Controller, Group


class A3C:
    """Learns from each trial as it finishes, while others are still being evaluated.

    Several children are in flight (the search's ``batch_size``).  A trial that comes back was proposed by
    an older policy, so each of its decisions counts by how likely the policy of now would make it, clipped.
    Rewards are taken relative to a moving average and in units of their moving deviation.

    Source: Mnih et al., Asynchronous Methods for Deep Reinforcement Learning (2016), with the correction
    of Espeholt et al., IMPALA (2018).
    Deviations: workers evaluate children, and one process learns; a trial is one episode whose only reward
    is its last, without discount; what was proposed before is drawn again, from a policy that is flatter
    each time.

    Args:
        space: where to search.
        seed: of its own generators.
        allow_repeats: proposes an architecture again although it was asked or told before.
        cell: "lstm" or "gru".
        hidden: width of the controller.
        learning_rate: of Adam.
        entropy_weight: nats of entropy a decision are worth this many deviations of the reward; a number
            or a schedule "start:end:trials".
        value_head: learns the expected reward before each decision as the baseline; without it the moving
            average is the baseline.
        value_weight: of the value head's loss.
        clip: largest weight of a decision, as a ratio of its probabilities now and then.
        baseline_decay: weight of the past in the moving average.
        temperature: divides the logits.
        tanh_constant: bounds the logits to +- this; 0 leaves them free.
        epsilon: probability of a uniform draw at each decision; a number or a schedule.
    """

    asynchronous = True

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool = False,
        cell: str = "lstm",
        hidden: int = 64,
        learning_rate: float = 0.01,
        entropy_weight: float | str = 0.01,
        value_head: bool = True,
        value_weight: float = 0.5,
        clip: float = 1.0,
        baseline_decay: float = 0.9,
        temperature: float = 1.0,
        tanh_constant: float = 2.5,
        epsilon: float | str = 0.0,
    ) -> None:
        if learning_rate <= 0 or clip <= 0 or value_weight < 0:
            raise ConfigError(
                f"learning_rate = {learning_rate}, clip = {clip}, value_weight = {value_weight}: "
                "give numbers above 0, the weight at least 0"
            )
        self._space = space
        self._controller = Controller(
            space, seed=seed, allow_repeats=allow_repeats, cell=cell, hidden=hidden, value_head=value_head,
            baseline_decay=baseline_decay, temperature=temperature, tanh_constant=tanh_constant,
            epsilon=epsilon,
        )  # fmt: skip
        self._optimizer = torch.optim.Adam(self._controller.policy.parameters(), lr=learning_rate, fused=True)
        self._entropy_weight = schedule("entropy_weight", entropy_weight)
        self._value_weight = value_weight
        self._clip = clip
        self._then: dict[Choices, Tensor] = {}

    @one_torch_thread()
    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures from the policy of now; fewer only when the space has no more."""
        asked = self._controller.ask(count, SearchContext())  # it is told no target
        if asked:
            sequences = [architecture.choices for architecture in asked]
            with torch.no_grad():
                policy = self._controller.policy
                scored = policy(policy.episodes(sequences, self._space.mask))
            self._then.update(zip(sequences, scored.log_probs, strict=True))
        return asked

    @one_torch_thread()
    def tell(self, trials: Sequence[Trial]) -> None:
        """One step on each trial; one that it never asked for counts as if the policy of now had."""
        for group in self._controller.groups(trials, 1):
            self._update(group)

    def _update(self, group: Group) -> None:
        episodes, present = group.episodes, group.episodes.present
        scored = self._controller.policy(episodes)
        now = scored.log_probs.detach()
        then = self._then.pop(group.sequences[0], now[0])[None, : now.shape[1]]
        values = torch.zeros_like(now) if scored.values is None else scored.values.detach()
        rewards = final_rewards(group.advantages, episodes.lengths, now.shape[1])
        targets, advantages = v_trace(
            now - then, rewards, values, present, discount=1.0, largest_weight=self._clip
        )
        entropy_weight = self._entropy_weight.at(self._controller.told)
        loss = -((advantages * scored.log_probs).sum() + entropy_weight * scored.entropies.sum())
        if scored.values is not None:
            loss = loss + self._value_weight * value_loss(scored.values, targets, present)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
