"""Strategies on published tables: what is found after how many distinct evaluations, against the baselines.

The reward is what a searcher would see, the score the test accuracy (mean over seeds) of the architecture
with the best reward so far.  One trial is asked and told at a time.  Differences are paired by seed, with
intervals of 95 %.  Needs ``RLNAS_DATA_DIR`` with nasbench201.npz and nasbench_macro_cifar10.npz, and Optuna.

Searches run in ``OMP_NUM_THREADS`` processes (all cores where it is not set) and are kept in
build/bench_tabular: a run that was ended goes on where it was, and only what depends on changed code runs
again.  ``--quick`` has too few seeds to decide anything but the baselines and the cost.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from harness import Row, main

from rlnas_fast.comparison import Plan, Searches, TableSource, compare, search, table_of
from rlnas_fast.components import Component, make
from rlnas_fast.config import SearchConfig
from rlnas_fast.report.curves import interval, paired
from rlnas_fast.rl.threads import one_blas_thread, one_torch_thread

PIECES = Path(__file__).parent.parent / "build" / "bench_tabular"
AT = (50, 100, 150, 300)
NOISE_POINTS = 0.3
DEFAULT = SearchConfig().strategy.name
BASELINES = {"random": 500, "evolution": 300, "local-search": 300}  # evaluations without noise
PEERS = {"Optuna TPE": "optuna_peer:TPE"}
SLOW_LEARNERS = {"q-learning", "dqn", "a3c"}
LEARNERS = ("reinforce", "ppo", "a3c", "q-learning", "dqn", "trpo", "sac", "bandit")

# The figures of record for simple, correct implementations, at AT; 200 seeds.
RECORD = {
    ("cifar10", "random"): (93.63, 93.77, 93.85, 93.97),
    ("cifar10", "evolution"): (93.84, 94.07, 94.18, 94.31),
    ("cifar10", "local-search"): (94.10, 94.27, 94.34, 94.37),
    ("cifar100", "random"): (71.06, 71.50, 71.75, 72.20),
    ("cifar100", "evolution"): (71.64, 72.46, 72.78, 73.08),
    ("cifar100", "local-search"): (72.32, 73.02, 73.21, 73.42),
}
ABLATION = {
    "without climbs elsewhere": {"patience": 0},
    "without the policy (uniform proposals)": {"policy_temperature": 0.0},
    "without recombinations": {"proposals": 0},
    "from one incumbent": {"incumbents": 1},
}


@dataclass(frozen=True)
class Seeds:
    """How many searches of whom."""

    many: int
    few: int


def tables(folder: Path) -> list[TableSource]:
    cells = folder / "nasbench201.npz"
    return [
        TableSource("cifar10", cells, "e200_cifar10valid_valid_acc", "e200_cifar10_test_acc"),
        TableSource("cifar100", cells, "e200_cifar100_test_acc_one_seed", "e200_cifar100_test_acc"),
        TableSource(
            "macro",
            folder / "nasbench_macro_cifar10.npz",
            "test_acc:0",
            "mean_acc",
            Component(name="nasbench-macro"),
        ),
    ]


def plans(table: TableSource, seeds: Seeds, noise: float) -> dict[str, Plan]:
    """The searches of a table, by the strategy's name."""

    def plan(name: str, count: int, trials: int, **options: object) -> Plan:
        return Plan(table, Component(name=name, options=options), count, trials, noise)

    found = {name: plan(name, seeds.many, 150 if noise else trials) for name, trials in BASELINES.items()}
    if not noise:  # random search costs nothing and varies most: five times the seeds halve its interval
        found["random"] = plan("random", 5 * seeds.many, BASELINES["random"])
    found[DEFAULT] = plan(DEFAULT, seeds.many, 150)
    found |= {name: plan(peer, seeds.few, 150) for name, peer in PEERS.items()}
    if not noise:
        for name in LEARNERS:
            found[name] = plan(name, seeds.few, 500 if name in SLOW_LEARNERS else 150)
        for name, options in ABLATION.items():
            found[name] = plan(DEFAULT, seeds.few, 150, **options)
    return found


def rows_of(where: str, found: dict[str, Searches], noise: float) -> list[Row]:
    ours = found[DEFAULT].scores
    rows = []
    for name, at, must, aim in (
        ("evolution", (50, 100, 150), 1e-9, None),
        ("local-search", (100, 150), -0.05, 0.0),
        ("local-search", (50,), None, 0.0),
        *((peer, (50, 100, 150), None, 0.0) for peer in PEERS),
        ("random", (150,), 1e-9, None),
    ):
        rows += difference_rows(f"{where} {DEFAULT} - {name}", ours, found[name].scores, at, must, aim)
    for name in LEARNERS if not noise else ():
        theirs, last = found["random"].scores, found[name].scores.shape[1]
        rows += difference_rows(f"{where} {name} - random", found[name].scores, theirs, (last,), 1e-9, None)
    for name in ABLATION if not noise else ():
        rows += difference_rows(
            f"{where} {DEFAULT} - {name}", ours, found[name].scores, (50, 100, 150), None, None
        )
    for name, searches in found.items():
        rows += mean_rows(f"{where} {name}", searches.scores)
    return rows


def difference_rows(
    name: str, ours: np.ndarray, theirs: np.ndarray, at: Sequence[int], must: float | None, aim: float | None
) -> list[Row]:
    """The lower ends of the paired intervals of ours minus theirs."""
    rows = []
    for trial in at:
        mean, half = paired(ours[:, trial - 1], theirs[:, trial - 1])
        detail = f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
        rows.append(
            Row(f"{name} at {trial}: low end", mean - half, must=must, aim=aim, unit="points", detail=detail)
        )
    return rows


def mean_rows(name: str, scores: np.ndarray) -> list[Row]:
    """The learning curve at a few places."""
    at = [trial for trial in (*AT, 500) if trial <= scores.shape[1]]
    means = {trial: interval(scores[:, trial - 1]) for trial in at}
    detail = ", ".join(f"{trial}: {mean:.3f} ± {half:.3f}" for trial, (mean, half) in means.items())
    return [
        Row(f"{name}: mean at {at[-1]}", means[at[-1]][0], unit="%", detail=f"{detail}; {len(scores)} seeds")
    ]


def record_rows(table: str, found: dict[str, Searches]) -> list[Row]:
    """Whether each baseline is at its figure of record, both figures having their sampling error."""
    rows = []
    for name in BASELINES:
        scores = found[name].scores
        for at, figure in zip(AT, RECORD.get((table, name), ()), strict=False):
            mean, half = interval(scores[:, at - 1])
            allowed = half + 1.96 * scores[:, at - 1].std(ddof=1) / 200**0.5 + 0.005
            rows.append(
                Row(
                    f"{table} {name} at {at}: off the record",
                    abs(mean - figure),
                    must=allowed,
                    unit="points",
                    at_most=True,
                    detail=f"{mean:.3f}, of record {figure:.2f}",
                )
            )
    return rows


def cost_row(source: TableSource) -> Row:
    """Seconds on one core to ask and tell 150 trials, one at a time; median of five."""
    table, seconds = table_of(source), []
    for seed in range(5):
        with one_blas_thread(), one_torch_thread():
            strategy = make("strategy", Component(name=DEFAULT), table.space, seed=seed)
            seconds.append(search(strategy, table, 150)[1])
    return Row(
        f"{source.name} {DEFAULT}, 150 trials", float(np.median(seconds)), must=1.5, unit="s", at_most=True
    )


def progress(done: int, total: int) -> None:
    stamp = time.strftime("%H:%M:%S")
    print(f"{stamp} {done} of {total} groups of five searches", file=sys.stderr, flush=True)


def measure(quick: bool) -> list[Row]:
    folder = os.environ.get("RLNAS_DATA_DIR")
    if folder is None:
        sys.exit("set RLNAS_DATA_DIR to the folder that holds the tables")
    seeds = Seeds(20, 5) if quick else Seeds(200, 40)
    wanted = {
        (table.name, noise): plans(table, seeds, noise)
        for table in tables(Path(folder))
        for noise in ((0.0,) if quick else (0.0, NOISE_POINTS))
    }
    jobs = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    every = sorted(
        ((where, name, plan) for where, by_name in wanted.items() for name, plan in by_name.items()),
        key=lambda item: item[1] not in {*BASELINES, DEFAULT},  # what decides comes first
    )
    results = compare([plan for _, _, plan in every], pieces=PIECES, jobs=jobs, on_piece=progress)
    found: dict[tuple[str, float], dict[str, Searches]] = {where: {} for where in wanted}
    for (where, name, _), searches in zip(every, results, strict=True):
        found[where][name] = searches
    rows: list[Row] = []
    for (table, noise), by_strategy in found.items():
        rows += record_rows(table, by_strategy) if not noise else []
        rows += rows_of(f"{table} noisy" if noise else table, by_strategy, noise)
    rows += [cost_row(table) for table in tables(Path(folder))]
    if quick:
        return [replace(row, must=None) if "low end" in row.name else row for row in rows]
    return rows


if __name__ == "__main__":
    main(__doc__, measure, processes=1)
