"""Strategies on published tables: what is found after how many distinct evaluations, against the baselines.

The reward is what a searcher would see, the score the test accuracy (mean over seeds) of the architecture
with the best reward so far.  One trial is asked and told at a time.  Differences are paired by seed, with
intervals of 95 %.  Needs ``RLNAS_DATA_DIR`` with nasbench201.npz and nasbench_macro_cifar10.npz.  About a
quarter of an hour; ``--quick`` has too few seeds to decide anything but the baselines and the cost.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from harness import Row, main

from rlnas_fast.evaluators.tabular import Tabular
from rlnas_fast.rl.threads import one_blas_thread, one_torch_thread
from rlnas_fast.search import (
    Budget,
    Measurement,
    Request,
    SearchContext,
    SearchSpace,
    Strategy,
    TaskSpec,
    Trial,
)
from rlnas_fast.spaces.cell_201 import Cell201
from rlnas_fast.spaces.nasbench_macro import NasBenchMacro
from rlnas_fast.strategies.evolution import Evolution
from rlnas_fast.strategies.local_search import LocalSearch
from rlnas_fast.strategies.model_based import ModelBased
from rlnas_fast.strategies.novelty import enumerate_space
from rlnas_fast.strategies.ppo import PPO
from rlnas_fast.strategies.random import RandomSearch
from rlnas_fast.strategies.reinforce import Reinforce

IMAGES = TaskSpec((3, 32, 32), 10)
AT = (50, 100, 150, 300)
NOISE_POINTS = 0.3

# The figures of record for simple, correct implementations, at AT; 200 seeds.
RECORD = {
    ("cifar10", "random"): (93.63, 93.77, 93.85, 93.97),
    ("cifar10", "evolution"): (93.84, 94.07, 94.18, 94.31),
    ("cifar10", "local-search"): (94.10, 94.27, 94.34, 94.37),
    ("cifar100", "random"): (71.06, 71.50, 71.75, 72.20),
    ("cifar100", "evolution"): (71.64, 72.46, 72.78, 73.08),
    ("cifar100", "local-search"): (72.32, 73.02, 73.21, 73.42),
}
STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "random": RandomSearch,
    "evolution": Evolution,
    "local-search": LocalSearch,
    "model-based": ModelBased,
    "reinforce": Reinforce,
    "ppo": PPO,
}
ABLATION: dict[str, Callable[..., Strategy]] = {
    "no climbs elsewhere": functools.partial(ModelBased, patience=0),
    "uniform proposals": functools.partial(ModelBased, policy_temperature=0.0),
    "no proposals": functools.partial(ModelBased, proposals=0),
    "one incumbent": functools.partial(ModelBased, incumbents=1),
}


@dataclass(frozen=True)
class Table:
    """A space with the reward and the score, in percent, of each architecture by its choices."""

    name: str
    space: SearchSpace
    reward: dict[tuple[int, ...], float]
    score: dict[tuple[int, ...], float]


def load(name: str, space: SearchSpace, file: Path, reward_column: str, score_column: str) -> Table:
    evaluator = Tabular(space, data=str(file), reward_column=reward_column, score_column=score_column)
    reward, score = {}, {}
    for architecture in enumerate_space(space):
        measurement = evaluator.evaluate(Request(architecture, Budget(epochs=1), 0))
        reward[architecture.choices] = 100 * (measurement.value("accuracy") or 0.0)
        score[architecture.choices] = 100 * (measurement.value("score") or 0.0)
    return Table(name, space, reward, score)


def tables(folder: Path) -> list[Table]:
    cells, chains = Cell201(IMAGES, distinct="cells"), NasBenchMacro(IMAGES)
    file, macro = folder / "nasbench201.npz", folder / "nasbench_macro_cifar10.npz"
    return [
        load("cifar10", cells, file, "e200_cifar10valid_valid_acc", "e200_cifar10_test_acc"),
        load("cifar100", cells, file, "e200_cifar100_test_acc_one_seed", "e200_cifar100_test_acc"),
        load("macro", chains, macro, "test_acc:0", "mean_acc"),
    ]


def search(strategy: Strategy, table: Table, trials: int, noise: np.random.Generator | None) -> np.ndarray:
    """The score of the pick after each trial: float [trials]."""
    context, best, picked, scores = SearchContext(), -np.inf, 0.0, []
    for number in range(trials):
        (architecture,) = strategy.ask(1, context)
        reward = table.reward[architecture.choices]
        if noise is not None:
            reward += NOISE_POINTS * noise.standard_normal()
        if reward > best:
            best, picked = reward, table.score[architecture.choices]
        scores.append(picked)
        key = table.space.canonical_key(architecture)
        strategy.tell([Trial(number, number, architecture, key, Measurement(accuracy=reward / 100), reward)])
    return np.array(scores)


def curves(make: Callable[..., Strategy], table: Table, seeds: int, trials: int, noisy: bool) -> np.ndarray:
    """Float [seeds, trials]."""
    return np.array(
        [
            search(
                make(table.space, seed=seed),
                table,
                trials,
                np.random.default_rng([seed, 1]) if noisy else None,
            )
            for seed in range(seeds)
        ]
    )


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def in_text(scores: np.ndarray) -> str:
    parts = [interval(scores[:, at - 1]) for at in AT if at <= scores.shape[1]]
    return "  ".join(f"{mean:.3f}±{half:.3f}" for mean, half in parts)


def record_rows(table: Table, found: dict[str, np.ndarray]) -> list[Row]:
    """Whether each baseline is at its figure of record, both figures having their sampling error."""
    rows = []
    for name, scores in found.items():
        for at, figure in zip(AT, RECORD.get((table.name, name), ()), strict=False):
            if at > scores.shape[1]:
                continue
            mean, half = interval(scores[:, at - 1])
            allowed = half + 1.96 * scores[:, at - 1].std(ddof=1) / 200**0.5 + 0.005
            rows.append(
                Row(
                    f"{table.name} {name} at {at}: off the record",
                    abs(mean - figure),
                    must=allowed,
                    unit="points",
                    at_most=True,
                    detail=f"{mean:.3f}, of record {figure:.2f}",
                )
            )
    return rows


def difference_rows(
    name: str, ours: np.ndarray, theirs: np.ndarray, at: Sequence[int], must: float | None, aim: float | None
) -> list[Row]:
    """The lower ends of the paired intervals of ours minus theirs."""
    rows = []
    for trial in at:
        mean, half = interval(ours[:, trial - 1] - theirs[:, trial - 1])
        rows.append(
            Row(
                f"{name} at {trial}: low end",
                mean - half,
                must=must,
                aim=aim,
                unit="points",
                detail=f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]",
            )
        )
    return rows


def table_rows(table: Table, seeds: int, few: int, noisy: bool) -> list[Row]:
    where = f"{table.name}{' noisy' if noisy else ''}"
    found = {}
    for name, make in STRATEGIES.items():
        baseline = name in ("random", "evolution", "local-search")
        count = seeds if baseline or name == "model-based" else few
        found[name] = curves(make, table, count, 300 if baseline and not noisy else 150, noisy)
        print(f"{where:15} {name:20} {in_text(found[name])}", file=sys.stderr, flush=True)
    rows = [] if noisy else record_rows(table, found)
    ours = found["model-based"]
    for name, at, must, aim in (
        ("evolution", (50, 100, 150), 1e-9, None),
        ("local-search", (100, 150), -0.05, 0.0),
        ("local-search", (50,), None, 0.0),
        ("random", (150,), 1e-9, None),
    ):
        rows += difference_rows(f"{where} model-based - {name}", ours, found[name], at, must, aim)
    for name in ("reinforce", "ppo"):
        rows += difference_rows(
            f"{where} {name} - random",
            found[name],
            found["random"][:few],
            (150,),
            None if noisy else 1e-9,
            None,
        )
    if not noisy:
        for name, make in ABLATION.items():
            without = curves(make, table, few, 150, noisy)
            rows += difference_rows(
                f"{where} model-based - {name}", ours[:few], without, (50, 150), None, None
            )
    return rows


def cost_row(table: Table) -> Row:
    """Seconds on one core to ask and tell 150 trials, one at a time; median of five."""
    seconds = []
    for seed in range(5):
        with one_blas_thread(), one_torch_thread():
            start = time.process_time()
            search(ModelBased(table.space, seed=seed), table, 150, None)
            seconds.append(time.process_time() - start)
    median = float(np.median(seconds))
    return Row(f"{table.name} model-based, 150 trials", median, must=1.5, unit="s", at_most=True)


def measure(quick: bool) -> list[Row]:
    folder = os.environ.get("RLNAS_DATA_DIR")
    if folder is None:
        sys.exit("set RLNAS_DATA_DIR to the folder that holds the tables")
    seeds, few = (20, 10) if quick else (200, 40)
    rows: list[Row] = []
    for table in tables(Path(folder)):
        for noisy in (False,) if quick else (False, True):
            rows += table_rows(table, seeds, few, noisy)
        rows.append(cost_row(table))
    if quick:
        return [replace(row, must=None) if "low end" in row.name else row for row in rows]
    return rows


if __name__ == "__main__":
    main(__doc__, measure, processes=1)
