"""Local search: climb to the first neighbour that is better until none is, then start elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .moves import neighbours
from .novelty import Novelty


class LocalSearch:
    """Tries the neighbours of one architecture in random order and moves as soon as one is better.

    Where none is, it starts again from a random one.  What is already known is not tried again but
    counts.  Of a batch it moves to the best; what a batch has room for beyond the neighbourhood goes to
    random architectures, which the next start is chosen from.

    Source: White et al., Exploring the Loss Landscape in Neural Architecture Search (2021), in the
    variant that does not query the whole neighbourhood before it moves.

    Args:
        space: where to search.
        seed: of its own generator.
        allow_repeats: proposes an architecture again although it was asked or told before.
        starts: random architectures tried before each climb, which begins at the best of them.
    """

    def __init__(
        self, space: SearchSpace, *, seed: int, allow_repeats: bool = False, starts: int = 1
    ) -> None:
        if starts < 1:
            raise ConfigError(f"starts = {starts}: give at least 1")
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._novelty = Novelty(space, self._rng, allow_repeats=allow_repeats)
        self._starts = starts
        self._missing_starts = starts
        self._told: dict[str, Trial] = {}
        self._pool: list[Trial] = []
        self._current: Trial | None = None
        self._around: dict[str, Architecture] = {}
        self._queue: deque[Architecture] = deque()

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures; fewer only when the space has no more."""
        asked: list[Architecture] = []
        while len(asked) < count:
            if self._queue:
                architecture = self._queue.popleft()
                if self._novelty.take(architecture):
                    asked.append(architecture)
            elif self._missing_starts > 0 or not self._advance():
                drawn = self._novelty.unseen(1)
                if not drawn:
                    break
                self._missing_starts -= 1
                asked += drawn
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Climbs to the best of ``trials`` that is a better neighbour; others may become a start."""
        self._novelty.tell(trials)
        self._told.update((trial.key, trial) for trial in trials)
        self._pool += [trial for trial in trials if trial.key not in self._around]
        self._climb([trial for trial in trials if trial.key in self._around])

    def _climb(self, candidates: Sequence[Trial]) -> bool:
        """Moves to the best of ``candidates`` if it is better; says whether it is."""
        best = max(candidates, key=lambda trial: trial.reward, default=None)
        if best is None or (self._current is not None and best.reward <= self._current.reward):
            return False
        self._current = best
        around = neighbours(self._space, best.architecture, self._rng)
        order = [around[i] for i in self._rng.permutation(len(around))]
        self._around = {self._space.canonical_key(architecture): architecture for architecture in order}
        self._queue = deque(self._around.values())
        return True

    def _advance(self) -> bool:
        """Moves on from where all neighbours were asked; False if a random architecture is needed first.

        A better neighbour that was known before the climb is followed only now: what is new around here
        comes first, or every climb would end where the one before it ended.
        """
        if self._current is not None:
            if not self._around.keys() <= self._told.keys():
                return False
            if self._climb([self._told[key] for key in self._around]):
                return True
            self._current, self._around = None, {}
            self._missing_starts = self._starts - len(self._pool)
        if self._missing_starts > 0 or not self._pool:
            return False
        pool, self._pool = self._pool, []
        return self._climb(pool)
