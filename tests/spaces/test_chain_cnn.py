"""The chain as a Markov decision process."""

from __future__ import annotations

import numpy as np
import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, TaskSpec, sample_uniform
from rlnas_fast.spaces.chain_cnn import ChainCNN, Layer

DIGITS = TaskSpec((1, 8, 8), 10)
LARGE = TaskSpec((3, 32, 32), 10)


def choices(space: ChainCNN, *layers: str) -> tuple[int, ...]:
    names = space.decisions[0].choices
    return tuple(names.index(layer) for layer in layers)


def allowed(space: ChainCNN, *layers: str) -> set[str]:
    mask = space.mask(choices(space, *layers))
    return {name for name, valid in zip(space.decisions[0].choices, mask, strict=True) if valid}


def kinds(names: set[str]) -> set[str]:
    return {name.rstrip("0123456789-/x") for name in names}


def test_opens_with_a_layer_that_is_no_pool() -> None:
    assert kinds(allowed(ChainCNN(DIGITS))) == {"conv", "fc"}


def test_a_large_image_must_shrink_before_full_connection() -> None:
    space = ChainCNN(LARGE)
    assert kinds(allowed(space)) == {"conv"}
    assert "fc" not in kinds(allowed(space, "conv1x1-10", "pool3x3/3"))
    assert "fc" in kinds(allowed(space, "conv1x1-10", "pool3x3/3", "conv1x1-10", "pool3x3/2"))
    assert "fc" in kinds(allowed(ChainCNN(LARGE, fc_side=32)))


def test_no_pool_follows_a_pool_and_windows_fit() -> None:
    space = ChainCNN(DIGITS)
    assert kinds(allowed(space, "conv3x3-10", "pool3x3/2")) == {"conv", "fc", "end"}
    tiny = allowed(space, "conv3x3-10", "pool3x3/3", "conv1x1-10", "pool3x3/2")
    assert {name for name in tiny if name.startswith("conv")} == {f"conv1x1-{d}" for d in (10, 20, 32, 64)}
    assert "pool" not in kinds(
        allowed(space, "conv3x3-10", "pool3x3/3", "conv1x1-10", "pool3x3/2", "conv1x1-10")
    )


def test_fully_connected_layers_come_last_do_not_grow_and_are_few() -> None:
    space = ChainCNN(DIGITS)
    assert allowed(space, "fc-128") == {"fc-64", "fc-128", "end"}
    assert allowed(space, "fc-128", "fc-64") == {"end"}
    assert kinds(allowed(ChainCNN(DIGITS, max_fc=0), "conv3x3-10")) == {"conv", "pool", "end"}


def test_attention_is_offered_where_switched_on() -> None:
    assert "attention" not in ChainCNN(DIGITS).decisions[0].choices
    space = ChainCNN(DIGITS, attention=True)
    assert "attention" not in allowed(space)
    assert "attention" in allowed(space, "conv3x3-10")
    assert "attention" not in allowed(space, "conv3x3-10", "attention")
    assert "attention" not in allowed(space, "fc-64")


def test_ends_by_choice_or_at_the_largest_depth() -> None:
    space = ChainCNN(DIGITS, max_depth=3)
    assert space.is_complete(choices(space, "conv1x1-10", "end"))
    assert not space.is_complete(choices(space, "conv1x1-10", "conv1x1-10"))
    assert space.is_complete(choices(space, "conv1x1-10", "conv1x1-10", "conv1x1-10"))


def test_states_are_seven_numbers() -> None:
    space = ChainCNN(DIGITS)
    states = space.layers(choices(space, "conv5x5-32", "pool3x3/2", "fc-256", "end"))
    assert states == (
        Layer(1, "conv", 32, 5, 0, 0, 0),
        Layer(2, "pool", 0, 3, 2, 0, 0),
        Layer(3, "fc", 0, 0, 0, 256, 0),
        Layer(3, "end", 0, 0, 0, 0, 1),
    )


def test_every_choice_of_layers_is_drawn_sooner_or_later() -> None:
    space = ChainCNN(DIGITS, attention=True)
    drawn = set()
    for seed in range(300):
        drawn.update(sample_uniform(space, np.random.default_rng(seed)).choices)
    assert drawn == set(range(len(space.decisions[0].choices)))


def test_keys_and_descriptions_name_the_layers() -> None:
    space = ChainCNN(DIGITS)
    architecture = Architecture("chain-cnn", choices(space, "conv3x3-20", "fc-64", "end"))
    assert space.canonical_key(architecture) == "chain-cnn:conv3x3-20|fc-64"
    assert space.describe(architecture) == "conv3x3-20 > fc-64"


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (TaskSpec((64,), 10), {}, "needs images"),
        (DIGITS, {"max_depth": 0}, "max_depth = 0"),
        (DIGITS, {"max_fc": -1}, "max_fc = -1"),
        (DIGITS, {"fc_side": 0}, "fc_side = 0"),
    ],
)
def test_bad_options(spec: TaskSpec, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChainCNN(spec, **options)
