"""NSGA-II through Optuna: repeats, foreign trials and settings; the contract has the rest."""

from __future__ import annotations

import numpy as np
import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Cost, Measurement, SearchContext, Trial, hypervolume
from rlnas_fast.strategies.nsga2 import Nsga2
from rlnas_fast.strategies.random import RandomSearch

from .conftest import Grid

SPACE = Grid((4, 4, 4, 4, 4))


def volume(strategy, trials: int = 150) -> float:  # type: ignore[no-untyped-def]
    """Of accuracy, which the first half of the decisions helps, and of speed, which the others do."""
    found = []
    for number in range(trials):
        (a,) = strategy.ask(1, SearchContext())
        c = np.array(a.choices) / 3
        m = Measurement(
            accuracy=float(c[:2].prod()), cost=Cost(latency_s=float(2 - c[2:].prod() * (1 - c[0] / 2)))
        )
        strategy.tell([Trial(number, number, a, SPACE.canonical_key(a), m, 0.0)])
        found.append((m.accuracy, -(m.cost.latency_s or 0)))
    return hypervolume(np.array(found), (0.0, -2.0))


def test_it_beats_random_search() -> None:
    ours = np.mean([volume(Nsga2(SPACE, seed=s, population=10)) for s in range(4)])
    theirs = np.mean([volume(RandomSearch(SPACE, seed=s)) for s in range(4)])
    assert ours > theirs


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="population = 1"):
        Nsga2(SPACE, seed=0, population=1)
    with pytest.raises(ConfigError, match="two objectives"):
        Nsga2(SPACE, seed=0, objectives=("accuracy",))
