"""Makes a table from the official NATS-Bench package and file, where the user has both."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..search.archives import replace_file

DATA_SETS = ("cifar10-valid", "cifar10", "cifar100", "ImageNet16-120")
SCHEDULES = ("12", "200")
METRICS = {"valid-accuracy": "valid_acc", "test-accuracy": "test_acc"}
_EDGE = re.compile(r"([a-z0-9_]+)~\d")


def import_nats_bench(
    source: Path,
    target: Path,
    operations: Sequence[str],
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Writes the topology search space of NATS-Bench as an .npz that ``Tabular`` reads.

    Accuracies are means over the seeds, after both schedules: ``e200_cifar10_valid_test_acc`` is the test
    accuracy after the schedule of 200 epochs on data set "cifar10-valid".

    The package ``nats_bench`` is imported here and nowhere else, and reads its own file, which is a
    pickle: a pickle can run code, so give only a file from the authors.

    Source: Dong et al., NATS-Bench (2021), and the public interface of its package.

    Args:
        source: the folder NATS-tss-...-simple, or the single file.
        target: the table.
        operations: the choices of each edge, as the space orders them.
        on_row: told how many architectures are read, of how many.
    Returns:
        The names of the columns.
    Raises:
        ConfigError: the package is not installed.
        DataError: the file is not what the package expects, or its cells are not the space's.
    """
    if not source.exists():
        raise DataError(f"no NATS-Bench at {source}: give the folder NATS-tss-v1_0-3ffb9-simple")
    try:
        package = importlib.import_module("nats_bench")
    except ImportError as error:
        raise ConfigError("the package nats_bench is not installed: pip install nats_bench") from error
    try:
        api = package.create(str(source), "tss", fast_mode=source.is_dir(), verbose=False)
        total = len(api)
        cells = [_choices(api.arch(index), operations) for index in range(total)]
        columns: dict[str, np.ndarray] = {}
        for index in range(total):
            for name, value in _row(api, index).items():
                columns.setdefault(name, np.full(total, np.nan))[index] = value
            on_row(index + 1, total)
    except (AssertionError, AttributeError, EOFError, KeyError, OSError, ValueError) as error:
        raise DataError(f"nats_bench cannot read {source}: {error or type(error).__name__}") from error
    arrays = {"ops": np.array(cells, dtype=np.uint8), "op_names": np.array(operations), **columns}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]

    replace_file(target, write)
    return list(columns)


def _choices(cell: str, operations: Sequence[str]) -> list[int]:
    """The number of each edge's operation, of a cell written as |a~0|+|b~0|c~1|+|d~0|e~1|f~2|."""
    found = _EDGE.findall(cell)
    unknown = sorted(set(found) - set(operations))
    if unknown or len(found) != 6:
        raise DataError(f"cell {cell!r} is not of this space: {', '.join(unknown) or len(found)}")
    return [operations.index(name) for name in found]


def _row(api: Any, index: int) -> dict[str, float]:
    row = {}
    for schedule in SCHEDULES:
        for data_set in DATA_SETS:
            seen = api.get_more_info(index, data_set, hp=schedule, is_random=False)
            for metric, name in METRICS.items():
                if metric in seen:
                    row[f"e{schedule}_{data_set.replace('-', '_').lower()}_{name}"] = float(seen[metric])
    return row
