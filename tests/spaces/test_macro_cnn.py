"""Layers with a type, an activation, a normalisation and a connectivity."""

from __future__ import annotations

import numpy as np
import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, TaskSpec, sample_uniform
from rlnas_fast.spaces.macro_cnn import CONNECTIVITIES, NORMALISATIONS, TYPES, MacroCNN

DIGITS = TaskSpec((1, 8, 8), 10)
CONV, POOL, LAST = TYPES.index("conv3x3"), TYPES.index("maxpool3x3"), len(CONNECTIVITIES) - 1


def allowed(space: MacroCNN, *prefix: int) -> list[str]:
    names = space.decisions[len(prefix)].choices
    return [name for name, valid in zip(names, space.mask(prefix), strict=True) if valid]


def test_what_has_no_effect_on_a_pool_is_masked() -> None:
    space = MacroCNN(DIGITS)
    assert allowed(space, POOL) == ["relu"]
    assert allowed(space, POOL, 0) == ["batch"]
    assert allowed(space, POOL, 0, 0) == ["sequential", "attention"]
    assert len(allowed(space, CONV)) == 5


def test_pools_and_windows_need_an_image_to_match() -> None:
    space = MacroCNN(DIGITS)
    pooled_once, pooled_twice = (POOL, 0, 0, 0), (POOL, 0, 0, 0) * 2
    assert len(allowed(space, *pooled_once)) == 5
    assert allowed(space, *pooled_twice) == ["conv1x1", "conv3x3"]


def test_large_images_are_halved_by_the_stem() -> None:
    space = MacroCNN(TaskSpec((3, 32, 32), 10), layers=2)
    prefix = (POOL, 0, 0, 0)
    assert space._sides(()) == (16, 16)
    assert space._sides(prefix) == (8, 8)


@pytest.mark.parametrize(("width", "same"), [(7, ("layer", "group")), (8, ("instance", "group"))])
def test_equal_numbers_of_groups_are_one_normalisation(width: int, same: tuple[str, str]) -> None:
    space = MacroCNN(DIGITS, layers=1, width=width)
    keys = {
        name: space.canonical_key(Architecture("macro-cnn", (CONV, 0, NORMALISATIONS.index(name), 0)))
        for name in NORMALISATIONS
    }
    assert keys[same[0]] == keys[same[1]]
    assert len(set(keys.values())) == 3


def test_all_of_the_vocabulary_is_drawn() -> None:
    space = MacroCNN(DIGITS, layers=2)
    drawn = {
        (position % 4, choice)
        for seed in range(200)
        for position, choice in enumerate(sample_uniform(space, np.random.default_rng(seed)).choices)
    }
    assert len(drawn) == 5 + 5 + 4 + 4


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (TaskSpec((1, 1, 8), 10), {}, "at least 2 x 2"),
        (TaskSpec((8,), 10), {}, "at least 2 x 2"),
        (DIGITS, {"layers": 0}, "layers = 0"),
        (DIGITS, {"width": 1}, "width = 1"),
    ],
)
def test_bad_options(spec: TaskSpec, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MacroCNN(spec, **options)
