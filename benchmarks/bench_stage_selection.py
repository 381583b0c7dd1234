"""Does it pay to choose the stage of a non-local block by what flows?  Learned selection against its peers.

    python benchmarks/bench_stage_selection.py --check                   # both parts
    python benchmarks/bench_stage_selection.py --check --part supernet

``supernet``: five networks of three stages are trained on clean images of cifar10-jpeg, then blocks for them
on five regimes (stage_regimes.py); agents learn which block suits a batch from a table of validation images
and are judged on one of test images.  ``online``: the whole training procedure, as ``place`` has it,
on digits and Fashion-MNIST against always the same stage, several trainings of each seed.

Needs ``RLNAS_DATA_DIR``.  Tables, choices and figures of runs are kept in ``RLNAS_CELLS_DIR``
(build/bench_stage_selection where it is not set): a run that was ended goes on where it was.  ``--quick`` has
one seed, hardly trained, and digits alone, and decides nothing.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import stage_regimes
import stage_study
import torch
from cells import cell
from harness import Row, main

import rlnas_fast.placement.agent_parts
import rlnas_fast.placement.batches
import rlnas_fast.placement.inserter
import rlnas_fast.placement.policy_agents
import rlnas_fast.placement.probe
import rlnas_fast.placement.procedure
import rlnas_fast.placement.rewards
import rlnas_fast.placement.stages
import rlnas_fast.placement.supernet
import rlnas_fast.placement.value_agents
from rlnas_fast.components import Component, make
from rlnas_fast.networks import StageCNN
from rlnas_fast.nn import NonLocalBlock
from rlnas_fast.placement.supernet import OutcomeTable
from rlnas_fast.placement_runs import place
from rlnas_fast.report.curves import interval
from rlnas_fast.search import Budget
from rlnas_fast.tasks.task import Split, Task, stratified

SEEDS = range(5)
AGENTS = ("q-table", "dqn", "reinforce", "ppo")
CHOSEN = "dqn"  # by validation tables alone; the figures with a bound are this agent's
LEAST_HEADROOM = 0.3  # points
ONLINE_AGENT = "q-table"
# Trainings of each seed.  Two of the same network and data differ by chance, on 431 digits by 0.7 points and
# on Fashion-MNIST by 0.4 (deviations of differences, development seeds): the mean of five would be known to
# no better than 0.3 and 0.2 points, which is what the bounds are about.
TRAININGS = {"digits": 16, "fashion-mnist": 3}
ONLINE: dict[str, dict[str, object]] = {
    "digits": {"validation_fraction": 0.4},
    "fashion-mnist": {"validation_fraction": 0.8, "train_size": 3000},
}
JUDGES = {"digits": 144, "fashion-mnist": 1024}  # validation images that reward decisions; the rest is judged
ONLINE_SETTINGS: dict[str, object] = {
    "epochs": 12,
    "recipe": {"batch_size": 64},
    "block": {"subsample": 2},
}
TABLES_CODE = [
    stage_regimes,
    stage_study.small_cnn,
    stage_study.every_regime,
    stage_study.samples,
    stage_study.trained_supernet,
    stage_study.tables_of,
    rlnas_fast.placement.supernet.StageSupernet,
    rlnas_fast.placement.supernet.train_supernet,
    rlnas_fast.placement.supernet.outcome_table,
    rlnas_fast.placement.probe.layer_statistics,
]
AGENTS_CODE = [
    rlnas_fast.placement.agent_parts,
    rlnas_fast.placement.policy_agents,
    rlnas_fast.placement.value_agents,
]
CHOICES_CODE = [
    *AGENTS_CODE,
    rlnas_fast.placement.supernet.learn,
    stage_study.choices_of,
    stage_study.made,
    stage_study.LinUCB,
]
ONLINE_CODE = [
    *AGENTS_CODE,
    rlnas_fast.placement.batches,
    rlnas_fast.placement.inserter,
    rlnas_fast.placement.probe,
    rlnas_fast.placement.procedure,
    rlnas_fast.placement.rewards,
    rlnas_fast.placement.stages,
    StageCNN,
    NonLocalBlock,
]


@dataclasses.dataclass(frozen=True)
class Judged:
    """What came of one seed, in percent of test images that are right, mean over the regimes.

    Attributes:
        table: of the test images.
        accuracy: of each way to choose, by its name.
        choices: the chosen agent's, int64 [n].
    """

    table: OutcomeTable
    accuracy: dict[str, float]
    choices: torch.Tensor


def supernet(quick: bool) -> list[Row]:
    """Rows of the study on CIFAR-10."""
    seeds = [0] if quick else list(SEEDS)
    with ProcessPoolExecutor(_jobs(), mp_context=get_context("spawn")) as pool:
        judged = list(pool.map(judge, seeds, [quick] * len(seeds)))
    rows = rows_of(judged)
    return [dataclasses.replace(row, must=None) for row in rows] if quick else rows


def judge(seed: int, quick: bool = False) -> Judged:
    """Trains, tabulates, learns and judges; each from its cell where that was done before."""
    torch.set_num_threads(1)
    if quick:  # in a process of its own
        stage_study.PRETRAIN = stage_study.PRETRAIN[0], Budget(3)
        stage_study.BLOCKS = stage_study.BLOCKS[0], Budget(1)
    packed = tables(seed)
    validation, test = stage_study.unpacked(packed)

    def chosen(name: str, *, shuffled: bool = False) -> torch.Tensor:
        def compute() -> np.ndarray:
            return stage_study.choices_of(name, validation, test, seed, shuffled=shuffled).numpy()

        settings = f"{stage_study.OPTIONS.get(name)} {stage_study.DECISIONS} {stage_study.DELAY}"
        key = f"choices {name} {'shuffled ' if shuffled else ''}{seed} {settings} {packed.sum():.6f}"
        return torch.from_numpy(cell(key, CHOICES_CODE, compute))

    def accuracy(actions: torch.Tensor) -> float:
        return 100 * float(test.of(actions).mean())

    choices = {name: chosen(name) for name in (*AGENTS, "linear")}
    fixed = test.outcomes.mean(dim=0) * 100
    found = {name: accuracy(actions) for name, actions in choices.items()}
    found |= {f"fixed {action}": float(value) for action, value in enumerate(fixed)}
    found["random"] = float(fixed.mean())  # what a uniform choice gets on average
    found["best fixed"] = float(fixed.max())
    found["oracle"] = accuracy(test.best_by_group())
    found["shuffled"] = accuracy(chosen(CHOSEN, shuffled=True))
    found["best of each batch"] = 100 * float(test.outcomes.max(dim=1).values.mean())
    return Judged(test, found, choices[CHOSEN])


def tables(seed: int) -> np.ndarray:
    """What ``stage_study.tables_of`` gives, kept."""
    settings = f"{stage_study.PRETRAIN} {stage_study.BLOCKS} {stage_study.LAYERS} {stage_study.BATCH}"
    return cell(f"tables {seed} {settings}", TABLES_CODE, lambda: stage_study.tables_of(seed))


def rows_of(judged: list[Judged]) -> list[Row]:
    def of(name: str) -> np.ndarray:
        return np.array([each.accuracy[name] for each in judged])

    best, learned = of("best fixed"), of(CHOSEN)
    headroom = float((of("oracle") - best).mean())
    gain = float((learned - best).mean())
    nothing = (
        "no headroom, the best stage hardly depends on the regime: " if headroom < LEAST_HEADROOM else ""
    )
    per_cent = 100 / headroom if headroom > 0 else float("nan")
    lost = 100 * (1 - float((of("shuffled") - best).mean()) / gain) if gain > 0 else float("nan")
    used = min(len(set(each.choices.tolist())) for each in judged)
    rows = [
        Row(
            "oracle by regime - best fixed stage", headroom, LEAST_HEADROOM, unit="points",
            detail=nothing + _each(of("oracle") - best),
        ),
        Row(
            f"{CHOSEN}: share of that it recovers", gain * per_cent, 80, unit="%",
            detail=_each(learned - best),
        ),
        *(_over(f"{CHOSEN} - {peer}", learned - of(peer)) for peer in ("best fixed", "random", "linear")),
        Row(f"{CHOSEN}: stages it uses, fewest of a seed", used, 2, unit="stages", detail=_uses(judged)),
        Row(f"{CHOSEN}: gain lost when states are shuffled", lost, 50, unit="%"),
    ]  # fmt: skip
    for name in (*AGENTS, "linear"):
        found = of(name)
        share = float((found - best).mean()) * per_cent
        rows.append(
            Row(
                f"{name}: accuracy",
                float(found.mean()),
                unit="%",
                detail=f"recovers {share:.0f} %, {_each(found)}",
            )
        )
    for name in ("oracle", "best fixed", "random", "shuffled", "best of each batch", *_fixed(judged)):
        rows.append(
            Row(f"{_title(name)}: accuracy", float(of(name).mean()), unit="%", detail=_each(of(name)))
        )
    for group, regime in enumerate(stage_regimes.REGIMES):
        rows.append(regime_row(regime, group, judged))
    return rows


def online(quick: bool) -> list[Row]:
    """Rows of the training procedure, which chooses while it trains, against always the same stage."""
    seeds = [0] if quick else list(SEEDS)
    agents = [ONLINE_AGENT, *(f"fixed:{name}" for name in ("none", *stage_study.STAGES))]
    names = ["digits"] if quick else list(ONLINE)
    repeats = {data: range(1 if quick else TRAININGS[data]) for data in names}
    runs = [
        (data, agent, seed + 1000 * repeat)
        for data in names for repeat in repeats[data] for seed in seeds for agent in agents
    ]  # fmt: skip
    with ProcessPoolExecutor(_jobs(), mp_context=get_context("spawn")) as pool:
        figures = dict(zip(runs, pool.map(placed, runs), strict=True))
    rows = []
    for data in names:
        found = {
            agent: np.array(
                [[figures[data, agent, seed + 1000 * repeat] for repeat in repeats[data]] for seed in seeds]
            )
            for agent in agents
        }
        rows += online_rows(data, found)
    return [dataclasses.replace(row, must=None) for row in rows] if quick else rows


def placed(run: tuple[str, str, int]) -> np.ndarray:
    """Of the network that a run ends with: accuracy in percent, whether the policy collapsed, the action."""
    data, agent, seed = run
    torch.set_num_threads(1)
    # What is always the same need not be decided and rewarded for each batch; the training is, bit for bit.
    settings = ONLINE_SETTINGS | ({} if agent == ONLINE_AGENT else {"decide": "epoch"})

    def compute() -> np.ndarray:
        torch.manual_seed(seed)
        network = StageCNN(1, 10, width=8)
        if data != "digits":  # of 8 x 8; others are halved first, which saves time
            network.stage1[0][0].stride = (2, 2)
        with tempfile.TemporaryDirectory() as folder:  # kept ones would outlive a change of the code
            result = place(
                network, task_of(data), agent=agent, seed=seed, device="cpu", out=Path(folder) / "run",
                stages=stage_study.STAGES, **settings,
            )  # fmt: skip
        stage = ("none", *stage_study.STAGES).index(result.stage)
        return np.array([100 * result.test_accuracy, float(result.collapsed), stage])

    key = f"online {data} {agent} {seed} {ONLINE[data]} {JUDGES[data]} {settings}"
    return cell(key, [*ONLINE_CODE, placed, task_of], compute)


@lru_cache
def task_of(data: str) -> Task:
    """The data of the online part, without their test images.

    In the place of these, where a run looks once, at its end, stand the validation images that judge no
    decision: those that do would flatter what was chosen by them.
    """
    task = make("task", Component(name=data, options=ONLINE[data]))
    x, y = task.validation.x, task.validation.y
    judges = stratified(y, JUDGES[data], np.random.default_rng(0))
    rest = np.setdiff1d(np.arange(len(y)), judges)
    return dataclasses.replace(task, validation=Split(x[judges], y[judges]), _test=Split(x[rest], y[rest]))


def online_rows(data: str, found: dict[str, np.ndarray]) -> list[Row]:
    """``found``: by agent, float [seeds, trainings, 3], of what ``placed`` gives."""
    accuracy = {agent: each[..., 0] for agent, each in found.items()}
    learned, none = accuracy[ONLINE_AGENT], accuracy["fixed:none"]
    stages = {name: accuracy[f"fixed:{name}"] for name in stage_study.STAGES}
    best = max(stages, key=lambda name: float(stages[name].mean()))
    means = ", ".join(f"{agent} {each.mean():.2f}" for agent, each in accuracy.items())
    ends = Counter(found[ONLINE_AGENT][..., 2].astype(int).ravel().tolist())
    names = ("none", *stage_study.STAGES)
    return [
        _below(f"{data}: {ONLINE_AGENT} - best fixed ({best})", learned - stages[best], -0.5, means),
        _below(f"{data}: {ONLINE_AGENT} - no block", learned - none, -0.2),
        Row(
            f"{data}: trainings whose policy collapsed to one stage",
            float(found[ONLINE_AGENT][..., 1].sum()), unit=f"of {learned.size}",
            detail="ended with " + ", ".join(f"{name} {ends[action]}" for action, name in enumerate(names)),
        ),
    ]  # fmt: skip


def _below(name: str, differences: np.ndarray, must: float, more: str = "") -> Row:
    """Differences in points, [seeds, trainings]: their mean, its interval, each seed, each first training."""
    mean, half = interval(differences.ravel())
    told = [
        f"95 % interval {mean - half:+.2f} to {mean + half:+.2f} of {differences.size} trainings",
        _each(differences.mean(axis=1)),
        f"the first training of each {differences[:, 0].mean():+.2f}: {_each(differences[:, 0])}",
        *([more] if more else []),
    ]
    return Row(name, mean, must, unit="points", detail="; ".join(told))


def regime_row(regime: str, group: int, judged: list[Judged]) -> Row:
    """What each stage gives in a regime, and what was chosen there."""
    outcomes = torch.stack([each.table.outcomes[each.table.groups == group].mean(dim=0) for each in judged])
    chosen = torch.cat([each.choices[each.table.groups == group] for each in judged])
    share = chosen.bincount(minlength=outcomes.shape[1]) / len(chosen)
    names = ("none", *stage_study.STAGES)
    detail = ", ".join(
        f"{name} {100 * value:.2f} (chosen {100 * part:.0f} %)"
        for name, value, part in zip(names, outcomes.mean(dim=0).tolist(), share.tolist(), strict=True)
    )
    oracle = outcomes.max(dim=1).values.mean()
    return Row(f"{regime}: best stage, mean of the seeds", 100 * float(oracle), unit="%", detail=detail)


def _over(name: str, difference: np.ndarray) -> Row:
    """A difference that has to be above 0, paired by seed."""
    mean, half = interval(difference) if len(difference) > 1 else (float(difference[0]), float("nan"))
    detail = f"95 % interval {mean - half:+.2f} to {mean + half:+.2f}; {_each(difference)}"
    return Row(name, mean, 1e-9, unit="points", detail=detail)


def _each(values: np.ndarray) -> str:
    return "seeds " + " ".join(f"{value:.2f}" for value in values)


def _uses(judged: list[Judged]) -> str:
    names = ("none", *stage_study.STAGES)
    counts = Counter(names[action] for each in judged for action in each.choices.tolist())
    return ", ".join(f"{name} {counts[name]}" for name in names)


def _fixed(judged: list[Judged]) -> list[str]:
    return [name for name in judged[0].accuracy if name.startswith("fixed ")]


def _title(name: str) -> str:
    kind, _, action = name.partition(" ")
    return f"always {('none', *stage_study.STAGES)[int(action)]}" if kind == "fixed" else name


def _jobs() -> int:
    return int(os.environ.get("STUDY_PROCESSES") or min(2, os.cpu_count() or 1))


if __name__ == "__main__":
    os.environ.setdefault(
        "RLNAS_CELLS_DIR", str(Path(__file__).parent.parent / "build/bench_stage_selection")
    )
    if "RLNAS_DATA_DIR" not in os.environ:
        sys.exit("set RLNAS_DATA_DIR to the folder that holds cifar10_jpeg_train.npz")
    parts: dict[str, Callable[[bool], list[Row]]] = {"supernet": supernet, "online": online}
    main(__doc__, parts, processes=1)
