"""Eight inverted residual blocks, any of which may be left out."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, TaskSpec
from rlnas_fast.spaces.nasbench_macro import NasBenchMacro

SPEC = TaskSpec((3, 32, 32), 10)
SPACE = NasBenchMacro(SPEC)


def key(*choices: int) -> str:
    return SPACE.canonical_key(Architecture("nasbench-macro", choices))


def test_a_block_left_out_within_a_stage_leaves_no_place() -> None:
    assert key(1, 2, 1, 0, 2, 1, 1, 0) == key(1, 2, 1, 2, 0, 1, 0, 1)
    assert key(0, 1, 1, 1, 1, 1, 1, 1) != key(1, 0, 1, 1, 1, 1, 1, 1)
    assert len({key(*choices) for choices in itertools.product(range(3), repeat=8)}) == 3_969


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="width = 1"):
        NasBenchMacro(SPEC, width=1)
    with pytest.raises(ConfigError, match="needs images"):
        NasBenchMacro(TaskSpec((8,), 2))


@pytest.mark.skipif("RLNAS_DATA_DIR" not in os.environ, reason="RLNAS_DATA_DIR is not set")
def test_networks_have_the_published_numbers_of_parameters() -> None:
    path = Path(os.environ["RLNAS_DATA_DIR"]) / "nasbench_macro_cifar10.npz"
    with np.load(path, allow_pickle=False) as archive:
        rows, parameters, accuracy = archive["choices"], archive["params"], archive["mean_acc"]
    for row in range(0, 6561, 1300):
        network = SPACE.build(Architecture("nasbench-macro", tuple(rows[row].tolist())), SPEC)
        assert sum(p.numel() for p in network.parameters()) == parameters[row]
    by_key: dict[str, set[float]] = {}
    for choices, value in zip(rows.tolist(), accuracy.tolist(), strict=True):
        by_key.setdefault(key(*choices), set()).add(value)
    assert all(len(values) == 1 for values in by_key.values())
