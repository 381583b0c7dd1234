"""Masked linear layers: made from dense ones and back, moved, saved, trained."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlnas_fast.errors import ShapeError
from rlnas_fast.nn.masked_linear import MaskedLinear
from rlnas_fast.ops.masked_matmul import INT8, TileMask

pytestmark = pytest.mark.usefixtures("quick_cost_model")


def make_mask(*, int8: bool = False) -> TileMask:
    return TileMask(
        (24, 40),
        (8, 8),
        unstructured=True,
        int8=int8,
        input_permutation=torch.randperm(40),
        output_permutation=torch.randperm(24),
    )


@pytest.mark.parametrize("bias", [True, False])
def test_a_full_mask_changes_nothing_even_permuted(bias):
    linear, x = nn.Linear(40, 24, bias), torch.randn(3, 5, 40)
    layer = MaskedLinear.from_dense(linear, make_mask())
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer.to_dense()(x), linear(x))
    assert torch.equal(layer.to_dense().weight, linear.weight)


def test_to_dense_computes_the_same_under_any_mask():
    layer = MaskedLinear.from_dense(nn.Linear(40, 24), make_mask(int8=True))
    layer.mask.update(state=torch.randint(0, 3, (3, 5)).to(torch.uint8), dense=torch.rand(24, 40) < 0.6)
    x = torch.randn(7, 40)
    torch.testing.assert_close(layer.to_dense()(x), layer(x))


def test_state_dicts_round_trip_with_the_mask():
    layer = MaskedLinear.from_dense(nn.Linear(40, 24), make_mask(int8=True))
    layer.mask.update(state=torch.randint(0, 3, (3, 5)).to(torch.uint8), dense=torch.rand(24, 40) < 0.6)
    other = MaskedLinear(40, 24, make_mask(int8=True))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(7, 40)
    assert torch.equal(other(x), layer(x))
    assert other.mask.nonzeros() == layer.mask.nonzeros()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_change_of_dtype_leaves_scales_in_float32():
    layer = MaskedLinear.from_dense(nn.Linear(40, 24), make_mask(int8=True)).bfloat16()
    layer.mask.update(state=torch.full((3, 5), INT8))
    assert layer.mask.tensors.scale.dtype == torch.float32
    assert layer(torch.randn(2, 40).bfloat16()).dtype == torch.bfloat16


def test_pruned_weights_never_move_in_training():
    layer = MaskedLinear.from_dense(nn.Linear(40, 24), TileMask.from_scores(torch.rand(24, 40), 0.3, (8, 8)))
    before, pruned = layer.weight.detach().clone(), ~layer.mask.dense()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = torch.randn(16, 40), torch.randn(16, 24)
    losses = []
    for _ in range(5):
        loss = F.mse_loss(layer(x), target)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert torch.equal(layer.weight[pruned], before[pruned])
    assert not torch.equal(layer.weight[~pruned], before[~pruned])


def test_evaluation_follows_changes_of_weight_and_mask():
    layer = MaskedLinear.from_dense(nn.Linear(40, 24), make_mask()).eval()
    x = torch.randn(6, 40)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: layer.weight.mul_(2),
            lambda: layer.mask.update(dense=torch.rand(24, 40) < 0.3),
            lambda: layer.load_state_dict(MaskedLinear(40, 24, make_mask()).state_dict()),
        ):
            change()
            for _ in range(2):
                torch.testing.assert_close(layer(x), layer.to_dense()(x))


@pytest.mark.parametrize("fused", [True, False])
def test_evaluation_follows_an_optimiser_that_raises_no_version(fused):
    layer = MaskedLinear.from_dense(nn.Linear(40, 24), torch.rand(24, 40) < 0.3)
    x = torch.randn(6, 40)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        layer.train()
        layer(x).square().sum().backward()
        optimiser.step()
        layer.eval()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_compiles_whole():
    layer = MaskedLinear(40, 24, make_mask())
    x = torch.randn(6, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_plan_names_a_kernel():
    layer = MaskedLinear(40, 24, make_mask())
    assert layer.plan(64)["kernel"] in ("dense", "tiles", "rows")
    assert "tile=(8, 8)" in repr(layer)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match=r"mask must be \[24, 40\]"):
        MaskedLinear(40, 24, TileMask((40, 24)))


def test_a_bool_tensor_is_a_mask_too() -> None:
    linear = torch.nn.Linear(40, 24)
    keep = torch.rand(24, 40) < 0.3
    layer = MaskedLinear.from_dense(linear, keep)
    x = torch.randn(5, 40)
    expected = torch.nn.functional.linear(x, linear.weight * keep, linear.bias)
    torch.testing.assert_close(layer(x), expected)
