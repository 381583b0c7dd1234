"""Double deep Q-learning."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..rl.losses import value_loss
from ..rl.q_values import PrefixNetwork, double_values, epsilon_greedy, lambda_returns
from ..rl.replay import EpisodeMemory
from ..rl.schedules import schedule
from ..rl.threads import one_torch_thread
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .novelty import Novelty


class DQN:
    """Learns the value of each choice after each prefix with a network, and follows the best.

    Source: Mnih et al., Human-Level Control through Deep Reinforcement Learning (2015), with the double
    estimate of van Hasselt et al. (2016).
    Deviations: whole trials are replayed, not single decisions, and towards multi-step returns (Peng and
    Williams, 1996), as the only reward comes last; the target network follows by a moving average
    (Lillicrap et al. 2016).  Rewards are those of all trials so far on the scale of ``half_rank``.  What
    was proposed before is drawn again, with an epsilon that is larger each time.

    Args:
        space: where to search.
        seed: of its own generators.
        allow_repeats: proposes an architecture again although it was asked or told before.
        hidden: width of the network's two layers.
        learning_rate: of Adam.
        updates: steps of Adam after each trial.
        batch: trials drawn from memory for each step.
        trace: lambda of the returns: 0 is one-step Q-learning, 1 follows the final rewards.
        target_rate: how far the target network moves in each step.
        epsilon: probability of a uniform draw at each decision; a number or a schedule "start:end:trials".
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool = False,
        hidden: int = 64,
        learning_rate: float = 0.003,
        updates: int = 4,
        batch: int = 32,
        trace: float = 0.7,
        target_rate: float = 0.02,
        epsilon: float | str = "1:0.1:100",
    ) -> None:
        if not 0 <= trace <= 1 or not 0 < target_rate <= 1:
            raise ConfigError(
                f"trace = {trace}, target_rate = {target_rate}: give numbers from 0 to 1, a rate above 0"
            )
        if min(hidden, updates, batch) < 1 or learning_rate <= 0:
            raise ConfigError(
                f"hidden = {hidden}, updates = {updates}, batch = {batch}, learning_rate = {learning_rate}: "
                "all must be above 0"
            )
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._novelty = Novelty(space, self._rng, allow_repeats=allow_repeats)
        self._memory = EpisodeMemory(space.mask, [len(decision.choices) for decision in space.decisions])
        self._network = PrefixNetwork(
            self._memory.sizes, hidden=hidden, generator=torch.Generator().manual_seed(seed)
        )
        self._target = copy.deepcopy(self._network).requires_grad_(False)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=learning_rate, fused=True)
        self._updates = updates
        self._batch = batch
        self._trace = trace
        self._target_rate = target_rate
        self._epsilon = schedule("epsilon", epsilon, high=1)

    @one_torch_thread()
    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures; fewer only when the space has no more."""
        return self._novelty.fill(count, self._draw)

    @one_torch_thread()
    def tell(self, trials: Sequence[Trial]) -> None:
        """Remembers ``trials``, whoever proposed them, and learns as much for each."""
        self._novelty.tell(trials)
        for trial in trials:
            self._memory.add(trial.architecture.choices, trial.reward)
            for _ in range(self._updates):
                self._learn()

    def _learn(self) -> None:
        episodes, rewards = self._memory.draw(self._batch, self._rng)
        values = self._network(episodes.choices)
        returns = self._returns(values.detach(), self._target(episodes.choices), episodes.masks, rewards,
                                episodes.lengths)  # fmt: skip
        chosen = values.gather(2, episodes.choices[:, :, None]).squeeze(2)
        loss = value_loss(chosen, returns, episodes.present)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self._target.parameters(), self._network.parameters(), strict=True):
                slow.lerp_(fast, self._target_rate)

    def _returns(
        self, online: Tensor, frozen: Tensor, masks: Tensor, rewards: Tensor, lengths: Tensor
    ) -> Tensor:
        best = double_values(online, frozen, masks)
        following = torch.cat([best[:, 1:], torch.zeros_like(best[:, :1])], dim=1)
        return lambda_returns(rewards, following, lengths, trace=self._trace)

    @torch.no_grad()
    def _draw(self, missing: int, attempt: int) -> Iterator[Architecture]:
        epsilon = max(self._epsilon.at(len(self._memory)), attempt / 8)
        for _ in range(missing):
            choices: tuple[int, ...] = ()
            while not self._space.is_complete(choices):
                mask = self._space.mask(choices)
                prefix = torch.tensor([[*choices, 0]])
                values = self._network(prefix)[0, len(choices), : len(mask)].numpy()
                choices += (epsilon_greedy(values, mask, epsilon, self._rng),)
            yield Architecture(self._space.name, choices)
