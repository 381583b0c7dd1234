"""Cells, and which of them compute the same."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, TaskSpec
from rlnas_fast.spaces.cell_201 import OPERATIONS, Cell201

SPEC = TaskSpec((3, 32, 32), 10)
SPACE = Cell201(SPEC)
NONE, SKIP, ONE, THREE, POOL = range(5)


def key(*choices: int) -> str:
    """Of the operations on 0>1, 0>2, 1>2, 0>3, 1>3, 2>3."""
    return SPACE.canonical_key(Architecture("cell-201", choices))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((ONE, NONE, NONE, NONE, THREE, NONE), (NONE, ONE, NONE, NONE, NONE, THREE)),  # nodes 1 and 2 swapped
        ((ONE, NONE, THREE, THREE, NONE, NONE), (NONE, NONE, NONE, THREE, NONE, NONE)),  # a dead end
        ((NONE, NONE, ONE, THREE, POOL, THREE), (NONE, NONE, NONE, THREE, NONE, NONE)),  # nothing arrives
        ((SKIP, NONE, NONE, NONE, THREE, NONE), (NONE, NONE, NONE, THREE, NONE, NONE)),  # a passage
        ((ONE, NONE, SKIP, NONE, NONE, THREE), (ONE, NONE, NONE, NONE, THREE, NONE)),  # a passage later
        ((POOL, NONE, NONE, POOL, SKIP, NONE), (POOL, SKIP, NONE, NONE, SKIP, POOL)),  # one pooling, twice
        ((NONE,) * 6, (THREE, THREE, THREE, NONE, NONE, NONE)),
    ],
)
def test_one_computation_has_one_key(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert key(*one) == key(*other)


def test_two_convolutions_of_one_value_are_not_one_taken_twice() -> None:
    twice = key(ONE, NONE, SKIP, NONE, SKIP, SKIP)
    two = key(ONE, NONE, NONE, ONE, SKIP, NONE)
    assert twice != two


def test_cells_can_be_told_apart_as_the_table_does() -> None:
    space = Cell201(SPEC, distinct="cells")
    every = itertools.product(range(5), repeat=6)
    assert len({space.canonical_key(Architecture("cell-201", cell)) for cell in every}) == 15_625


def test_equal_keys_compute_the_same() -> None:
    """Cells of one key, given weights by what each convolution computes, answer alike."""
    space = Cell201(TaskSpec((2, 4, 4), 3), width=2, cells=1)
    classes = defaultdict(list)
    for cell in itertools.product(range(5), repeat=6):
        classes[space.canonical_key(Architecture("cell-201", cell))].append(cell)
    assert len(classes) == 5_260
    rng = np.random.default_rng(0)
    several = [cells for cells in classes.values() if len(cells) > 1]
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    for index in rng.choice(len(several), 15, replace=False):
        answers = []
        for cell in several[index][:5]:
            network = space.build(Architecture("cell-201", cell), space.task_spec).double()
            # Only operations with one value everywhere can be compared without matching up their weights.
            for parameter in network.parameters():
                torch.nn.init.constant_(parameter, 0.1)
            answers.append(network(x))
        assert all(torch.allclose(answer, answers[0], atol=1e-9) for answer in answers)


def test_describes_a_cell_as_the_table_does() -> None:
    text = SPACE.describe(Architecture("cell-201", (POOL, ONE, SKIP, ONE, SKIP, SKIP)))
    assert text == (
        "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 0}, "width = 0"), ({"cells": 0}, "cells = 0"), ({"distinct": "all"}, "distinct = 'all'")],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cell201(SPEC, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs images"):
        Cell201(TaskSpec((8,), 2))


@pytest.mark.skipif("RLNAS_DATA_DIR" not in os.environ, reason="RLNAS_DATA_DIR is not set")
def test_networks_have_the_published_numbers_of_parameters() -> None:
    with np.load(Path(os.environ["RLNAS_DATA_DIR"]) / "nasbench201.npz", allow_pickle=False) as archive:
        assert tuple(archive["op_names"]) == OPERATIONS
        rows, millions = archive["ops"], archive["derived_mparams_cifar10"]
        texts = archive["arch_str"]
    for row in (1, 5, 77, 6111, 9930):
        architecture = Architecture("cell-201", tuple(rows[row].tolist()))
        network = SPACE.build(architecture, SPEC)
        assert sum(p.numel() for p in network.parameters()) == round(millions[row] * 1e6)
        assert SPACE.describe(architecture) == texts[row]
