from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlnas_fast.executors.process_pool import ProcessPool
from rlnas_fast.executors.serial import Serial
from rlnas_fast.search import Architecture, Budget, Decision, SearchContext, Trial, run_search
from rlnas_fast.search.rewards import accuracy
from rlnas_fast.storage.sqlite_log import SqliteLog

sys.path.insert(0, str(Path(__file__).parent))  # spawned workers find the evaluators by this path
from worker_evaluators import Deterministic, KillsEveryTenth

EIGHT = tuple("abcdefgh")


@dataclass(frozen=True)
class Squares:
    """64 points: two decisions of eight."""

    name: str = "squares"
    decisions: tuple[Decision, ...] = (Decision("row", EIGHT), Decision("column", EIGHT))

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        return np.ones(8, dtype=bool)

    def is_complete(self, prefix: tuple[int, ...]) -> bool:
        return len(prefix) == 2

    def canonical_key(self, architecture: Architecture) -> str:
        return self.describe(architecture)

    def describe(self, architecture: Architecture) -> str:
        return "".join(EIGHT[choice] for choice in architecture.choices)


class Greedy:
    """Walks on from the best point so far, so that what it asks depends on every reward and their order."""

    def __init__(self) -> None:
        self._told: list[Trial] = []

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        best = max(self._told, key=lambda trial: trial.reward).number if self._told else 0
        start = 7 * best + 11 * len(self._told)
        return [Architecture("squares", divmod((start + 5 * i) % 64, 8)) for i in range(count)]

    def tell(self, trials: Sequence[Trial]) -> None:
        self._told.extend(trials)


def search(executor: Any, evaluator: Any, folder: Path) -> list[Trial]:
    with SqliteLog(folder / "trials.sqlite") as log:
        result = run_search(
            space=Squares(),
            strategy=Greedy(),
            evaluator=evaluator,
            reward=accuracy(),
            executor=executor,
            log=log,
            trials=40,
            batch_size=6,
            budget=Budget(1),
            seed=0,
        )
        assert list(result.trials) == log.read()
    return [replace(trial, seconds=0.0) for trial in result.trials]


def test_workers_that_die_leave_the_search_as_it_would_have_been(tmp_path: Path) -> None:
    for name in ("alone", "together", "markers"):
        (tmp_path / name).mkdir()
    alone = search(Serial(), Deterministic(), tmp_path / "alone")
    with ProcessPool(2) as pool:
        together = search(pool, KillsEveryTenth(folder=tmp_path / "markers"), tmp_path / "together")
    assert together == alone
    assert len(list((tmp_path / "markers").iterdir())) >= 2
