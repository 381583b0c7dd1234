"""Exploration by a bandit: some proposals come from one bandit a decision, whatever the strategy thinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import ConfigError
from ..rl.schedules import schedule
from ..search import Architecture, SearchContext, SearchSpace, Strategy, Trial
from .bandit import Bandit


class BanditExploration:
    """With probability epsilon a proposal is a bandit's, which knows good operations but no interactions.

    Both learn from every trial.  What the bandit proposes is off-policy to a strategy that is on-policy.

    Args:
        space: where to search.
        make: makes the strategy for the space it is given.
        seed: of the bandit and of whose turn it is.
        epsilon: probability; a number or a schedule "start:end:trials".
        rule: of the bandit, "thompson" or "ucb".
        width: of the bandit's bounds or posterior.
    """

    def __init__(
        self,
        space: SearchSpace,
        make: Callable[[SearchSpace], Strategy],
        *,
        seed: int,
        epsilon: float | str = "0.5:0.05:100",
        rule: str = "thompson",
        width: float = 1.0,
    ) -> None:
        self._epsilon = schedule("epsilon", epsilon, high=1)
        self._space = space
        self._strategy = make(space)
        if isinstance(self._strategy, Bandit):
            raise ConfigError("exploration 'bandit' with strategy 'bandit': it is one already")
        self.asynchronous = getattr(self._strategy, "asynchronous", False)
        self.conditioned = getattr(self._strategy, "conditioned", False)
        self._bandit = Bandit(space, seed=seed, rule=rule, width=width)
        self._rng = np.random.default_rng([seed, 1])
        self._asked = self._told = 0
        self._pending: set[str] = set()

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` architectures; fewer only when the space has no more."""
        asked: list[Architecture] = []
        while len(asked) < count:
            explore = self._rng.random() < self._epsilon.at(self._asked)
            turns = (self._bandit, self._strategy) if explore else (self._strategy, self._bandit)
            new = next((a for turn in turns for a in self._new(turn, context)), None)
            if new is None:
                break
            self._pending.add(self._space.canonical_key(new))
            self._asked += 1
            asked.append(new)
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Tells both."""
        self._told += len(trials)
        self._asked = max(self._asked, self._told)  # after a log that was only told, the schedule goes on
        self._pending.difference_update(trial.key for trial in trials)
        self._strategy.tell(trials)
        self._bandit.tell(trials)

    def _new(self, turn: Strategy, context: SearchContext) -> list[Architecture]:
        """One proposal that the other has not made in the meantime, or none."""
        asked: list[Architecture] = []
        for _ in range(1 + len(self._pending)):  # one more would be a repeat, which the strategy allows
            asked = turn.ask(1, context)
            if not asked or self._space.canonical_key(asked[0]) not in self._pending:
                break
        return asked
