"""Which layers can be compressed, and masks laid over their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rlnas_fast.compression.compressed import Compressed
from rlnas_fast.compression.layers import (
    INT8,
    KEEP,
    Layout,
    Skipped,
    bits,
    digest,
    effective,
    kept,
    masked,
    prunable,
)
from rlnas_fast.errors import ConfigError, ShapeError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.norm(self.second(self.first(x))))


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def test_linear_layers_and_convolutions_in_order() -> None:
    found = prunable(small())
    assert [layer.name for layer in found] == ["0", "3"]
    assert found.total == 36 + 1440
    assert [tuple(layer.matrix.shape) for layer in found] == [(4, 9), (10, 144)]


def test_what_is_left_alone_is_listed_with_its_reason() -> None:
    found = prunable(Tied())
    assert [layer.name for layer in found] == ["third"]
    reasons = {entry.name: entry.reason for entry in found.skipped}
    assert reasons["first"] == "shares its weight with 'second'"
    assert reasons["second"] == "shares its weight with 'first'"
    assert "BatchNorm1d" in reasons["norm"]


class Scale(nn.Module):
    """A type that is nobody's but the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 8))


class Normalised(nn.Linear):
    """Reads its weight in a way of its own."""


@pytest.mark.parametrize("make", [Scale, lambda: Normalised(8, 8), lambda: nn.Conv1d(8, 8, 1)])
def test_layers_of_unknown_type_are_left_alone_and_listed(make: Callable[[], nn.Module]) -> None:
    unknown = make()
    model = nn.Sequential(nn.Linear(8, 8), unknown, nn.Linear(8, 4))
    found, before = prunable(model), unknown.weight.detach().clone()
    reason = f"is a {type(unknown).__name__}, not nn.Linear or nn.Conv2d"
    assert [layer.name for layer in found] == ["0", "2"]
    assert found.skipped == (Skipped("1", reason),)
    nothing = {name: torch.zeros_like(weight).bool() for name, weight in found.weights.items()}
    compressed = Compressed.of(model, nothing).to_dense()
    assert not compressed[0].weight.any()
    assert torch.equal(compressed[1].weight, before)
    with pytest.raises(ConfigError, match="a mask names '1', which is not a layer that can be compressed"):
        Compressed.of(model, {"1": before > 0})
    with pytest.raises(ConfigError, match=rf"no layer that can be compressed \(0: {reason}\)"):
        prunable(nn.Sequential(unknown))


def test_views_of_one_weight_are_shared_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = nn.Parameter(model[0].weight.detach().view(4, 4))
    assert [layer.name for layer in prunable(model)] == ["2"]


def test_views_that_overlap_are_shared_and_neighbours_in_one_storage_are_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    vector = torch.randn(48)

    def place(*starts: int) -> list[str]:
        for layer, start in zip(model, starts, strict=True):
            layer.weight = nn.Parameter(vector[start : start + 16].view(4, 4))
        return [layer.name for layer in prunable(model)]

    assert place(0, 16, 32) == ["0", "1", "2"]
    assert place(0, 15, 32) == ["2"]
    assert place(0, 0, 16) == ["2"]
    model[1].bias = nn.Parameter(vector[20:24])
    assert place(24, 0, 8 + 32 - 16) == ["1"]
    assert place(16, 0, 32) == ["1", "2"]


def test_a_model_without_a_prunable_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no layer that can be compressed .*groups"):
        prunable(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)))
    with pytest.raises(ConfigError, match="it has no parameters"):
        prunable(nn.Sequential(nn.ReLU()))


def test_nan_weights_are_refused_by_name() -> None:
    model = small()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="layer '3' has weights that are NaN"):
        prunable(model)


@pytest.mark.parametrize("int8", [False, True])
def test_masked_restores_every_bit_even_after_an_error(int8: bool) -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = {layer.name: torch.rand(layer.weight.shape) < 0.5 for layer in prunable(model)}
    if int8:
        masks = {name: mask.to(torch.uint8) * INT8 for name, mask in masks.items()}

    def fails() -> None:
        with masked(model, masks):
            assert bool((model[3].weight[masks["3"] == 0] == 0).all())
            assert bool((model[3].weight != before["3.weight"]).any())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_mask_of_another_shape_changes_nothing() -> None:
    model = small()
    before = model[0].weight.clone()
    masks = {"0": torch.zeros(4, 1, 3, 3, dtype=torch.bool), "3": torch.zeros(3, 3, dtype=torch.bool)}
    with pytest.raises(ShapeError, match=r"mask of '3' must be \[10, 144\]"), masked(model, masks):
        pass
    assert torch.equal(model[0].weight, before)


def test_int8_weights_are_rounded_with_one_scale_a_tile_and_straight_through() -> None:
    weight = torch.randn(6, 10, requires_grad=True)
    states = torch.full((6, 10), KEEP, dtype=torch.uint8)
    states[:4, :4] = INT8
    left = effective("x", weight, states, Layout((4, 4)))
    scale = weight[:4, :4].abs().max() / 127
    torch.testing.assert_close(left[:4, :4], (weight[:4, :4] / scale).round() * scale)
    assert torch.equal(left[4:], weight[4:])
    assert not torch.equal(left[:4, :4], weight[:4, :4])
    left.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_a_tile_is_int8_as_a_whole() -> None:
    states = torch.full((4, 4), KEEP, dtype=torch.uint8)
    states[0, 0] = INT8
    with pytest.raises(ConfigError, match="layer 'x': a tile holds int8 weights beside"):
        Layout((4, 4)).mask("x", states)


def test_orders_say_what_lies_in_a_tile() -> None:
    rows, columns = torch.randperm(8), torch.randperm(12)
    layout = Layout((4, 4), {"x": (rows, columns)})
    matrix = torch.randn(8, 12)
    assert torch.equal(layout.untiled("x", layout.tiled("x", matrix)), matrix)
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[rows[:4, None], columns[None, :4]] = True
    made = layout.mask("x", mask)
    assert made.nonzeros() == 16
    assert made.tensors.bits is None, "a complete tile needs no bits"
    assert made.state.flatten().tolist() == [1, 0, 0, 0, 0, 0]


def test_bits_and_digests() -> None:
    mask = torch.tensor([[0, 1, 2, 2]], dtype=torch.uint8)
    assert (kept({"x": mask}), bits({"x": mask})) == (3, 48)
    assert digest({"x": mask}) == digest({"x": mask.clone()})
    assert digest({"x": mask}) != digest({"x": mask.flip(1)})
    assert digest({"x": mask != 0}) == digest({"x": (mask != 0).to(torch.uint8)})
