"""The chain as a Markov decision process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlnas_fast.errors import ConfigError
from rlnas_fast.evaluators.train_child import TrainChild
from rlnas_fast.search import Architecture, Budget, Request, TaskSpec, sample_uniform, validate
from rlnas_fast.spaces.chain_cnn import ChainCNN, Layer
from rlnas_fast.tasks.digits import digits
from rlnas_fast.training.recipe import Recipe

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


def test_options_leave_the_numbers_and_keys_of_choices_as_they_are() -> None:
    plain = ChainCNN(DIGITS).decisions[0].choices
    options = {"strides": (1, 2), "global_pooling": True, "skips": True, "consecutive_pooling": True}
    rich = ChainCNN(DIGITS, **options).decisions[0].choices
    assert rich[: len(plain) - 1] == plain[:-1]
    assert plain[-1] == rich[-1] == "end"
    assert plain == tuple(
        [f"conv{k}x{k}-{d}" for k in (1, 3, 5) for d in (10, 20, 32, 64)]
        + [f"pool{k}x{k}/{s}" for k in (3, 5) for s in (2, 3)]
        + [f"fc-{size}" for size in (64, 128, 256, 512)]
        + ["end"]
    )


def test_a_stride_halves_the_image() -> None:
    space = ChainCNN(LARGE, strides=(1, 2, 3))
    network = space.build(
        Architecture("chain-cnn", choices(space, "conv3x3-10/2", "conv5x5-20/3", "end")), LARGE
    )
    assert network[:2](torch.zeros(2, 3, 32, 32)).shape == (2, 20, 6, 6)
    assert space.layers(choices(space, "conv3x3-10/2"))[0] == Layer(1, "conv", 10, 3, 2)
    assert "fc" in kinds(allowed(space, "conv3x3-10/2", "conv5x5-20/3"))
    assert "conv3x3-10" not in ChainCNN(LARGE, strides=(2,)).decisions[0].choices


def test_after_a_global_pool_only_full_connection_or_the_end_may_come() -> None:
    space = ChainCNN(LARGE, global_pooling=True, attention=True, skips=True)
    assert "global-pool" not in allowed(space)
    assert kinds(allowed(space, "conv3x3-10", "global-pool")) == {"fc", "end"}
    assert "global-pool" not in allowed(space, "conv3x3-10", "global-pool", "fc-64")
    network = space.build(
        Architecture("chain-cnn", choices(space, "conv3x3-10", "global-pool", "end")), LARGE
    )
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(network[:2](x).flatten(), network[:1](x).mean((2, 3)).flatten(), atol=1e-6)


def test_skips_add_their_input() -> None:
    space = ChainCNN(LARGE, skips=True)
    parts = choices(space, "conv3x3-10", "residual3x3-10", "residual1x1-20", "end")
    network = space.build(Architecture("chain-cnn", parts), LARGE).eval()
    x = network[0](torch.randn(2, 3, 32, 32))
    assert torch.allclose(network[1](x), x + network[1].layer(x))
    assert network[2](network[1](x)).shape == (2, 20, 32, 32)


def test_pools_may_follow_each_other_where_switched_on() -> None:
    space = ChainCNN(LARGE, consecutive_pooling=True)
    assert "pool" in kinds(allowed(space, "conv1x1-10", "pool3x3/2"))
    assert "pool" not in kinds(allowed(space))


def test_more_fully_connected_layers() -> None:
    space = ChainCNN(DIGITS, max_fc=4)
    assert "fc-64" in allowed(space, "fc-512", "fc-256", "fc-64")
    assert kinds(allowed(space, "fc-512", "fc-256", "fc-64", "fc-64")) == {"end"}


def test_decisions_about_training_come_first_and_reach_the_recipe() -> None:
    space = ChainCNN(DIGITS, training=True, max_depth=2)
    assert [d.name for d in space.decisions] == [
        "learning_rate",
        "batch_size",
        "optimizer",
        "layer 1",
        "layer 2",
    ]
    assert space.mask((0,)).tolist() == [True, True, True]
    layers = tuple(space.decisions[3].choices.index(name) for name in ("conv3x3-20", "end"))
    architecture = Architecture("chain-cnn", (2, 1, 1, *layers))
    validate(space, architecture)
    assert space.recipe(architecture) == {"learning_rate": 0.01, "batch_size": 64, "optimizer": "sgd"}
    assert space.describe(architecture) == "learning_rate 0.01 batch_size 64 optimizer sgd: conv3x3-20"
    assert space.canonical_key(architecture) == (
        "chain-cnn:learning_rate=0.01:batch_size=64:optimizer=sgd:conv3x3-20"
    )
    assert space.layers(architecture.choices)[0] == Layer(1, "conv", 20, 3)
    other = Architecture("chain-cnn", (0, 1, 1, *layers))
    task = digits()
    evaluator = TrainChild(space, task, Recipe(), threads=1)
    first, second = (evaluator.evaluate(Request(a, Budget(1), 0)).loss for a in (architecture, other))
    assert first != second
    by_hand = TrainChild(ChainCNN(DIGITS, max_depth=2), task, Recipe("sgd", 0.01, 64), threads=1)
    assert by_hand.evaluate(Request(Architecture("chain-cnn", layers), Budget(1), 0)).loss == first


def test_images_too_small_for_any_pool() -> None:
    with pytest.raises(ConfigError, match="images of 2 x 8 are too small for any pool"):
        ChainCNN(TaskSpec((1, 2, 8), 10))
    with pytest.raises(ConfigError, match=r"strides = \(\)"):
        ChainCNN(DIGITS, strides=())
