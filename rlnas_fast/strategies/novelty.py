"""What a strategy may still propose: nothing twice, and everything before it gives up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from ..search import Architecture, SearchSpace, Trial, sample_uniform


class Novelty:
    """Remembers, by canonical key, what was asked or told, and finds what was not.

    Args:
        space: where to look.
        rng: orders the enumeration, and draws when sampling fails.
        allow_repeats: lets everything pass.
        rounds: how often ``fill`` draws before it enumerates the space.
    """

    def __init__(
        self, space: SearchSpace, rng: np.random.Generator, *, allow_repeats: bool = False, rounds: int = 8
    ) -> None:
        self._space = space
        self._key = lru_cache(maxsize=1 << 16)(space.canonical_key)
        self._rng = rng
        self._allow_repeats = allow_repeats
        self._rounds = rounds
        self._keys: set[str] = set()
        self._rest: Iterator[Architecture] | None = None

    def is_new(self, architecture: Architecture) -> bool:
        """Whether it may be proposed; does not remember it."""
        return self._allow_repeats or self._key(architecture) not in self._keys

    def take(self, architecture: Architecture) -> bool:
        """Remembers ``architecture``; False if it was known and may not be proposed again."""
        key = self._key(architecture)
        if key in self._keys:
            return self._allow_repeats
        self._keys.add(key)
        return True

    def tell(self, trials: Sequence[Trial]) -> None:
        """Remembers what was tried, whoever asked for it."""
        self._keys.update(trial.key for trial in trials)

    def fill(self, count: int, draw: Callable[[int, int], Iterable[Architecture]]) -> list[Architecture]:
        """``count`` architectures that are new; fewer only when the space has no more.

        Args:
            draw: (how many are missing, number of the round from 0) -> proposals, new or not.
        """
        found: list[Architecture] = []
        for attempt in range(self._rounds):
            if len(found) == count:
                return found
            proposals = draw(count - len(found), attempt)
            found += [architecture for architecture in proposals if self.take(architecture)]
        return found + self.unseen(count - len(found))

    def unseen(self, count: int) -> list[Architecture]:
        """``count`` new architectures: a few uniform draws, then whatever an enumeration still finds."""
        found: list[Architecture] = []
        for _ in range(2 * count):
            if len(found) == count or self._rest is not None:
                break
            architecture = sample_uniform(self._space, self._rng)
            if self.take(architecture):
                found.append(architecture)
        if len(found) < count and self._rest is None:
            self._rest = enumerate_space(self._space, self._rng)
        while self._rest is not None and len(found) < count:
            candidate = next(self._rest, None)
            if candidate is None:
                self._rest = None  # a space that opens later is looked through again
                break
            if self.take(candidate):
                found.append(candidate)
        return found


def enumerate_space(space: SearchSpace, rng: np.random.Generator | None = None) -> Iterator[Architecture]:
    """Every architecture of ``space`` once, depth first, lazily; with ``rng``, branches in random order."""
    stack: list[tuple[int, ...]] = [()]
    while stack:
        prefix = stack.pop()
        if space.is_complete(prefix):
            yield Architecture(space.name, prefix)
            continue
        valid = np.flatnonzero(space.mask(prefix))[::-1]
        if rng is not None:
            valid = rng.permutation(valid)
        stack.extend((*prefix, int(choice)) for choice in valid)
