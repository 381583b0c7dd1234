"""CNN construction as a Markov decision process: validity, speed, Q-learning's table, and the study in short.

    python benchmarks/bench_metaqnn.py --check                    # 55 minutes on 2 cores
    python benchmarks/bench_metaqnn.py --check --max-minutes 8    # a slice: repeat until it ends with a table

Children that were trained, and every search, are kept in ``--state`` (default: this user's cache), so a
stopped benchmark goes on where it was.  The studies are ``rlnas experiment metaqnn --schedule reduced``;
their settings were chosen on validation accuracies.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from harness import Row, main

import rlnas_fast.envs  # noqa: F401 - registers
from rlnas_fast.envs.construction import ChainCNNEnv
from rlnas_fast.experiments.metaqnn import SliceOver, run_study, study
from rlnas_fast.search import Architecture, Measurement, SearchContext, TaskSpec, Trial
from rlnas_fast.spaces.chain_cnn import ChainCNN
from rlnas_fast.strategies.novelty import enumerate_space
from rlnas_fast.strategies.q_learning import QLearning

IMAGES = TaskSpec((1, 28, 28), 3)


def steps(quick: bool) -> list[Row]:
    """Random valid play with an evaluator that does nothing."""
    env: Any = gymnasium.make("rlnas_fast/ChainCNN-v0", evaluate=lambda architecture: 0.0).unwrapped
    rng = np.random.default_rng(0)
    count = 20_000 if quick else 100_000
    env.reset()
    started = time.process_time()
    for _ in range(count):
        valid = np.flatnonzero(env.action_masks())
        if env.step(valid[int(rng.random() * len(valid))])[2]:
            env.reset()
    return [
        Row(
            "environment steps a second, random play",
            count / (time.process_time() - started),
            30_000,
            unit="/s",
        )
    ]


def others(quick: bool) -> list[Row]:
    """Everything else, slice by slice."""
    studies = [] if quick else [*mnist3(), *cifar5()]  # first: a slice may end in them
    return [trajectories(500 if quick else 10_000), *q_learning_table(), *studies]


def trajectories(count: int) -> Row:
    """How many of ``count`` random masked trajectories build a network that runs."""
    torch.set_num_threads(1)
    space = ChainCNN(IMAGES)
    env = ChainCNNEnv(space, lambda architecture: (0.0, {}))
    rng = np.random.default_rng(1)
    images = torch.randn(1, *IMAGES.input_shape)
    good = 0
    for _ in range(count):
        env.reset()
        ended = False
        while not ended:
            valid = np.flatnonzero(env.action_masks())
            _, _, ended, _, info = env.step(rng.choice(valid))
        network = space.build(Architecture(space.name, info["choices"]), IMAGES).eval()
        with torch.no_grad():
            answer = network(images)
        good += answer.shape == (1, IMAGES.outputs) and bool(torch.isfinite(answer).all())
    return Row("random masked trajectories that build and run", good, count, unit="networks")


def q_learning_table() -> list[Row]:
    """Q-learning against value iteration where a layer is all that the future depends on."""
    space = ChainCNN(TaskSpec((1, 4, 4), 3), max_depth=2)

    def reward(choices: tuple[int, ...]) -> float:
        return int.from_bytes(hashlib.sha256(repr(choices).encode()).digest()[:4], "big") / 2**32

    strategy = QLearning(
        space, seed=0, allow_repeats=True, learning_rate=0.1, replays=30, trace=0.0, scale="none", epsilon=1.0
    )
    for _ in range(3000):
        (asked,) = strategy.ask(1, SearchContext())
        key = space.canonical_key(asked)
        strategy.tell([Trial(0, 0, asked, key, Measurement(), reward(asked.choices))])

    def iterate(prefix: tuple[int, ...]) -> dict[int, float]:
        """The value of each valid choice after ``prefix``."""
        values = {}
        for choice in np.flatnonzero(space.mask(prefix)).tolist():
            after = (*prefix, choice)
            values[choice] = reward(after) if space.is_complete(after) else max(iterate(after).values())
        return values

    starts = iterate(())
    prefixes = [(), *((choice,) for choice in starts if not space.is_complete((choice,)))]
    worst = max(
        float(abs(strategy.values(prefix)[choice] - value))
        for prefix in prefixes
        for choice, value in iterate(prefix).items()
    )
    greedy: tuple[int, ...] = ()
    while not space.is_complete(greedy):
        mask = space.mask(greedy)
        greedy += (int(np.argmax(np.where(mask, strategy.values(greedy)[: len(mask)], -np.inf))),)
    best = max(reward(architecture.choices) for architecture in enumerate_space(space))
    count = sum(1 for _ in enumerate_space(space))
    return [
        Row(f"Q-learning finds the best of {count} chains", float(reward(greedy) == best), 1, unit="holds"),
        Row("Q-learning's table / value iteration, largest gap", worst, 1e-3, unit="", at_most=True),
    ]


def mnist3() -> list[Row]:
    """The reduced schedule on three digits, plain and penalised."""
    plain = {name: _studied("mnist3", name, penalty=False) for name in ("q-learning", "ppo")}
    penalised = _studied("mnist3", "q-learning", penalty=True)["generated"]
    rows = []
    for name, summary in plain.items():
        found = summary["generated"]
        rows += [
            Row(
                f"mnist3, {name}: test accuracy of 50 generated", 100 * found["test_accuracy"], 99.55,
                unit="%", detail=_detail(summary),
            ),
            Row(f"mnist3, {name}: distinct networks of 50", found["distinct"], 5, unit="networks"),
        ]  # fmt: skip
    reference = plain["q-learning"]["generated"]
    lost = 100 * (reference["test_accuracy"] - penalised["test_accuracy"])
    fall = reference["parameters"] / penalised["parameters"]
    return [
        *rows,
        Row(
            "mnist3, q-learning: parameters / with the penalty",
            fall,
            10,
            detail=f"{penalised['parameters']:.0f}",
        ),
        Row("mnist3, q-learning: accuracy lost to the penalty", lost, 0.3, unit="points", at_most=True),
    ]


def cifar5() -> list[Row]:
    """Five classes of cifar10-jpeg, 5,000 images, 2 epochs, 60 episodes, against 60 random networks."""
    # Two at a time, workers waited for each other a third of the time.
    summary = _studied("cifar5", "q-learning", penalty=False, batch_size=4, task="cifar10-jpeg")
    gain = {name: 100 * value for name, value in summary["gain"].items()}
    interval = f"95 % interval {gain['low']:.2f} to {gain['high']:.2f}; {_detail(summary)}"
    return [
        Row("cifar5, q-learning: gain over random networks", gain["mean"], unit="points", detail=interval),
        Row("the same, lower end of the 95 % interval", gain["low"], 1e-9, unit="points"),
    ]


def _studied(
    data: str, strategy: str, *, penalty: bool, batch_size: int = 2, **changes: Any
) -> dict[str, Any]:
    settings = study(
        data,
        strategy=strategy,
        penalty=penalty,
        schedule="reduced",
        changes=changes,
        batch_size=batch_size,
        workers=WORKERS,
        device="cpu",
    )
    folder = STATE / "-".join([data, strategy, *(["penalty"] if penalty else [])])
    left = (DEADLINE - time.monotonic()) / 60
    return run_study(settings, folder, cache=STATE / "measurements.sqlite", max_minutes=max(left, 0.0))


def _detail(summary: dict[str, Any]) -> str:
    found = summary["generated"]
    return (
        f"± {100 * found['deviation']:.2f}, depth {found['depth']:.2f}, "
        f"{found['parameters']:.0f} parameters, {found['distinct']} distinct"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    default = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlnas_fast" / "bench_metaqnn"
    )
    parser.add_argument("--state", type=Path, default=default)
    parser.add_argument("--workers", type=int, default=2)
    options, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    STATE, WORKERS = options.state, options.workers
    STATE.mkdir(parents=True, exist_ok=True)
    DEADLINE = time.monotonic() + 60 * options.max_minutes
    try:
        main(__doc__, steps, processes=3, once=others)
    except SliceOver as over:
        print(over)
        sys.exit(3)
