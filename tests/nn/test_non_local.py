"""The module: identity when new, the paper's state dict, every kind and dimension, a folded BatchNorm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlnas_fast.errors import ConfigError, ShapeError
from rlnas_fast.nn.non_local import NonLocalBlock
from rlnas_fast.ops.nonlocal_attention import KINDS

pytestmark = pytest.mark.usefixtures("two_threads")

SPACES = {1: (11,), 2: (7, 6), 3: (3, 4, 5)}


def textbook(block: NonLocalBlock, x: torch.Tensor) -> torch.Tensor:
    """The block as section 3.3 of the paper draws it, on the module's own convolutions."""

    def pooled(features: torch.Tensor) -> torch.Tensor:
        pool = {1: nn.functional.max_pool1d, 2: nn.functional.max_pool2d, 3: nn.functional.max_pool3d}[
            block.dims
        ]
        return pool(features, block.subsample).flatten(2)

    theta = (x if block.kind == "gaussian" else block.theta(x)).flatten(2).mT
    phi = pooled(x if block.kind == "gaussian" else block.phi(x))
    g = pooled(block.g(x)).mT
    if block.kind == "concatenation":
        first = theta.mT.unsqueeze(3).expand(-1, -1, -1, phi.shape[2])
        second = phi.unsqueeze(2).expand(-1, -1, theta.shape[1], -1)
        f = torch.relu(block.concat_project(torch.cat([first, second], 1)).squeeze(1)) / phi.shape[2]
    elif block.kind == "dot_product":
        f = theta @ phi / phi.shape[2]
    else:
        f = torch.softmax(theta @ phi, -1)
    return block.W((f @ g).mT.reshape(x.shape[0], -1, *x.shape[2:])) + x


def shaken(block: NonLocalBlock) -> NonLocalBlock:
    """Random weights everywhere, so that nothing is zero."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
    return block


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", SPACES)
@pytest.mark.parametrize("subsample", [None, 2])
def test_equals_the_textbook_in_training(kind: str, dims: int, subsample: int | None) -> None:
    block = shaken(NonLocalBlock(6, kind=kind, subsample=subsample, dims=dims)).double()
    x = torch.randn(2, 6, *SPACES[dims], dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    names, parameters = zip(*[("x", x), *block.named_parameters()], strict=True)
    ours = torch.autograd.grad(block(x), parameters, grad)
    expected = torch.autograd.grad(textbook(block, x), parameters, grad)
    for name, mine, theirs in zip(names, ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_float32_kernels_in_training_and_evaluation(kind: str) -> None:
    block = shaken(NonLocalBlock(8, kind=kind, subsample=2))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 8, 9, 8).contiguous(memory_format=layout)
        for training in (True, False):
            block.train(training)
            z = block(x)
            assert z.is_contiguous(memory_format=layout)
            # The largest of float32's error over sums of 72 keys and 8 channels with values near 10.
            torch.testing.assert_close(z, textbook(block, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [True, False])
def test_new_block_is_the_identity(kind: str, norm: bool) -> None:
    x = torch.randn(2, 5, 4, 4)
    block = NonLocalBlock(5, kind=kind, norm=norm)
    assert torch.equal(block(x), x)
    assert torch.equal(block.eval()(x), x)


def test_state_dict_has_the_usual_layout() -> None:
    block = NonLocalBlock(8, 3, kind="concatenation")
    shapes = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    convolutions = {"g": (3, 8, 1, 1), "theta": (3, 8, 1, 1), "phi": (3, 8, 1, 1), "W.0": (8, 3, 1, 1)}
    for name, shape in convolutions.items():
        assert shapes.pop(f"{name}.weight") == shape
        assert shapes.pop(f"{name}.bias") == shape[:1]
    assert shapes.pop("concat_project.0.weight") == (1, 6, 1, 1)
    norm = {"W.1.weight", "W.1.bias", "W.1.running_mean", "W.1.running_var", "W.1.num_batches_tracked"}
    assert set(shapes) == norm
    assert "theta.weight" not in NonLocalBlock(8, kind="gaussian").state_dict()
    assert "W.weight" in NonLocalBlock(8, norm=False).state_dict()


def test_plan_says_what_runs_and_why() -> None:
    plan = NonLocalBlock(64).plan((16, 64, 14, 14))
    assert (plan.algorithm, plan.kernels) == ("fused-softmax", "cpu")
    assert plan.flops == 2 * 16 * (196 * 64 * 32 * 4 + 196 * 196 * 64)
    assert plan.bytes == 4 * (2 * 16 * 64 * 196 + 4 * 64 * 32)
    dot_product = NonLocalBlock(64, kind="dot_product", subsample=2)
    assert dot_product.plan((4, 64, 28, 28)).algorithm == "reassociated"
    assert dot_product.plan((4, 64, 28, 28), torch.float64).algorithm == "reassociated"
    assert dot_product.plan((4, 64, 4, 4), torch.float64).algorithm == "direct"
    gram = NonLocalBlock(64, kind="dot_product").plan((4, 64, 28, 28), torch.float64)
    assert (gram.algorithm, gram.flops) == ("gram", 2 * 4 * (2 * 784 * 64**2 + 3 * 32 * 64**2))
    assert "elements moved" in gram.reason
    assert NonLocalBlock(64, kind="concatenation").plan((4, 64, 28, 28)).algorithm == "sorted"
    assert NonLocalBlock(64).plan((1, 64, 4, 4), torch.float64).kernels == "torch"


def test_trains_under_autocast() -> None:
    block = shaken(NonLocalBlock(8))
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        block(x).float().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_one_channel_and_an_empty_batch() -> None:
    assert NonLocalBlock(1)(torch.randn(2, 1, 3, 3)).shape == (2, 1, 3, 3)
    assert NonLocalBlock(4, norm=False)(torch.randn(0, 4, 3, 3)).shape == (0, 4, 3, 3)


def test_bad_input() -> None:
    for options, message in [
        ({"kind": "gausian"}, "did you mean 'gaussian'"),
        ({"channels": 0}, "at least 1"),
        ({"inner_channels": 0}, "at least 1"),
        ({"dims": 4}, "dims=4"),
        ({"subsample": 0}, "subsample=0"),
        ({"subsample": (2, 2, 2)}, "subsample="),
    ]:
        with pytest.raises(ConfigError, match=message):
            NonLocalBlock(**{"channels": 4, **options})
    with pytest.raises(ShapeError, match="expected"):
        NonLocalBlock(4)(torch.randn(1, 5, 3, 3))
    with pytest.raises(ShapeError, match="leaves no key"):
        NonLocalBlock(4, subsample=2)(torch.randn(1, 4, 1, 1))
    block = NonLocalBlock(4, subsample=2)
    for shape, message in [
        ((1, 5, 8, 8), "expected"),
        ((1, 4, 8), "expected"),
        ((1, 4, 1, 8), "leaves no key"),
    ]:
        with pytest.raises(ShapeError, match=message):
            block.plan(shape)
    for x, error, message in [
        (torch.ones(1, 4, 8, 8).long(), TypeError, "x is torch"),
        (torch.ones(1, 4, 8, 8).double(), TypeError, "but x is torch"),
        (torch.ones(1, 4, 8, 8, device="meta"), ShapeError, "x is on meta"),
        (torch.ones(1, 4, 0, 8), ShapeError, "leaves no key"),
    ]:
        with pytest.raises(error, match=message):
            block(x)
