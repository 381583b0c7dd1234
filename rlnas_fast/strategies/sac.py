"""Discrete soft actor-critic."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..rl.losses import value_loss
from ..rl.policies import Episodes, entropy, masked_log_softmax
from ..rl.q_values import PrefixNetwork, lambda_returns
from ..rl.replay import EpisodeMemory
from ..rl.soft import soft_values, temperature_loss
from ..rl.threads import one_torch_thread
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .novelty import Novelty


class SAC:
    """Learns off-policy the values of choices and a policy that follows them as far as its entropy allows.

    The temperature, the price of entropy, adapts so that decisions keep the entropy that is wanted.

    Source: Haarnoja et al., Soft Actor-Critic Algorithms and Applications (2018), in the discrete form of
    Christodoulou (2019).
    Deviations: whole trials are replayed, and values follow multi-step returns without the entropies on
    the way (Peng and Williams, 1996), as the only reward comes last.  Rewards are those of all trials so
    far on the scale of ``half_rank``.  What was proposed before is drawn again, from a policy that is
    flatter each time.

    Args:
        space: where to search.
        seed: of its own generators.
        allow_repeats: proposes an architecture again although it was asked or told before.
        hidden: width of the two layers of each of the three networks.
        learning_rate: of Adam, for all of them and the logarithm of the temperature.
        updates: steps of Adam after each trial.
        batch: trials drawn from memory for each step.
        trace: lambda of the returns: 0 is the one-step target, 1 follows the final rewards.
        target_rate: how far the target networks move in each step.
        entropy: wanted of each decision, as a fraction of the logarithm of the number of valid choices.
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
        entropy: float = 0.5,
    ) -> None:
        if not 0 <= trace <= 1 or not 0 < target_rate <= 1:
            raise ConfigError(
                f"trace = {trace}, target_rate = {target_rate}: give numbers from 0 to 1, a rate above 0"
            )
        if not 0 < entropy < 1:
            raise ConfigError(f"entropy = {entropy}: give a fraction between 0 and 1")
        if min(hidden, updates, batch) < 1 or learning_rate <= 0:
            raise ConfigError(
                f"hidden = {hidden}, updates = {updates}, batch = {batch}, learning_rate = {learning_rate}: "
                "all must be above 0"
            )
        self._space = space
        self._generator = torch.Generator().manual_seed(seed)
        self._rng = np.random.default_rng(seed)
        self._novelty = Novelty(space, self._rng, allow_repeats=allow_repeats)
        sizes = [len(decision.choices) for decision in space.decisions]
        self._memory = EpisodeMemory(space.mask, sizes)
        self._actor, *self._critics = (
            PrefixNetwork(sizes, hidden=hidden, generator=self._generator) for _ in range(3)
        )
        self._targets = [copy.deepcopy(critic).requires_grad_(False) for critic in self._critics]
        self._log_temperature = torch.zeros((), requires_grad=True)
        networks = (self._actor, *self._critics)
        learned = [self._log_temperature, *chain.from_iterable(network.parameters() for network in networks)]
        self._optimizer = torch.optim.Adam(learned, lr=learning_rate, fused=True)
        self._updates = updates
        self._batch = batch
        self._trace = trace
        self._target_rate = target_rate
        self._entropy = entropy

    @one_torch_thread()
    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures from the policy; fewer only when the space has no more."""
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
        choices, masks, present = episodes.choices, episodes.masks, episodes.present
        log_probs = masked_log_softmax(self._actor(choices), masks)
        first, second = (critic(choices) for critic in self._critics)
        temperature = self._log_temperature.detach().exp()
        returns = self._returns(episodes, rewards, log_probs.detach(), temperature)
        loss = torch.zeros(())
        for values in (first, second):
            chosen = values.gather(2, choices[:, :, None]).squeeze(2)
            loss = loss + value_loss(chosen, returns, present)
        worth = soft_values(log_probs, first.detach(), second.detach(), temperature)
        loss = loss - (worth * present).sum() / present.sum()
        wanted = self._entropy * masks.sum(dim=2).log()
        loss = loss + temperature_loss(self._log_temperature, entropy(log_probs), wanted, present)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        with torch.no_grad():
            for target, critic in zip(self._targets, self._critics, strict=True):
                for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                    slow.lerp_(fast, self._target_rate)

    @torch.no_grad()
    def _returns(self, episodes: Episodes, rewards: Tensor, log_probs: Tensor, temperature: Tensor) -> Tensor:
        first, second = (target(episodes.choices) for target in self._targets)
        worth = soft_values(log_probs, first, second, temperature)
        following = torch.cat([worth[:, 1:], torch.zeros_like(worth[:, :1])], dim=1)
        return lambda_returns(rewards, following, episodes.lengths, trace=self._trace)

    @torch.no_grad()
    def _draw(self, missing: int, attempt: int) -> Iterator[Architecture]:
        for _ in range(missing):
            choices: tuple[int, ...] = ()
            while not self._space.is_complete(choices):
                mask = torch.from_numpy(self._space.mask(choices).copy())
                logits = self._actor(torch.tensor([[*choices, 0]]))[0, len(choices), : len(mask)]
                probabilities = masked_log_softmax(logits / 2.0**attempt, mask).exp()
                choices += (int(torch.multinomial(probabilities, 1, generator=self._generator)),)
            yield Architecture(self._space.name, choices)
