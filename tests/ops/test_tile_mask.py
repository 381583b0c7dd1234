"""Masks over tiles: what they keep, how they change, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlnas_fast.errors import ConfigError, ShapeError
from rlnas_fast.ops.masked_matmul import INT8, KEEP, PRUNE, TileMask, effective_weight
from rlnas_fast.ops.masked_matmul.tile_mask import unpack_bits

sizes = st.integers(1, 70)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_lists_and_counts_follow_from_state_and_bits(rows, cols, tile_rows, tile_cols, density, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(rows, cols, generator=generator) < density
    mask = TileMask.from_dense(dense, (tile_rows, tile_cols), int8=True)
    assert torch.equal(mask.dense(), dense)
    state = torch.randint(0, 3, mask.state.shape, generator=generator).to(torch.uint8)
    mask.update(state=state)
    t = mask.tensors
    for i in range(state.shape[0]):
        keep, int8 = t.row_count[i].tolist()
        expected = [(state[i] == kind).nonzero().flatten().tolist() for kind in (KEEP, INT8)]
        assert [keep, int8] == [len(tiles) for tiles in expected]
        assert t.row_tiles[i, : keep + int8].tolist() == expected[0] + expected[1]
    for j in range(state.shape[1]):
        expected = [(state[:, j] == kind).nonzero().flatten().tolist() for kind in (KEEP, INT8)]
        keep, int8 = t.col_count[j].tolist()
        assert t.col_tiles[j, : keep + int8].tolist() == expected[0] + expected[1]
    live = (state != PRUNE).repeat_interleave(tile_rows, 0).repeat_interleave(tile_cols, 1)[:rows, :cols]
    assert torch.equal(mask.dense(), dense & live)
    incomplete = sum(
        not bool(dense[i * tile_rows : (i + 1) * tile_rows, j * tile_cols : (j + 1) * tile_cols].all())
        for i, j in (state != PRUNE).nonzero().tolist()
    )
    kinds = [int((state == kind).sum()) for kind in (KEEP, INT8)]
    assert t.stats.tolist() == [*kinds, int((dense & live).sum()), incomplete]


def test_packing_is_the_same_on_every_instruction_set(isa):
    dense = torch.rand(45, 77) < 0.3
    dense[:16, :16] = False
    mask = TileMask.from_dense(dense, (16, 16))
    assert torch.equal(unpack_bits(mask.tensors.bits, 77), dense)
    assert int(mask.state[0, 0]) == PRUNE
    assert mask.nonzeros() == int(dense.sum())


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_density_from_scores_is_exact_to_one_weight(density):
    scores = torch.randn(37, 53)
    mask = TileMask.from_scores(scores, density, (16, 16))
    wanted = round(density * 37 * 53)
    assert mask.nonzeros() == wanted
    if 0 < wanted < scores.numel():
        assert scores[mask.dense()].min() >= scores[~mask.dense()].max()


def test_ties_of_scores_do_not_change_the_count():
    assert TileMask.from_scores(torch.zeros(40, 40), 0.3).nonzeros() == 480


def test_whole_tiles_come_as_close_to_the_density_as_tiles_allow():
    mask = TileMask.from_scores(torch.rand(64, 64), 0.4, (16, 16), whole_tiles=True)
    assert int(mask.state.sum()) == 6  # of 16: 0.375
    assert mask.tensors.bits is None


def test_two_of_four_keeps_the_two_largest_of_every_four():
    scores = torch.rand(20, 24)
    fours = TileMask.two_of_four(scores).dense().view(20, 6, 4)
    assert torch.equal(fours.sum(-1), torch.full((20, 6), 2))
    kept, pruned = (scores.view(20, 6, 4).masked_fill(m, f) for m, f in ((~fours, 2.0), (fours, -1.0)))
    assert (kept.amin(-1) > pruned.amax(-1)).all()


def test_an_update_changes_tensors_in_place_and_is_seen_by_autograd():
    mask = TileMask.from_dense(torch.ones(8, 8, dtype=torch.bool), (4, 4))
    before = [v.data_ptr() for v in mask.tensors if isinstance(v, torch.Tensor)]
    version = mask.state._version
    mask.update(dense=torch.eye(8, dtype=torch.bool))
    assert before == [v.data_ptr() for v in mask.tensors if isinstance(v, torch.Tensor)]
    assert mask.state._version > version
    assert mask.nonzeros() == 8
    assert mask.state.tolist() == [[1, 0], [0, 1]]


def test_state_and_dense_together_mark_int8_tiles_and_keep_pruned_ones_pruned():
    mask = TileMask((8, 8), (4, 4), unstructured=True, int8=True)
    dense = torch.ones(8, 8, dtype=torch.bool)
    dense[4:, :4] = False
    mask.update(state=torch.tensor([[INT8, PRUNE], [KEEP, KEEP]], dtype=torch.uint8), dense=dense)
    assert mask.state.tolist() == [[INT8, PRUNE], [PRUNE, KEEP]]


def test_quantised_tiles_are_within_half_a_step_of_the_weight():
    weight = torch.randn(20, 30)
    mask = TileMask((20, 30), (8, 8), unstructured=True, int8=True)
    mask.update(state=torch.full_like(mask.state, INT8), dense=torch.rand(20, 30) < 0.7)
    mask.quantise(weight)
    step = mask.tensors.scale.repeat_interleave(8, 0).repeat_interleave(8, 1)[:20, :30]
    error = (effective_weight(weight, mask.tensors) - weight * mask.dense()).abs()
    assert (error <= step * 0.5001).all()  # round to nearest; the slack is float32 rounding of the quotient


def test_a_tile_of_zeros_quantises_with_scale_one():
    mask = TileMask((4, 4), (4, 4), int8=True)
    mask.quantise(torch.zeros(4, 4))
    assert mask.tensors.scale.tolist() == [[1.0]]


def test_to_copies():
    mask = TileMask((8, 8), (4, 4))
    other = mask.to("cpu")
    other.update(state=torch.zeros(2, 2, dtype=torch.uint8))
    assert mask.nonzeros() == 64
    assert other.nonzeros() == 0


def _mask() -> TileMask:
    return TileMask((8, 8), (4, 4), unstructured=True, int8=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TileMask((8,)), ShapeError, "shape"),
        (lambda: TileMask((8, 8), (0, 4)), ShapeError, r"tile .* \(0, 4\)"),
        (lambda: TileMask((8, 4), input_permutation=torch.arange(8)), ShapeError, "input_permutation"),
        (
            lambda: TileMask((2, 3), input_permutation=torch.tensor([0, 1, 1])),
            ShapeError,
            "not a permutation",
        ),
        (lambda: TileMask((2, 3), output_permutation=torch.ones(2)), ShapeError, "output_permutation"),
        (lambda: TileMask.from_dense(torch.ones(4, dtype=torch.bool)), ShapeError, "dense"),
        (lambda: TileMask.from_dense(torch.ones(4, 4)), ConfigError, "bool"),
        (lambda: TileMask.from_scores(torch.ones(4, 4), 1.5), ConfigError, "1.5"),
        (lambda: TileMask.from_scores(torch.full((4, 4), torch.nan), 0.5), ConfigError, "NaN"),
        (lambda: TileMask.two_of_four(torch.ones(4, 6)), ShapeError, "multiple of 4"),
        (lambda: _mask().update(dense=torch.ones(8, 7, dtype=torch.bool)), ShapeError, "dense"),
        (lambda: _mask().update(state=torch.ones(3, 2)), ShapeError, "state"),
        (lambda: _mask().update(state=torch.full((2, 2), 3)), ConfigError, "3"),
        (lambda: _mask().update(state=torch.full((2, 2), -1)), ConfigError, "-1"),
        (lambda: TileMask((8, 8)).update(state=torch.full((1, 1), 2)), ConfigError, "int8=True"),
        (lambda: TileMask((8, 8)).update(dense=torch.ones(8, 8) > 0), ConfigError, "unstructured=True"),
        (lambda: TileMask((8, 8)).quantise(torch.ones(8, 8)), ConfigError, "int8=True"),
        (lambda: _mask().quantise(torch.ones(8, 7)), ShapeError, "weight"),
        (lambda: _mask().quantise(torch.ones(8, 8), torch.ones(2)), ShapeError, "scale"),
        (lambda: _mask().quantise(torch.ones(8, 8), torch.zeros(2, 2)), ConfigError, "0.0"),
        (lambda: _mask().quantise(torch.ones(8, 8), -torch.ones(2, 2)), ConfigError, "-1.0"),
        (lambda: _mask().quantise(torch.ones(8, 8), torch.full((2, 2), torch.inf)), ConfigError, "inf"),
        (lambda: _mask().quantise(torch.ones(8, 8), torch.full((2, 2), torch.nan)), ConfigError, "nan"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
