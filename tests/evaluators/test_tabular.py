"""Tables of networks that others have trained."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlnas_fast.errors import DataError
from rlnas_fast.evaluators.tabular import Tabular
from rlnas_fast.search import Architecture, Budget, Evaluator, Request, TaskSpec
from rlnas_fast.spaces.cell_201 import OPERATIONS, Cell201
from rlnas_fast.spaces.nasbench_macro import NasBenchMacro

SPEC = TaskSpec((3, 32, 32), 10)
SPACE = NasBenchMacro(SPEC)
CHOICES = np.array(list(itertools.product(range(3), repeat=8)), dtype=np.uint8)
BUDGET = Budget(1)


def table(folder: Path, **changes: np.ndarray | None) -> str:
    rows = np.arange(len(CHOICES))
    arrays: dict[str, Any] = {
        "choices": CHOICES,
        "valid": rows / 100,
        "test": (rows / len(rows)).astype(np.float32),
        "runs": np.stack([rows, rows + 0.5], axis=1),
        "latency_ms": np.stack([rows, 2.0 * rows], axis=1),
        "devices": np.array(["phone", "server"]),
        "partial": np.where(rows < 5, rows, np.nan),
    } | changes
    path = folder / "table.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def test_answers_with_the_row_in_fractions_and_seconds(tmp_path: Path) -> None:
    evaluator = Tabular(
        SPACE,
        data=table(tmp_path),
        reward_column="valid",
        score_column="test",
        latency_column="latency_ms:server",
    )
    assert isinstance(evaluator, Evaluator)
    row = 1234
    choices = tuple(CHOICES[row].tolist())
    measurement = evaluator.evaluate(Request(Architecture(SPACE.name, choices), BUDGET, 0))
    assert measurement.accuracy == pytest.approx(row / 1e4)
    assert measurement.extra["score"] == pytest.approx(row / 6561)
    assert measurement.cost.latency_s == pytest.approx(2 * row / 1e3)
    assert all(measurement.value(name) is not None for name in evaluator.provides())


def test_identity_is_the_content_and_the_columns(tmp_path: Path) -> None:
    first = Tabular(SPACE, data=table(tmp_path), reward_column="valid").identity()
    assert Tabular(SPACE, data=table(tmp_path), reward_column="test").identity() != first
    changed = table(tmp_path, valid=np.arange(len(CHOICES))[::-1])
    assert Tabular(SPACE, data=changed, reward_column="valid").identity() != first


@pytest.mark.parametrize(
    ("changes", "column", "message"),
    [
        ({}, "acc", "no column 'acc'; it has valid, test, runs:phone, runs:server, latency_ms:phone"),
        ({}, "partial", "'partial' is unknown in 6556 of 6561 rows; complete are valid"),
        ({"valid": np.full(len(CHOICES), 93.5)}, "valid", "'valid' is 93.5 in every row"),
        ({"choices": None}, "valid", "no array ops or choices; it holds valid"),
        ({"choices": CHOICES[:, :6]}, "valid", "not a table of space 'nasbench-macro'.*8 decisions"),
        ({"choices": CHOICES.astype(float)}, "valid", "not a table"),
        ({"choices": CHOICES + 1}, "valid", "goes up to 3"),
        ({"op_names": np.array(["a", "b", "c"])}, "valid", "its operations are a, b, c"),
    ],
)
def test_a_table_that_cannot_be_used(
    tmp_path: Path, changes: dict[str, np.ndarray | None], column: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Tabular(SPACE, data=table(tmp_path, **changes), reward_column=column)
    assert "\n" not in str(caught.value)


def test_an_architecture_without_a_row(tmp_path: Path) -> None:
    few = {"choices": CHOICES[:9], "valid": np.arange(9)}
    evaluator = Tabular(SPACE, data=table(tmp_path, **few), reward_column="valid")
    with pytest.raises(DataError, match="no row for architecture"):
        evaluator.evaluate(Request(Architecture(SPACE.name, (2,) * 8), BUDGET, 0))


FOLDER = Path(os.environ.get("RLNAS_DATA_DIR", "."))
needs_data = pytest.mark.skipif("RLNAS_DATA_DIR" not in os.environ, reason="RLNAS_DATA_DIR is not set")


@needs_data
def test_the_best_cells_are_the_published_ones() -> None:
    """Rows 6111 and 9930 of the official index hold the best validation and CIFAR-100 test accuracy."""
    three, one, skip = (OPERATIONS.index(name) for name in ("nor_conv_3x3", "nor_conv_1x1", "skip_connect"))
    evaluator = Tabular(
        Cell201(SPEC),
        data=str(FOLDER / "nasbench201.npz"),
        reward_column="e200_cifar10valid_valid_acc",
        score_column="e200_cifar100_test_acc",
    )
    best = {(three, three, three, skip, three, one): 0.91607, (three, three, three, skip, three, three): None}
    for choices, accuracy in best.items():
        measurement = evaluator.evaluate(Request(Architecture("cell-201", choices), BUDGET, 0))
        if accuracy is None:
            assert measurement.extra["score"] == pytest.approx(0.73513, abs=1e-5)
        else:
            assert measurement.accuracy == pytest.approx(accuracy, abs=1e-5)


@needs_data
def test_the_best_macro_network_is_the_published_one() -> None:
    data = str(FOLDER / "nasbench_macro_cifar10.npz")
    evaluator = Tabular(SPACE, data=data, reward_column="mean_acc", score_column="test_acc:2")
    found = [
        evaluator.evaluate(Request(Architecture(SPACE.name, tuple(choices)), BUDGET, 0)).accuracy
        for choices in CHOICES.tolist()
    ]
    assert max(value for value in found if value is not None) == pytest.approx(0.93127, abs=1e-5)
