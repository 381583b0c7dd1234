"""The search loop: what it costs beside the training of the children.

The rows of the foundation: overhead of a trial, one update of the controller, a child inside and outside
the framework, a search that is killed and resumed; then workers, spaces and tables.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import search_loop_children as children
import search_loop_workers as workers
import torch
from harness import Row, main

from rlnas_fast.executors.serial import Serial
from rlnas_fast.search import (
    Budget,
    Cost,
    Measurement,
    Request,
    SearchContext,
    Strategy,
    TaskSpec,
    Trial,
    child_seed,
    run_search,
)
from rlnas_fast.search.rewards import soft
from rlnas_fast.spaces.chain_cnn import ChainCNN
from rlnas_fast.storage.measurement_cache import SqliteCache
from rlnas_fast.storage.sqlite_log import SqliteLog
from rlnas_fast.strategies.random import RandomSearch
from rlnas_fast.strategies.reinforce import Reinforce

SPACE = ChainCNN(TaskSpec((1, 8, 8), 10))
CRASH_TEST = str(Path(__file__).with_name("crash_test.py"))
STRATEGIES = {"random": RandomSearch, "reinforce": Reinforce}


class Instant:
    """Answers at once, with numbers that depend on the child's seed alone."""

    def identity(self) -> Mapping[str, str]:
        return {"evaluator": "instant"}

    def evaluate(self, request: Request) -> Measurement:
        noise = request.seed / 2**31
        return Measurement(accuracy=noise, parameters=1000, cost=Cost(latency_s=1e-3 * (1 + noise)))


def seconds_a_trial(strategy: Strategy, trials: int) -> float:
    """The wall time of a whole search, log and cache included, over its number of trials."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with SqliteLog(path / "trials.sqlite") as log, SqliteCache(path / "measurements.sqlite") as cache:
            started = time.perf_counter()
            result = run_search(
                space=SPACE, strategy=strategy, evaluator=Instant(), reward=soft(), executor=Serial(),
                log=log, cache=cache, trials=trials, batch_size=10, budget=Budget(1), seed=0,
            )  # fmt: skip
            spent = time.perf_counter() - started
    if len(result.trials) != trials:
        raise RuntimeError(f"asked for {trials} trials, got {len(result.trials)}")
    return spent / trials


def seconds_an_update(repeats: int) -> float:
    """Median time to sample 10 architectures and learn from them, on one thread."""
    strategy = Reinforce(SPACE, seed=0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    number = 0
    for batch in range(repeats):
        started = time.perf_counter()
        asked = strategy.ask(10, SearchContext())
        spent = time.perf_counter() - started
        trials = []
        for architecture in asked:
            key = SPACE.canonical_key(architecture)
            accuracy = child_seed(0, key) / 2**31
            trials.append(Trial(number, batch, architecture, key, Measurement(accuracy=accuracy), accuracy))
            number += 1
        started = time.perf_counter()
        strategy.tell(trials)
        times.append(spent + time.perf_counter() - started)
    torch.set_num_threads(before)
    return statistics.median(times)


def measure(quick: bool) -> list[Row]:
    """Every row, once."""
    few, many = (500, 2000) if quick else (1000, 10000)
    rows = []
    for name, most_ms in (("random", 3.0), ("reinforce", 15.0)):
        short = seconds_a_trial(STRATEGIES[name](SPACE, seed=0), few)
        long = seconds_a_trial(STRATEGIES[name](SPACE, seed=0), many)
        rows.append(
            Row(f"overhead of a trial, {name}, {few} trials", short * 1e3, most_ms, unit="ms", at_most=True)
        )
        rows.append(
            Row(f"overhead of a trial, {name}, {many} trials / {few}", long / short, 1.3, at_most=True)
        )
    update = seconds_an_update(20 if quick else 100)
    rows.append(Row("sampling and one update, 10 architectures", update * 1e3, 40.0, unit="ms", at_most=True))
    rows.append(Row("child inside / by hand", children.inside_over_by_hand(quick), 1.1, at_most=True))
    return rows


def measure_once(quick: bool) -> list[Row]:
    """Rows that are counts, or that take minutes."""
    kills = 3 if quick else 20
    crash = subprocess.run(
        [sys.executable, CRASH_TEST, "--kills", str(kills)], check=False, stdout=sys.stderr
    )
    rows = [Row(f"{kills} kills: sequence as undisturbed", float(crash.returncode == 0), 1.0, unit="holds")]
    return rows + workers.measure(quick)


if __name__ == "__main__":
    main(__doc__, measure, once=measure_once)
