"""One bandit for each decision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import ConfigError
from ..rl.bandits import arm_statistics, posterior_of_means, upper_bounds
from ..rl.q_values import epsilon_greedy
from ..rl.surrogates import half_rank
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .novelty import Novelty


class Bandit:
    """Chooses at each decision as if it alone mattered, by upper confidence bounds or Thompson sampling.

    Source: UCB1 of Auer et al. (2002); Thompson (1933) with normal rewards as in Russo et al., A Tutorial
    on Thompson Sampling (2018).
    Deviations: rewards are those of all trials so far on the scale of ``half_rank``; a choice that was
    asked and has no reward yet counts as made, with the median reward.  What was proposed before is drawn
    again: by Thompson from a posterior that is wider each time, by UCB with ever more decisions at random.

    Args:
        space: where to search.
        seed: of its own generator.
        allow_repeats: proposes an architecture again although it was asked or told before.
        rule: "thompson" or "ucb".
        width: of the confidence bounds, or of the posterior, in the units of the reward's scale.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool = False,
        rule: str = "thompson",
        width: float = 1.0,
    ) -> None:
        if rule not in ("thompson", "ucb"):
            raise ConfigError(f"rule = {rule!r}: choose 'thompson' or 'ucb'")
        if width <= 0:
            raise ConfigError(f"width = {width}: give a number above 0")
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._novelty = Novelty(space, self._rng, allow_repeats=allow_repeats)
        self._sizes = [len(decision.choices) for decision in space.decisions]
        self._rule = rule
        self._width = width
        self._told: list[tuple[int, ...]] = []
        self._rewards: list[float] = []
        self._pending: dict[str, tuple[int, ...]] = {}

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures; fewer only when the space has no more."""
        asked: list[Architecture] = []
        while len(asked) < count:  # one at a time: each one's choices count for the next
            found = self._novelty.fill(1, self._draw)
            if not found:
                break
            self._pending[self._space.canonical_key(found[0])] = found[0].choices
            asked += found
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Adds ``trials`` to what is known, whoever proposed them."""
        self._novelty.tell(trials)
        for trial in trials:
            self._pending.pop(trial.key, None)
            self._told.append(trial.architecture.choices)
            self._rewards.append(trial.reward)

    def _draw(self, missing: int, attempt: int) -> Iterator[Architecture]:
        rewards = half_rank(np.array(self._rewards)) if self._rewards else np.zeros(0)
        rewards = np.concatenate([rewards, np.zeros(len(self._pending))])
        counts, sums = arm_statistics([*self._told, *self._pending.values()], rewards, self._sizes)
        if self._rule == "ucb":
            scores, epsilon = upper_bounds(counts, sums, width=self._width), attempt / 8
        else:
            means, deviations = posterior_of_means(counts, sums, noise=1.0)
            wide = self._width * 2.0**attempt * deviations
            scores, epsilon = means + wide * self._rng.standard_normal(means.shape), 0.0
        for _ in range(missing):
            choices: tuple[int, ...] = ()
            while not self._space.is_complete(choices):
                mask = self._space.mask(choices)
                values = scores[len(choices), : len(mask)]
                choices += (epsilon_greedy(values, mask, epsilon, self._rng),)
            yield Architecture(self._space.name, choices)
