"""A space, a task, an evaluator and a reward of one's own, in one file.

From Python: ``python examples/own_parts.py``.  From the command line, in this folder, with a file such as

    space = "own_parts:TwoLayers"
    task = "own_parts:bits"
    evaluator = "own_parts:LeastSquares"
    reward = "own_parts:small_is_good"

and ``rlnas search --config own.toml --trials 9``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import rlnas_fast as rf
from rlnas_fast.search import Architecture, Decision, Measurement, Request, TaskSpec, Trial


@dataclass(frozen=True)
class TwoLayers:
    """How many random features, and which nonlinearity: nine networks."""

    task_spec: TaskSpec
    name: str = "two-layers"
    decisions: tuple[Decision, ...] = (
        Decision("width", ("4", "16", "64")),
        Decision("activation", ("relu", "tanh", "cos")),
    )

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        return np.ones(len(self.decisions[len(prefix)].choices), dtype=bool)

    def is_complete(self, prefix: tuple[int, ...]) -> bool:
        return len(prefix) == len(self.decisions)

    def canonical_key(self, architecture: Architecture) -> str:
        return self.describe(architecture)

    def describe(self, architecture: Architecture) -> str:
        pairs = zip(self.decisions, architecture.choices, strict=True)
        return " ".join(decision.choices[choice] for decision, choice in pairs)


@dataclass(frozen=True)
class Bits:
    """Are three to five of these eight bits set?"""

    spec: TaskSpec
    x: np.ndarray
    y: np.ndarray


def bits() -> Bits:
    """All 256 bytes, and for each whether its count of ones is in the middle."""
    x = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return Bits(TaskSpec((8,), 2), x - 0.5, (abs(x.sum(axis=1) - 4) <= 1).astype(int))


@dataclass(frozen=True)
class LeastSquares:
    """Random features and least squares: trains in a millisecond."""

    space: TwoLayers
    task: Bits

    def identity(self) -> Mapping[str, str]:
        return {"evaluator": "least squares 1", "space": self.space.name}

    def evaluate(self, request: Request) -> Measurement:
        width, activation = self.space.describe(request.architecture).split()
        rng = np.random.default_rng(request.seed)
        features = self.task.x @ rng.normal(scale=2, size=(8, int(width)))
        hidden = {"relu": lambda v: np.maximum(v, 0), "tanh": np.tanh, "cos": np.cos}[activation](features)
        train = rng.permutation(256) < 192
        weights = np.linalg.lstsq(hidden[train], self.task.y[train] - 0.5, rcond=None)[0]
        right = (hidden[~train] @ weights > 0) == (self.task.y[~train] == 1)
        return Measurement(accuracy=float(right.mean()), parameters=int(width))


@dataclass(frozen=True)
class SmallIsGood:
    """Accuracy, less a little for every parameter."""

    floor: float = 0.0
    needs: tuple[str, ...] = ("accuracy", "parameters")

    def __call__(self, batch: Sequence[Measurement], before: Sequence[Trial]) -> list[float]:
        return [(m.accuracy or 0.0) - 1e-3 * (m.parameters or 0) for m in batch]


small_is_good = SmallIsGood()

if __name__ == "__main__":
    result = rf.run(
        space=TwoLayers,
        task=bits(),
        evaluator=LeastSquares,
        reward=small_is_good,
        strategy="random",
        trials=9,
    )
    best = result.best
    print(best and (best.architecture, best.measurement.accuracy), "in", result.folder)
