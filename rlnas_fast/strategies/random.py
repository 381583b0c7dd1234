"""Random search: the baseline that everything else must beat at an equal number of trials."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..search import Architecture, SearchContext, SearchSpace, Trial, sample_uniform
from .novelty import Novelty


class RandomSearch:
    """Draws each decision uniformly among its valid choices.

    Source: Li and Talwalkar, Random Search and Reproducibility for Neural Architecture Search (2019).

    Args:
        space: where to search.
        seed: of its own generator.
        allow_repeats: proposes an architecture again although it was asked or told before.
    """

    def __init__(self, space: SearchSpace, *, seed: int, allow_repeats: bool = False) -> None:
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._novelty = Novelty(space, self._rng, allow_repeats=allow_repeats)

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures; fewer only when the space has no more."""
        return self._novelty.fill(
            count, lambda missing, _: (sample_uniform(self._space, self._rng) for _ in range(missing))
        )

    def tell(self, trials: Sequence[Trial]) -> None:
        """Remembers what was tried, so as not to propose it again."""
        self._novelty.tell(trials)
