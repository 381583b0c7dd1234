"""Asynchronous advantage actor-critic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..rl.baselines import MovingAverage, ema_advantages
from ..rl.losses import value_loss
from ..rl.policies import Choices, RecurrentPolicy
from ..rl.returns import final_rewards, v_trace
from ..rl.schedules import schedule
from ..rl.threads import one_torch_thread
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .novelty import Novelty


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
        if not 0 <= baseline_decay < 1:
            raise ConfigError(f"baseline_decay = {baseline_decay}: give a number from 0 to below 1")
        if learning_rate <= 0 or clip <= 0 or value_weight < 0:
            raise ConfigError(
                f"learning_rate = {learning_rate}, clip = {clip}, value_weight = {value_weight}: "
                "give numbers above 0, the weight at least 0"
            )
        self._space = space
        self._generator = torch.Generator().manual_seed(seed)
        self._novelty = Novelty(space, np.random.default_rng(seed), allow_repeats=allow_repeats)
        self._policy = RecurrentPolicy(
            [len(decision.choices) for decision in space.decisions],
            hidden=hidden,
            cell=cell,
            temperature=temperature,
            tanh_constant=tanh_constant or None,
            value_head=value_head,
            generator=self._generator,
        )
        self._optimizer = torch.optim.Adam(self._policy.parameters(), lr=learning_rate, fused=True)
        self._entropy_weight = schedule("entropy_weight", entropy_weight)
        self._value_weight = value_weight
        self._clip = clip
        self._baseline_decay = baseline_decay
        self._epsilon = schedule("epsilon", epsilon, high=1)
        self._average = MovingAverage()
        self._told = 0
        self._then: dict[Choices, Tensor] = {}

    @one_torch_thread()
    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures from the policy of now; fewer only when the space has no more."""
        asked = self._novelty.fill(count, self._draw)
        if asked:
            sequences = [architecture.choices for architecture in asked]
            with torch.no_grad():
                scored = self._policy(self._policy.episodes(sequences, self._space.mask))
            self._then.update(zip(sequences, scored.log_probs, strict=True))
        return asked

    @one_torch_thread()
    def tell(self, trials: Sequence[Trial]) -> None:
        """One step on each trial; one that it never asked for counts as if the policy of now had."""
        self._novelty.tell(trials)
        for trial in trials:
            self._told += 1
            relative, self._average = ema_advantages(
                torch.tensor([trial.reward], dtype=torch.float64), self._average, decay=self._baseline_decay
            )
            self._learn(trial.architecture.choices, (relative / (self._average.deviation or 1.0)).float())

    def _learn(self, choices: Choices, reward: Tensor) -> None:
        episodes = self._policy.episodes([choices], self._space.mask)
        scored, present = self._policy(episodes), episodes.present
        now = scored.log_probs.detach()
        then = self._then.pop(choices, now[0])[None, : now.shape[1]]
        values = torch.zeros_like(now) if scored.values is None else scored.values.detach()
        rewards = final_rewards(reward, episodes.lengths, now.shape[1])
        targets, advantages = v_trace(
            now - then, rewards, values, present, discount=1.0, largest_weight=self._clip
        )
        gain = (advantages * scored.log_probs).sum() + self._entropy_weight.at(
            self._told
        ) * scored.entropies.sum()
        loss = -gain
        if scored.values is not None:
            loss = loss + self._value_weight * value_loss(scored.values, targets, present)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def _draw(self, missing: int, attempt: int) -> Iterable[Architecture]:
        sequences, _ = self._policy.sample(
            missing,
            self._space.mask,
            self._space.is_complete,
            self._generator,
            flatten=2.0**attempt,
            epsilon=self._epsilon.at(self._told),
        )
        return [Architecture(self._space.name, sequence) for sequence in sequences]
