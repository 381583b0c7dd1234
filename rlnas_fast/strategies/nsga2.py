"""NSGA-II through Optuna: the evolutionary baseline for several objectives."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..search import MAXIMISED, Architecture, SearchContext, SearchSpace, Trial
from .moves import repair
from .novelty import Novelty


class Nsga2:
    """Optuna's NSGA-II over the decisions of a space.

    Source: Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II (2002).
    Deviations: what is already known is told to the algorithm again and not tried again, so that its
    generations go on while evaluations are distinct; choices that are not valid are drawn anew.

    Args:
        space: where to search.
        seed: of its own generators.
        objectives: names of numbers of a measurement; accuracies are maximised, all else is minimised.
        allow_repeats: proposes an architecture again although it was asked or told before.
        population: of a generation.
    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        objectives: tuple[str, ...] = ("accuracy", "latency_s"),
        allow_repeats: bool = False,
        population: int = 20,
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigError("strategy 'nsga2' needs Optuna: pip install 'rlnas_fast[nsga2]'") from error
        if population < 2:
            raise ConfigError(f"population = {population}: give at least 2")
        if len(objectives) < 2:
            raise ConfigError("strategy 'nsga2' needs at least two objectives: give --objectives")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._space = space
        self._objectives = objectives
        self._rng = np.random.default_rng(seed)
        self._novelty = Novelty(space, self._rng, allow_repeats=allow_repeats)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its notes on experimental arguments are not the user's
            self._study = optuna.create_study(
                directions=["maximize" if name in MAXIMISED else "minimize" for name in objectives],
                sampler=optuna.samplers.NSGAIISampler(population_size=population, seed=seed),
            )
        self._open: dict[str, Any] = {}
        self._known: dict[str, list[float] | None] = {}

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures; fewer only when the space has no more."""
        return self._novelty.fill(count, self._draw)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Adds ``trials`` to the population; one that lacks an objective counts as failed."""
        self._novelty.tell(trials)
        for trial in trials:
            values = [trial.measurement.value(name) for name in self._objectives]
            good = [value for value in values if value is not None]
            known = good if trial.state == "complete" and len(good) == len(values) else None
            self._known[trial.key] = known
            asked = self._open.pop(trial.key, None)
            if asked is None:  # not of its own asking: made its next proposal
                self._study.enqueue_trial({f"{i}": c for i, c in enumerate(trial.architecture.choices)})
                asked, _ = self._propose()
            self._tell(asked, known)

    def _draw(self, missing: int, attempt: int) -> Iterator[Architecture]:
        for _ in range(missing):
            asked, wanted = self._propose()
            architecture = repair(self._space, wanted, self._rng)
            key = self._space.canonical_key(architecture)
            if key in self._known:
                self._tell(asked, self._known[key])
            elif key not in self._open:
                self._open[key] = asked
            yield architecture

    def _tell(self, asked: Any, values: list[float] | None) -> None:
        state = self._optuna.trial.TrialState
        self._study.tell(asked, values, state=state.COMPLETE if values is not None else state.FAIL)

    def _propose(self) -> tuple[Any, list[int]]:
        """Optuna's next trial, and a choice for every decision."""
        asked = self._study.ask()
        return asked, [
            asked.suggest_categorical(f"{i}", list(range(len(decision.choices))))
            for i, decision in enumerate(self._space.decisions)
        ]
