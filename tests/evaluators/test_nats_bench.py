"""The importer, against a stand-in with the interface of the official package."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rlnas_fast.errors import ConfigError, DataError
from rlnas_fast.evaluators.nats_bench import import_nats_bench
from rlnas_fast.evaluators.tabular import Tabular
from rlnas_fast.search import Architecture, Budget, Request, TaskSpec
from rlnas_fast.spaces.cell_201 import OPERATIONS, Cell201

CELLS = list(itertools.product(OPERATIONS, repeat=6))[::-1]


class StandIn:
    """Answers as NATStopology does; the test accuracy of CIFAR-100 after 12 epochs is missing in places."""

    def __init__(self, cells: list[tuple[str, ...]]) -> None:
        self.cells = cells

    def __len__(self) -> int:
        return len(self.cells)

    def arch(self, index: int) -> str:
        a, b, c, d, e, f = self.cells[index]
        return f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|"

    def get_more_info(self, index: int, dataset: str, *, hp: str, is_random: bool) -> dict[str, Any]:
        assert is_random is False
        seen = {
            "train-loss": 0.1,
            "valid-accuracy": index / 200 + int(hp) / 100,
            "test-accuracy": index / 400,
        }
        if dataset == "cifar10" or (dataset == "cifar100" and hp == "12" and index % 2):
            del seen["valid-accuracy"]
        return seen


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("nats_bench")
    module.calls = []  # type: ignore[attr-defined]

    def create(path: str, space: str, *, fast_mode: bool, verbose: bool) -> StandIn:
        module.calls.append((path, space, fast_mode, verbose))  # type: ignore[attr-defined]
        return StandIn(CELLS)

    module.create = create  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nats_bench", module)
    return module


def test_the_table_answers_as_the_package_does(package: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "simple").mkdir()
    table = tmp_path / "new" / "table.npz"
    columns = import_nats_bench(tmp_path / "simple", table, OPERATIONS)
    assert package.calls == [(str(tmp_path / "simple"), "tss", True, False)]
    assert "e200_imagenet16_120_test_acc" in columns
    assert "e12_cifar10_valid_acc" not in columns  # the package has none
    space = Cell201(TaskSpec((3, 32, 32), 10))
    evaluator = Tabular(
        space,
        data=str(table),
        reward_column="e200_cifar10_valid_valid_acc",
        score_column="e12_cifar100_test_acc",
    )
    for row in (0, 1234, len(CELLS) - 1):
        choices = tuple(OPERATIONS.index(name) for name in CELLS[row])
        seen = evaluator.evaluate(Request(Architecture("cell-201", choices), Budget(1), 0))
        assert seen.accuracy == pytest.approx((row / 200 + 2) / 100)
        assert seen.extra["score"] == pytest.approx(row / 400 / 100)
    with np.load(table, allow_pickle=False) as archive:
        assert np.isnan(archive["e12_cifar100_valid_acc"]).sum() == len(CELLS) // 2


def test_what_is_missing_is_one_clear_error(
    package: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="no NATS-Bench at"):
        import_nats_bench(tmp_path / "nowhere", tmp_path / "table.npz", OPERATIONS)
    with pytest.raises(DataError, match=r"not of this space: skip_connect"):
        import_nats_bench(tmp_path, tmp_path / "table.npz", [o for o in OPERATIONS if "skip" not in o])

    def broken(*arguments: Any, **options: Any) -> Any:
        raise ValueError("not a dir")

    package.create = broken  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"cannot read .*: not a dir"):
        import_nats_bench(tmp_path, tmp_path / "table.npz", OPERATIONS)
    monkeypatch.setitem(sys.modules, "nats_bench", None)
    with pytest.raises(ConfigError, match="pip install nats_bench"):
        import_nats_bench(tmp_path, tmp_path / "table.npz", OPERATIONS)
    assert not (tmp_path / "table.npz").exists()
