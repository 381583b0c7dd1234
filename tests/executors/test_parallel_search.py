from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlnas_fast.executors.process_pool import ProcessPool
from rlnas_fast.executors.serial import Serial
from rlnas_fast.search import Architecture, Budget, Decision, Request, SearchContext, Trial, run_search
from rlnas_fast.search.rewards import accuracy
from rlnas_fast.storage.sqlite_log import SqliteLog
from rlnas_fast.strategies.a3c import A3C

sys.path.insert(0, str(Path(__file__).parent))  # spawned workers find the evaluators by this path
from worker_evaluators import Deterministic, KillsEveryTenth, Raising

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


def search(
    executor: Any, evaluator: Any, folder: Path, strategy: Any = None, before: Sequence[Trial] = ()
) -> list[Trial]:
    with SqliteLog(folder / "trials.sqlite") as log:
        if before:
            log.append(before)
        result = run_search(
            space=Squares(),
            strategy=strategy or Greedy(),
            evaluator=evaluator,
            reward=accuracy(),
            executor=executor,
            log=log,
            trials=40,
            batch_size=6 if strategy is None else 8,
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


def test_the_log_of_eight_asynchronous_workers_replays(tmp_path: Path) -> None:
    for name in ("together", "again", "resumed"):
        (tmp_path / name).mkdir()
    with ProcessPool(8) as pool:
        whole = search(pool, Deterministic(), tmp_path / "together", A3C(Squares(), seed=0))
    assert len({trial.key for trial in whole}) == 40
    unused = Raising()  # nothing is left to evaluate
    assert search(Serial(), unused, tmp_path / "again", A3C(Squares(), seed=0), whole) == whole
    resumed = search(Serial(), Deterministic(), tmp_path / "resumed", A3C(Squares(), seed=0), whole[:20])
    assert resumed[:20] == whole[:20]
    flying = {trial.key for trial in whole[20:] if trial.batch <= 20}
    assert len(flying) == 8
    assert {trial.key for trial in resumed[20:28]} == flying  # one worker takes them in the order asked


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_is_appended_to_the_requests_meanwhile_is_run(workers: int) -> None:
    requests = [Request(Architecture("squares", (0, 0)), Budget(1), seed) for seed in range(2)]
    executor = ProcessPool(workers) if workers else Serial()
    found = []
    for position, measurement, _ in executor.run(Deterministic(), requests):
        found.append((position, measurement.accuracy))
        if len(requests) < 9:
            requests += [
                replace(requests[0], seed=len(requests)),
                replace(requests[0], seed=len(requests) + 1),
            ]
    assert sorted(found) == [(seed, seed / 7) for seed in range(10)]
    if workers:
        executor.close()
