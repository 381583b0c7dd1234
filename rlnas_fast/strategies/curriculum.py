"""A curriculum: a strategy sees a small part of its space first, and ever more of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import ConfigError
from ..rl.schedules import schedule
from ..search import Architecture, Decision, SearchContext, SearchSpace, Strategy, Trial, sample_uniform


class Curriculum:
    """Opens the space from small to large, for any strategy.

    Where architectures may end early, the open part is the short ones; elsewhere it is the first choices
    of each decision, which spaces list from small to large.  When nothing new is left in the open part,
    it opens wider at once.  A trial from outside the open part is told once its part is open.

    Source: curriculum learning, Bengio et al. (2009); growing depth as in Liu et al., Progressive Neural
    Architecture Search (2018).

    Args:
        space: the whole of it.
        make: makes the strategy for the space it is given.
        seed: of the strategy.
        open: fraction of the length, or of each decision's choices, that is open; a schedule over trials.
    """

    def __init__(
        self,
        space: SearchSpace,
        make: Callable[[SearchSpace], Strategy],
        *,
        seed: int,
        open: str | float = "0.4:1:50",
    ) -> None:
        self._schedule = schedule("open", open, high=1)
        if self._schedule.at(sys.maxsize) < 1:
            raise ConfigError(f"open = {open}: a curriculum ends with 1, the whole space")
        self._space = _OpenPart(space)
        self._strategy = make(self._space)
        self.asynchronous = getattr(self._strategy, "asynchronous", False)
        self.conditioned = getattr(self._strategy, "conditioned", False)
        self._asked = self._told = 0
        self._waiting: list[Trial] = []

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` architectures of the open part; fewer only when the whole space has no more."""
        self._open(self._schedule.at(self._asked))
        asked = self._new(count, context)
        while len(asked) < count:
            whole = self._space.is_whole()
            self._open(self._space.fraction + 1 / self._space.parts)
            more = self._new(count - len(asked), context)
            if whole and not more:
                break
            asked += more
        self._asked += len(asked)
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Tells the strategy what lies in the open part, and keeps the rest for later."""
        self._told += len(trials)
        self._asked = max(self._asked, self._told)  # after a log that was only told, the schedule goes on
        self._waiting += trials
        self._tell_what_is_open()

    def _new(self, count: int, context: SearchContext) -> list[Architecture]:
        """What the strategy proposes, less other spellings of trials that wait to be told."""
        known = {trial.key for trial in self._waiting}
        found: list[Architecture] = []
        for _ in range(1 + len(known)):
            asked = self._strategy.ask(count - len(found), context)
            found += [a for a in asked if self._space.canonical_key(a) not in known]
            if not asked or len(found) == count:
                break
        return found

    def _open(self, fraction: float) -> None:
        self._space.open(fraction)
        self._tell_what_is_open()

    def _tell_what_is_open(self) -> None:
        ready = [trial for trial in self._waiting if self._space.holds(trial.architecture.choices)]
        if ready:
            self._waiting = [trial for trial in self._waiting if trial not in ready]
            self._strategy.tell(ready)


class _OpenPart:
    """A space of which only a part may be chosen.  Its mask changes as it opens; all else is the space's."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self.name = space.name
        self.canonical_key = space.canonical_key
        self.describe = space.describe
        self.is_complete = space.is_complete
        rng = np.random.default_rng(0)
        lengths = {len(sample_uniform(space, rng).choices) for _ in range(64)}
        self._by_length = len(lengths) > 1
        self.parts = len(space.decisions) if self._by_length else max(len(d.choices) for d in space.decisions)
        self.fraction = 0.0

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return self._space.decisions

    def open(self, fraction: float) -> None:
        """Never closes again."""
        self.fraction = min(1.0, max(self.fraction, fraction))

    def is_whole(self) -> bool:
        return self.fraction >= 1

    def holds(self, choices: tuple[int, ...]) -> bool:
        return all(self.mask(choices[:step])[choice] for step, choice in enumerate(choices))

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        whole = self._space.mask(prefix)
        if self.is_whole():
            return whole
        part = whole.copy()
        if not self._by_length:
            part[max(1, math.ceil(self.fraction * len(part))) :] = False
        elif len(prefix) >= self.fraction * self.parts:
            for choice in np.flatnonzero(whole):
                part[choice] = self._space.is_complete((*prefix, int(choice)))
        return part if part.any() else whole
