"""Groups and what can be done to them; both forms of shuffle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlnas_fast.compression.compressed import Compressed
from rlnas_fast.compression.heuristics import project
from rlnas_fast.compression.layers import INT8, KEEP, PRUNE, Layout, prunable
from rlnas_fast.compression.operations import OPERATIONS, Groups, gathering, operate
from rlnas_fast.errors import ConfigError

KEEPS, PRUNES, QUANTISES, SHUFFLES = range(4)


def act(weight: torch.Tensor, groups: Groups, what: dict[int, int], state: torch.Tensor | None = None):
    state = torch.full(weight.shape, KEEP, dtype=torch.uint8) if state is None else state
    chosen = torch.tensor(list(what))
    return operate("x", weight, state, groups, chosen, torch.tensor(list(what.values())))


def test_the_document_names_four_operations() -> None:
    assert OPERATIONS == ("keep", "prune", "quantise", "shuffle")


@pytest.mark.parametrize("kind", ["weights", "rows", "tiles", "tiles:2x3", "2:4"])
def test_group_numbers_are_dense_and_whole(kind: str) -> None:
    groups = Groups.of(kind)
    assert str(groups) == (kind if kind != "tiles" else "tiles:32x32")
    numbers = groups.numbers("x", torch.zeros(5, 7, 1, 1))
    assert numbers.shape == (5, 7, 1, 1)
    assert numbers.unique().tolist() == list(range(int(numbers.max()) + 1))


@pytest.mark.parametrize("kind", ["", "tile", "tiles:0x4", "4:2", "tiles:4", "0:4"])
def test_an_unknown_grouping_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="give weights, rows, tiles"):
        Groups.of(kind)


def test_prune_forgets_nothing_and_keep_brings_it_back() -> None:
    weight, groups = torch.randn(4, 4), Groups.of("rows")
    moved, state = act(weight, groups, {1: PRUNES})
    assert torch.equal(moved, weight)
    assert state.tolist() == [[KEEP] * 4, [PRUNE] * 4, [KEEP] * 4, [KEEP] * 4]
    assert act(moved, groups, {1: KEEPS}, state)[1].eq(KEEP).all()


def test_quantise_takes_the_tile_whose_scale_it_shares() -> None:
    weight, groups = torch.randn(4, 4), Groups("weights", Layout((2, 2)))
    _, state = act(weight, groups, {0: QUANTISES, 1: PRUNES})
    assert state.tolist() == [[INT8, PRUNE, KEEP, KEEP], [INT8, INT8, KEEP, KEEP], [KEEP] * 4, [KEEP] * 4]
    _, again = act(weight, groups, {4: KEEPS}, state)
    assert again.tolist() == [[KEEP, PRUNE, KEEP, KEEP], *[[KEEP] * 4] * 3]
    Layout((2, 2)).mask("x", state)  # is one that kernels can hold


@pytest.mark.parametrize("kind", ["weights", "rows", "tiles:2x2", "2:4"])
def test_any_operations_leave_a_state_that_kernels_can_hold(kind: str) -> None:
    groups = Groups.of(kind)
    groups = Groups(groups.kind, Layout((2, 2)), groups.n, groups.m)
    weight, state = torch.randn(5, 7), torch.full((5, 7), KEEP, dtype=torch.uint8)
    count = int(groups.numbers("x", weight).max()) + 1
    for _ in range(8):
        chosen = torch.randperm(count)[: max(1, count // 2)]
        weight, state = operate("x", weight, state, groups, chosen, torch.randint(0, 4, (len(chosen),)))
        groups.layout.mask("x", state)
    assert set(state.unique().tolist()) <= {0, 1, 2}


def test_shuffle_swaps_neighbours_with_their_states() -> None:
    weight = torch.arange(6.0).view(2, 3)
    state = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.uint8)
    moved, now = act(weight, Groups.of("weights"), {0: SHUFFLES, 1: SHUFFLES, 5: SHUFFLES}, state)
    assert moved.flatten().tolist() == [1, 0, 2, 3, 5, 4]  # 1 had moved already; 5 has no next
    assert now.flatten().tolist() == [1, 0, 1, 1, 1, 1]


def test_shuffle_of_rows_and_of_ragged_tiles() -> None:
    weight = torch.arange(15.0).view(3, 5)
    moved, _ = act(weight, Groups.of("rows"), {2: SHUFFLES})
    assert torch.equal(moved, weight[[0, 2, 1]])
    moved, _ = act(weight, Groups.of("tiles:2x2"), {0: SHUFFLES, 2: SHUFFLES})  # 2 has no equal beside it
    assert torch.equal(moved[:2], weight[:2, [2, 3, 0, 1, 4]])
    assert torch.equal(moved[2], weight[2])


def test_gathering_preserves_the_function_and_holds_more_of_the_score() -> None:
    important = torch.randperm(96)[:24]
    layer = nn.Linear(96, 64)
    with torch.no_grad():
        layer.weight.mul_(0.05)
        layer.weight[:, important] *= 40
    network = nn.Sequential(layer, nn.ReLU(), nn.Linear(64, 8))
    layers = prunable(network)
    squares = {entry.name: entry.weight.square() for entry in layers}
    orders = gathering(layers, squares, (16, 16), 0.25)
    assert "0" in orders
    x = torch.randn(5, 96)
    everything = {entry.name: torch.ones_like(entry.weight, dtype=torch.bool) for entry in layers}
    same = Compressed.of(network, everything, Layout((16, 16), orders)).eval()
    torch.testing.assert_close(same(x), network(x))
    plain = project(squares, 0.25, groups=Groups.of("tiles:16x16"))
    gathered = project(squares, 0.25, groups=Groups.of("tiles:16x16", orders))
    assert squares["0"][gathered["0"]].sum() > 2 * squares["0"][plain["0"]].sum()


def test_gathering_leaves_columns_of_large_kernels_in_order() -> None:
    layers = prunable(nn.Sequential(nn.Conv2d(4, 40, 3)))
    orders = gathering(layers, {"0": torch.rand(40, 1, 1, 1).expand(40, 4, 3, 3) ** 8}, (8, 8), 0.2)
    assert orders["0"][1] is None
