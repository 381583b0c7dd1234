"""Regularised evolution: the young replace the old."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import ConfigError
from ..search import Architecture, SearchContext, SearchSpace, Trial, sample_uniform
from .moves import mutate
from .novelty import Novelty


class Evolution:
    """Mutates the best of a few members of a population in which the oldest dies.

    Source: Real et al., Regularized Evolution for Image Classifier Architecture Search (2019); population
    10 and sample 3 as in NATS-Bench (Dong et al. 2021).
    Deviations: a child that was tried before is not tried again; after several such draws the mutations
    add up, two at a time and then three, so that a population that has converged still finds a way out.

    Args:
        space: where to search.
        seed: of its own generator.
        allow_repeats: proposes an architecture again although it was asked or told before.
        population: how many trials, the latest, may become parents.
        sample: how many of them, drawn without replacement, compete to be one.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool = False,
        population: int = 10,
        sample: int = 3,
    ) -> None:
        if not 1 <= sample <= population:
            raise ConfigError(
                f"sample = {sample}, population = {population}: the sample must be from 1 to the population"
            )
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._novelty = Novelty(space, self._rng, allow_repeats=allow_repeats, rounds=24)
        self._population: deque[Trial] = deque(maxlen=population)
        self._sample = sample

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures: random until the population is full, then children of it."""
        return self._novelty.fill(count, self._draw)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Adds ``trials`` to the population, where they push out the oldest."""
        self._novelty.tell(trials)
        self._population.extend(trials)

    def _draw(self, missing: int, attempt: int) -> Iterator[Architecture]:
        for _ in range(missing):
            if len(self._population) < (self._population.maxlen or 1):
                yield sample_uniform(self._space, self._rng)
                continue
            drawn = self._rng.permutation(len(self._population))[: self._sample]
            rivals = [self._population[i] for i in drawn]
            child = max(rivals, key=lambda trial: trial.reward).architecture
            for _ in range(1 + attempt // 8):
                child = mutate(self._space, child, self._rng)
            yield child
