"""Optuna's tree-structured Parzen estimator as a strategy: a peer to compare with, with its own defaults."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna

from rlnas_fast.search import Architecture, SearchContext, SearchSpace, Trial
from rlnas_fast.strategies.novelty import Novelty

optuna.logging.set_verbosity(optuna.logging.WARNING)


class TPE:
    """``TPESampler`` on spaces without masks; only new architectures count as evaluations.

    What it proposes again costs it nothing: it is told the known reward at once and asked again, up to
    ``REPEATS`` times, after which a random new architecture takes the place.
    """

    REPEATS = 100

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        self._space = space
        self._novelty = Novelty(space, np.random.default_rng(seed))
        self._distributions = {
            decision.name: optuna.distributions.CategoricalDistribution(list(range(len(decision.choices))))
            for decision in space.decisions
        }
        self._study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        self._rewards: dict[str, float] = {}
        self._asked: dict[str, optuna.trial.Trial] = {}

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures; fewer only when the space has no more."""
        asked: list[Architecture] = []
        for _ in range(count):
            asked += self._propose() or self._novelty.unseen(1)
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Tells the study; what it never asked for is added to it."""
        for trial in trials:
            self._rewards[trial.key] = trial.reward
            waiting = self._asked.pop(trial.key, None)
            if waiting is not None:
                self._study.tell(waiting, trial.reward)
                continue
            choices = zip(self._distributions, trial.architecture.choices, strict=True)
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=dict(choices), distributions=self._distributions, value=trial.reward
                )
            )

    def _propose(self) -> list[Architecture]:
        for _ in range(self.REPEATS):
            proposal = self._study.ask(self._distributions)
            choices = tuple(proposal.params[name] for name in self._distributions)
            architecture = Architecture(self._space.name, choices)
            key = self._space.canonical_key(architecture)
            if self._novelty.take(architecture):
                self._asked[key] = proposal
                return [architecture]
            if key in self._rewards:
                self._study.tell(proposal, self._rewards[key])
            else:
                self._study.tell(proposal, state=optuna.trial.TrialState.FAIL)
        return []
