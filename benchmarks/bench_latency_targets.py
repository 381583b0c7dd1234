"""Latency targets and fronts on a published table: eight devices, one setting for all of them.

Targets: NAS-Bench-201, the reward from one seed's CIFAR-100 accuracy, the pick (most accurate by that seed
among those at or under the target) scored by the seed mean; targets at the 30th and 50th percentile of
latency over the cells that are connected; 500 distinct evaluations, 40 seeds, against regularised evolution
under the same constraint (feasible first; population 50 and sample 10, the best of seven settings with other
costs and CIFAR-10).  Fronts:
the hypervolume of accuracy and latency after 300 distinct evaluations against NSGA-II, both scaled from the
worst to the best of the table.  Differences are paired by seed, intervals of 95 %.

Needs ``RLNAS_DATA_DIR``.  Interrupted, it goes on where it was if ``RLNAS_CELLS_DIR`` names a folder.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from cells import cell
from harness import Row, main

from rlnas_fast.executors import serial
from rlnas_fast.rl import policies, surrogates
from rlnas_fast.rl.threads import one_blas_thread, one_torch_thread
from rlnas_fast.search import (
    Architecture,
    Budget,
    Cost,
    Measurement,
    Request,
    Reward,
    Strategy,
    TaskSpec,
    Trial,
    goals,
    hypervolume,
    loop,
    pareto,
    run_search,
)
from rlnas_fast.search.rewards import PointwiseReward
from rlnas_fast.spaces import cell_201
from rlnas_fast.strategies import composite, evolution, moves, novelty, nsga2, ppo, reinforce

EVALUATIONS, FRONT_EVALUATIONS, SEEDS, FEW_SEEDS = 500, 300, 40, 10
PERCENTILES = (30, 50)
BATCH = 5
EVOLUTION = functools.partial(evolution.Evolution, population=50, sample=10)


@dataclass(frozen=True)
class Column:
    """One device's latency beside the accuracies, a row an architecture."""

    name: str
    space: cell_201.Cell201
    row_of: dict[tuple[int, ...], int]
    reward: np.ndarray  # fraction, one seed
    score: np.ndarray  # percent, seed mean
    latency_ms: np.ndarray

    def target(self, percentile: float) -> float:
        connected = self.score > 1.5 * self.score.min()
        return float(np.percentile(self.latency_ms[connected], percentile)) / 1e3


@dataclass(frozen=True)
class Look:
    """The evaluator of a column."""

    column: Column

    def identity(self) -> dict[str, str]:
        return {}

    def evaluate(self, request: Request) -> Measurement:
        row = self.column.row_of[request.architecture.choices]
        return Measurement(
            accuracy=float(self.column.reward[row]),
            cost=Cost(latency_s=float(self.column.latency_ms[row]) / 1e3),
        )


class InMemory:
    """A log that lasts as long as its search."""

    def __init__(self) -> None:
        self._trials: list[Trial] = []

    def read(self) -> list[Trial]:
        return list(self._trials)

    def append(self, trials: object) -> None:
        self._trials.extend(trials)  # type: ignore[arg-type]


def columns(folder: Path, reward: str, score: str, names: tuple[str, ...] | None = None) -> list[Column]:
    with np.load(folder / "nasbench201.npz", allow_pickle=False) as table:
        space = cell_201.Cell201(TaskSpec((3, 32, 32), 10), distinct="cells")
        row_of = {tuple(row): i for i, row in enumerate(table["ops"].tolist())}
        devices = table["latency_devices"].tolist()
        return [
            Column(device, space, row_of, table[reward] / 100, table[score], table["latency_ms"][:, k])
            for k, device in enumerate(devices)
            if names is None or device in names
        ]


def trials_of(
    column: Column, strategy: Strategy, reward: Reward, evaluations: int, batch: int
) -> tuple[Trial, ...]:
    with one_blas_thread(), one_torch_thread():
        return run_search(
            space=column.space, strategy=strategy, evaluator=Look(column), reward=reward,
            executor=serial.Serial(), log=InMemory(), trials=evaluations, batch_size=batch,
            budget=Budget(1), seed=0,
        ).trials  # fmt: skip


def deb(target: float) -> Reward:
    """Feasible first, for strategies that compare rewards."""
    score = goals.feasible_first({"latency_s": target}).score
    return PointwiseReward(
        lambda m: float(score(np.array([m.accuracy, m.cost.latency_s]))), needs=("accuracy", "latency_s")
    )


TARGET_METHODS: dict[str, tuple[Callable[..., Strategy], Callable[[float], Reward], int]] = {
    "composite": (composite.Composite, lambda target: goals.adaptive(target=target), BATCH),
    "evolution": (EVOLUTION, deb, 1),
    "reinforce": (reinforce.Reinforce, lambda target: goals.adaptive(target=target), BATCH),
    "ppo": (ppo.PPO, lambda target: goals.adaptive(target=target), BATCH),
}
FRONT_METHODS: dict[str, tuple[Callable[..., Strategy], Callable[[], Reward], int]] = {
    "composite": (composite.Composite, goals.hypervolume_gain, BATCH),
    "nsga2": (nsga2.Nsga2, goals.hypervolume_gain, BATCH),
}


SHARED = (loop, moves, novelty, cell_201, serial, Column, Look, columns, trials_of)
CODE: dict[str, tuple[ModuleType | Callable[..., object], ...]] = {
    "composite": (composite, surrogates.most_likely, surrogates.hamming_kernel, *SHARED),
    "evolution": (evolution, *SHARED),
    "nsga2": (nsga2, *SHARED),
    "reinforce": (reinforce, policies, *SHARED),
    "ppo": (ppo, policies, *SHARED),
}
TARGET_CODE = (goals.feasible_first, goals.Adaptive, goals.excess, deb)
FRONT_CODE = (goals.MultiObjective, goals.Archive, goals.scale, goals._added_area, pareto)


def meet(
    column: Column, method: str, percentile: float, evaluations: int, seeds: Sequence[int]
) -> np.ndarray:
    """Score in percent and latency / target of each seed's pick: float [seeds, 2]; NaN if there is none."""
    make, reward, batch = TARGET_METHODS[method]
    target, rows = column.target(percentile), []
    for seed in seeds:
        trials = trials_of(column, make(column.space, seed=seed), reward(target), evaluations, batch)
        fitting = [t for t in trials if (t.measurement.cost.latency_s or np.inf) <= target]
        if not fitting:
            rows.append((np.nan, np.nan))
            continue
        pick = max(fitting, key=lambda trial: trial.measurement.accuracy or 0.0)
        row = column.row_of[pick.architecture.choices]
        rows.append((column.score[row], column.latency_ms[row] / 1e3 / target))
    return np.array(rows)


def front(column: Column, method: str, evaluations: int, seeds: Sequence[int]) -> np.ndarray:
    """Hypervolume of what each seed found, 0 to 1: float [seeds]."""
    make, reward, batch = FRONT_METHODS[method]
    volumes = []
    for seed in seeds:
        trials = trials_of(column, make(column.space, seed=seed), reward(), evaluations, batch)
        volumes.append(volume(column, [trial.architecture for trial in trials]))
    return np.array(volumes)


def volume(column: Column, found: list[Architecture]) -> float:
    rows = [column.row_of[architecture.choices] for architecture in found]
    table = np.stack([column.reward, -column.latency_ms], axis=1)
    low, high = table.min(axis=0), table.max(axis=0)
    return hypervolume((table[rows] - low) / (high - low), (0.0, 0.0))


def target_rows(column: Column, percentile: float, seeds: int, others: bool) -> list[Row]:
    found = {}
    for method in TARGET_METHODS if others else ("composite", "evolution"):
        count = seeds if method in ("composite", "evolution") else min(seeds, FEW_SEEDS)
        found[method] = target_cell(column, method, percentile, count)
    for method, values in found.items():
        score, distance = values[:, 0], values[:, 1]
        print(
            f"{column.name:14} {percentile:2} {method:10} {np.nanmean(score):.3f}  met "
            f"{np.isfinite(score).mean():.0%}  latency / target {np.nanmean(distance):.3f}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    ours, theirs = found["composite"], found["evolution"]
    where = f"{column.name}, {percentile}th percentile"
    mean, half = interval(np.nan_to_num(ours[:, 0]) - np.nan_to_num(theirs[:, 0]))
    return [
        Row(f"{where}: target met", 100 * float(np.isfinite(ours[:, 0]).mean()), must=95, unit="%",
            detail=f"latency / target {np.nanmean(ours[:, 1]):.3f}"),
        Row(f"{where}: accuracy - evolution", mean, must=-0.1, unit="points",
            detail=f"[{mean - half:+.3f}, {mean + half:+.3f}]; {np.nanmean(ours[:, 0]):.3f}, "
            + ", ".join(f"{m} {np.nanmean(v[:, 0]):.3f}" for m, v in found.items() if m != "composite")),
    ]  # fmt: skip


def target_cell(column: Column, method: str, percentile: float, seeds: int) -> np.ndarray:
    compute = functools.partial(meet, column, method, percentile, EVALUATIONS)
    name = f"{column.name} {percentile} {TARGET_METHODS[method][::2]}, {EVALUATIONS}"
    return in_pieces(name, (*CODE[method], *TARGET_CODE, meet), compute, seeds)


def front_cell(column: Column, method: str, seeds: int) -> np.ndarray:
    compute = functools.partial(front, column, method, FRONT_EVALUATIONS)
    name = f"{column.name} {FRONT_METHODS[method][::2]}, {FRONT_EVALUATIONS}"
    return in_pieces(name, (*CODE[method], *FRONT_CODE, front, volume), compute, seeds)


def in_pieces(
    name: str,
    code: tuple[ModuleType | Callable[..., object], ...],
    compute: Callable[[Sequence[int]], np.ndarray],
    seeds: int,
) -> np.ndarray:
    """``compute`` for all seeds, ten to a cell."""
    pieces = [range(start, min(start + 10, seeds)) for start in range(0, seeds, 10)]
    return np.concatenate([cell(f"{name}, seeds {p}", code, functools.partial(compute, p)) for p in pieces])


def front_row(column: Column, seeds: int) -> Row:
    ours, theirs = (front_cell(column, method, seeds) for method in FRONT_METHODS)
    mean, half = interval(ours - theirs)
    return Row(
        f"{column.name}: hypervolume - NSGA-II", mean, must=0.0, unit="",
        detail=f"[{mean - half:+.5f}, {mean + half:+.5f}]; {ours.mean():.5f}, NSGA-II {theirs.mean():.5f}",
    )  # fmt: skip


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def clear(rows: list[Row]) -> int:
    """How many differences have an interval above zero."""
    return sum(float(row.detail[1:].split(",")[0]) > 0 for row in rows)


def every_column(quick: bool) -> list[Column]:
    folder = os.environ.get("RLNAS_DATA_DIR")
    if folder is None:
        sys.exit("set RLNAS_DATA_DIR to the folder that holds nasbench201.npz")
    every = columns(Path(folder), "e200_cifar100_test_acc_one_seed", "e200_cifar100_test_acc")
    return every[:1] if quick else every


def targets(quick: bool) -> list[Row]:
    """Two rows a cell, and in how many cells accuracy is above evolution's."""
    pairs = [
        target_rows(column, percentile, 2 if quick else SEEDS, others=not quick)
        for column in every_column(quick)
        for percentile in PERCENTILES
    ]
    above = clear([difference for _, difference in pairs])
    rows = [row for pair in pairs for row in pair]
    rows.append(Row("accuracy above evolution, clear of zero", above, must=6, unit="of 16"))
    return unbound(rows) if quick else rows


def fronts(quick: bool) -> list[Row]:
    """A row a column, and in how many the hypervolume is above NSGA-II's."""
    rows = [front_row(column, 2 if quick else SEEDS) for column in every_column(quick)]
    above = sum(row.measured > 0 for row in rows)
    rows.append(Row("hypervolume above NSGA-II", above, must=4, unit="of 8"))
    return unbound(rows) if quick else rows


def unbound(rows: list[Row]) -> list[Row]:
    """Two seeds decide nothing."""
    return [Row(row.name, row.measured, unit=row.unit, detail=row.detail) for row in rows]


if __name__ == "__main__":
    main(__doc__, {"fronts": fronts, "targets": targets}, processes=1)
