"""What every space promises, on random architectures."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from rlnas_fast.search import Architecture, SearchSpace, TaskSpec, sample_uniform, validate
from rlnas_fast.spaces.cell_201 import Cell201
from rlnas_fast.spaces.chain_cnn import ChainCNN
from rlnas_fast.spaces.macro_cnn import MacroCNN
from rlnas_fast.spaces.nasbench_macro import NasBenchMacro

# Small widths: what is tested is the wiring, and one core has seconds for it.
SPACES: dict[str, Callable[[TaskSpec], Any]] = {
    "chain-cnn": ChainCNN,
    "chain-cnn with attention": lambda spec: ChainCNN(spec, attention=True, normalise=False),
    "chain-cnn with every option": lambda spec: ChainCNN(
        spec,
        max_fc=4,
        attention=True,
        strides=(1, 2, 3),
        global_pooling=True,
        consecutive_pooling=True,
        skips=True,
        training=True,
    ),
    "macro-cnn": lambda spec: MacroCNN(spec, layers=4, width=8),
    "cell-201": lambda spec: Cell201(spec, width=4, cells=1),
    "nasbench-macro": lambda spec: NasBenchMacro(spec, width=4),
}
SHAPES = ((1, 8, 8), (3, 9, 5), (2, 6, 12))


@pytest.fixture(params=SPACES, ids=str)
def make(request: pytest.FixtureRequest) -> Callable[[TaskSpec], Any]:
    return SPACES[request.param]


@hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES), outputs=st.integers(2, 5))
def test_every_architecture_builds_runs_and_has_the_declared_shape(
    make: Callable[[TaskSpec], Any], seed: int, shape: tuple[int, int, int], outputs: int
) -> None:
    spec = TaskSpec(shape, outputs)
    space = make(spec)
    architecture = sample_uniform(space, np.random.default_rng(seed))
    validate(space, architecture)
    network = space.build(architecture, spec)
    answer = network(torch.randn(2, *shape))
    assert answer.shape == (2, outputs)
    F.cross_entropy(answer, torch.zeros(2, dtype=torch.int64)).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_is_a_search_space_that_can_be_pickled(make: Callable[[TaskSpec], Any]) -> None:
    space = make(TaskSpec((1, 8, 8), 10))
    assert isinstance(space, SearchSpace)
    again = pickle.loads(pickle.dumps(space))
    assert again == space
    assert again.decisions == space.decisions


def test_masks_have_the_size_of_their_decision_and_leave_a_choice(make: Callable[[TaskSpec], Any]) -> None:
    space = make(TaskSpec((1, 8, 8), 10))
    for seed in range(20):
        choices = sample_uniform(space, np.random.default_rng(seed)).choices
        for position in range(len(choices)):
            mask = space.mask(choices[:position])
            assert mask.dtype == bool
            assert mask.shape == (len(space.decisions[position].choices),)
            assert mask.any()
            assert not space.is_complete(choices[:position])


def test_equal_keys_are_equal_networks_in_size(make: Callable[[TaskSpec], Any]) -> None:
    """Parameters are a property of the network, so no key may stand for two counts."""
    spec = TaskSpec((1, 8, 8), 2)
    space = make(spec)
    sizes: dict[str, int] = {}
    for seed in range(60):
        architecture = sample_uniform(space, np.random.default_rng(seed))
        size = sum(p.numel() for p in space.build(architecture, spec).parameters())
        assert sizes.setdefault(space.canonical_key(architecture), size) == size


def test_descriptions_are_one_line(make: Callable[[TaskSpec], Any]) -> None:
    space = make(TaskSpec((1, 8, 8), 10))
    text = space.describe(sample_uniform(space, np.random.default_rng(0)))
    assert text
    assert "\n" not in text


def test_the_seed_decides_the_weights(make: Callable[[TaskSpec], Any]) -> None:
    spec = TaskSpec((1, 8, 8), 2)
    space = make(spec)
    architecture: Architecture = sample_uniform(space, np.random.default_rng(1))
    x = torch.randn(2, 1, 8, 8)
    answers = []
    for _ in range(2):
        torch.manual_seed(7)
        answers.append(space.build(architecture, spec)(x))
    assert torch.equal(*answers)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cheapest_network_begins_with_its_prefix_and_is_no_dearer(
    make: Callable[[TaskSpec], Any], shape: tuple[int, int, int]
) -> None:
    spec = TaskSpec(shape, 3)
    space = make(spec)
    rng = np.random.default_rng(0)
    for _ in range(20):
        architecture = sample_uniform(space, rng)
        for length in range(len(architecture.choices) + 1):
            prefix = architecture.choices[:length]
            cheapest = space.cheapest(prefix)
            validate(space, cheapest)
            assert cheapest.choices[:length] == prefix
        assert space.cheapest(architecture.choices) == architecture
        modules = [
            sum(1 for _ in space.build(network, spec).modules())
            for network in (space.cheapest(()), architecture)
        ]
        assert modules[0] <= modules[1]
