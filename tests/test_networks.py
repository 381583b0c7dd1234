"""Networks by name: for a task's shape, found again by their parameters, within their budgets."""

import pytest
import torch

from rlnas_fast.components import network_of
from rlnas_fast.compression.layers import prunable
from rlnas_fast.errors import ConfigError
from rlnas_fast.networks import NETWORKS, make_network, named_after
from rlnas_fast.search import TaskSpec


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_answers_for_the_classes_of_its_task(name: str) -> None:
    network = make_network(name, TaskSpec((3, 32, 32), 7)).eval()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_seed_draws_the_same_network_and_leaves_the_generator(name: str) -> None:
    spec, before = TaskSpec((1, 8, 8), 3), torch.get_rng_state()
    first, second = make_network(name, spec, 5).state_dict(), make_network(name, spec, 5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), before)


def test_resnet20_has_the_published_number_of_parameters() -> None:
    network = make_network("resnet20", TaskSpec((3, 32, 32), 10))
    assert sum(p.numel() for p in network.parameters()) == 269_722


@pytest.mark.parametrize("name", ["resnet20", "stage-cnn", "small-cnn"])
def test_a_convolutional_network_refuses_what_is_no_image(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} takes images"):
        make_network(name, TaskSpec((20,), 3))


def test_a_network_of_ones_own_is_made_of_channels_and_classes_or_of_nothing() -> None:
    made = network_of("rlnas_fast.networks:StageCNN", TaskSpec((3, 8, 8), 5))
    assert made.eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    assert isinstance(network_of("torch.nn:Flatten", TaskSpec((3,), 5)), torch.nn.Flatten)
    with pytest.raises(ConfigError, match="unknown network 'resnet21': did you mean 'resnet20'"):
        network_of("resnet21", TaskSpec((3, 8, 8), 5))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict_is_recognised_by_its_shapes(name: str) -> None:
    spec = TaskSpec((1, 28, 28), 10)
    assert named_after(make_network(name, spec).state_dict(), spec) == name
    assert named_after(make_network(name, spec).state_dict(), TaskSpec((1, 28, 28), 9)) is None


def test_the_small_cnn_keeps_to_its_budget() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = make_network("small-cnn", TaskSpec((1, 28, 28), 10))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 28, 28))
    assert counter.get_total_flops() <= 2_000_000
    assert prunable(model).total == 155_536
