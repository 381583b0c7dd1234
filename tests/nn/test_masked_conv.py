"""Masked convolutions against the dense convolution with the masked weight."""

from __future__ import annotations

import pickle
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlnas_fast.errors import ConfigError, ShapeError
from rlnas_fast.nn.masked_conv import MaskedConv2d
from rlnas_fast.ops.masked_matmul import TileMask

pytestmark = pytest.mark.usefixtures("quick_cost_model")


@pytest.mark.parametrize("backend", ["auto", "unfold", "dense"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": 2},
        {"kernel_size": 3, "padding": "same"},
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_dense_convolution_of_the_masked_weight(backend, options, memory_format):
    convolution = nn.Conv2d(6, 10, **options)
    x = torch.randn(2, 6, 9, 8).to(memory_format=memory_format).requires_grad_()
    dense = torch.rand(10, convolution.weight[0].numel()) < 0.25
    layer = MaskedConv2d.from_dense(convolution, TileMask.from_dense(dense, (8, 8)), backend=backend)
    with torch.no_grad():
        convolution.weight.mul_(dense.view_as(convolution.weight))
    y, truth = layer(x), convolution(x)
    torch.testing.assert_close(y, truth)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(layer.to_dense()(x), truth)
    grad = torch.randn_like(truth)
    ours = torch.autograd.grad(y, (x, layer.weight), grad)
    wanted = torch.autograd.grad(truth, (x, convolution.weight), grad)
    torch.testing.assert_close(ours[0], wanted[0])
    torch.testing.assert_close(
        ours[1], wanted[1].flatten(1) * dense, rtol=1e-4, atol=1e-4
    )  # sums over 140 positions


def test_permutations_of_a_one_by_one_kernel_change_nothing():
    convolution, x = nn.Conv2d(12, 10, 1), torch.randn(2, 12, 5, 5)
    mask = TileMask(
        (10, 12), (4, 4), input_permutation=torch.randperm(12), output_permutation=torch.randperm(10)
    )
    for backend in ("auto", "dense"):
        layer = MaskedConv2d(convolution, mask, backend=backend)
        torch.testing.assert_close(layer(x), convolution(x))


def test_the_choice_follows_outputs_and_density_and_is_told():
    layer = MaskedConv2d(nn.Conv2d(2, 300, 3))
    assert layer.plan(100) == {"kernel": "dense convolution"}
    layer.mask.update(state=torch.zeros_like(layer.mask.state))
    assert layer.plan(100)["kernel"] in ("tiles", "rows", "dense")
    assert F.relu(layer(torch.randn(1, 2, 5, 5))).shape == (1, 300, 3, 3)


def test_state_dicts_round_trip_and_modules_compile():
    layer = MaskedConv2d(nn.Conv2d(8, 8, 3), TileMask.from_scores(torch.rand(8, 72), 0.2, (8, 8)))
    other = MaskedConv2d(nn.Conv2d(8, 8, 3), TileMask.from_scores(torch.rand(8, 72), 0.9, (8, 8)))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(other(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: MaskedConv2d(nn.Conv2d(8, 8, 3, groups=2)), ConfigError, "groups=2"),
        (lambda: MaskedConv2d(nn.Conv2d(8, 8, 3, padding_mode="reflect")), ConfigError, "reflect"),
        (lambda: MaskedConv2d(nn.Conv2d(8, 8, 3), backend="fft"), ConfigError, "'fft'"),
        (lambda: MaskedConv2d(nn.Conv2d(8, 8, 2, padding="same")), ConfigError, "odd"),
        (lambda: MaskedConv2d(nn.Conv2d(8, 8, 3), TileMask((8, 8))), ShapeError, "mask"),
        (
            lambda: MaskedConv2d(nn.Conv2d(1, 2, 2), TileMask((2, 4), input_permutation=torch.arange(4))),
            ConfigError,
            "1 x 1",
        ),
        (lambda: MaskedConv2d(nn.Conv2d(8, 8, 3))(torch.ones(8, 5, 5)), ShapeError, "x must be"),
    ],
)
def test_bad_input_is_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("faster", ["unfold", "dense"])
def test_in_evaluation_the_faster_way_is_kept_until_weight_or_mask_change(faster, monkeypatch):
    slow = "_convolved" if faster == "unfold" else "_unfolded"
    right, calls = getattr(MaskedConv2d, slow), []

    def slowed(self, *arguments):
        calls.append(slow)
        time.sleep(0.002)
        return right(self, *arguments)

    monkeypatch.setattr(MaskedConv2d, slow, slowed)
    layer = MaskedConv2d(nn.Conv2d(4, 6, 3), torch.rand(6, 36) < 0.5).eval()
    x = torch.randn(2, 4, 7, 7)
    with torch.no_grad():
        changes = (
            lambda: None,
            lambda: layer.weight.mul_(2),
            lambda: layer.mask.update(dense=torch.rand(6, 36) < 0.3),
            lambda: monkeypatch.setattr(torch, "get_num_threads", lambda: 7),  # times and packs anew
        )
        for change in changes:
            change()
            expected = layer.to_dense()(x)
            torch.testing.assert_close(layer(x), expected)
            timed = len(calls)
            torch.testing.assert_close(layer(x), expected)
            assert len(calls) == timed > 0
            calls.clear()
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))
