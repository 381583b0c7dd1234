"""Non-local attention of tensors against float64: odd sizes, strides, dtypes, instruction sets."""

from __future__ import annotations

import pytest
import torch
from nonlocal_attention_checks import LAYOUTS, assert_as_exact_as_torch, operands, with_gradients

from rlnas_fast.errors import ConfigError, KernelUnavailable, ShapeError
from rlnas_fast.ops import nonlocal_attention
from rlnas_fast.ops.nonlocal_attention import KINDS, reference

pytestmark = pytest.mark.usefixtures("two_threads")

SIZES = [  # batch, depth, width, queries, keys
    (2, 16, 16, 49, 49),
    (1, 7, 5, 33, 1),
    (1, 1, 3, 1, 40),
    (5, 40, 24, 70, 20),
    (1, 24, 33, 100, 1300),
]


def check_attention(inputs: list[torch.Tensor], kind: str, backend: str = "auto") -> None:
    grad = torch.randn(inputs[0].shape[0], inputs[2].shape[1], inputs[0].shape[2])
    exact = with_gradients(
        lambda *t: reference.nonlocal_attention(*t, kind), [t.double() for t in inputs], grad.double()
    )
    plain = with_gradients(lambda *t: reference.nonlocal_attention(*t, kind), inputs, grad)
    ours = with_gradients(lambda *t: nonlocal_attention(*t, kind=kind, backend=backend), inputs, grad)
    assert_as_exact_as_torch(ours, plain, exact)


@pytest.mark.parametrize("size", SIZES)
def test_softmax_on_every_instruction_set(isa: str, size: tuple[int, ...]) -> None:
    check_attention(operands(size, "gaussian", torch.float32), "gaussian", "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_and_dtype(kind: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        check_attention(operands(size, kind, dtype), kind)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["embedded_gaussian", "concatenation"])
def test_any_strides(kind: str, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_attention(operands((3, 10, 12, 37, 21), kind, dtype, layout), kind)


@pytest.mark.parametrize("count", [40, 200], ids=["ranks by counting", "radix sort"])
def test_concatenation_of_ties_zeros_and_nan(isa: str, count: int) -> None:
    a, b, g = operands((2, 1, 5, count, count), "concatenation", torch.float32)
    a, b = (torch.round(each * 2) / 2 for each in (a, b))
    a[0, 0, 3] = torch.nan
    grad = torch.randn(2, 5, count)
    ours = with_gradients(lambda *t: nonlocal_attention(*t, kind="concatenation"), [a, b, g], grad)
    plain = with_gradients(
        lambda *t: reference.nonlocal_attention(*t, "concatenation"),
        [each.double() for each in (a, b, g)],
        grad.double(),
    )
    for mine, wanted in zip([each[1] for each in ours], [each[1] for each in plain], strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[0].isnan(), plain[0].isnan())


def test_logits_beyond_half_precision() -> None:
    theta = torch.full((1, 4, 3), 200.0).half()
    y = nonlocal_attention(theta, theta, torch.randn(1, 2, 3).half())
    assert y.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_spread_as_in_the_definition(value: float) -> None:
    theta, phi, g = operands((1, 4, 3, 20, 20), "gaussian", torch.float32)
    for index in range(3):
        inputs = [t.clone() for t in (theta, phi, g)]
        inputs[index][0, 1, 5] = value
        ours, plain = nonlocal_attention(*inputs), reference.nonlocal_attention(*inputs)
        assert torch.equal(ours.isnan(), plain.isnan())


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_and_no_query(kind: str) -> None:
    for size in [(0, 4, 3, 9, 9), (2, 4, 3, 0, 9)]:
        inputs = operands(size, kind, torch.float32)
        result, *gradients = with_gradients(
            lambda *t: nonlocal_attention(*t, kind=kind), inputs, torch.randn(size[0], size[2], size[3])
        )
        assert result.shape == (size[0], size[2], size[3])
        assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind: str) -> None:
    """In float64, which runs the same autograd function over plain PyTorch."""
    inputs = [t.double().requires_grad_() for t in operands((2, 3, 2, 5, 4), kind, torch.float32)]
    assert torch.autograd.gradcheck(lambda *t: nonlocal_attention(*t, kind=kind), inputs)


def test_second_derivative_is_refused() -> None:
    inputs = [t.requires_grad_() for t in operands((1, 2, 2, 3, 3), "gaussian", torch.float32)]
    y = nonlocal_attention(*inputs)
    (gradient,) = torch.autograd.grad(y.sum(), inputs[:1], create_graph=True)
    assert not gradient.requires_grad


def test_bad_input_names_the_argument() -> None:
    theta, phi, g = operands((2, 5, 6, 10, 7), "gaussian", torch.float32)
    cases = [
        ((theta[0], phi, g), ShapeError, "theta must be"),
        ((theta, phi[:, :4], g), ShapeError, "phi has 4 channels"),
        ((theta, phi, g[:1]), ShapeError, "g has batch 1"),
        ((theta, phi, g[..., :3]), ShapeError, "g has 3 positions"),
        ((theta, phi[..., :0], g[..., :0]), ShapeError, "at least 1"),
        ((theta, phi.half(), g), TypeError, "phi is torch.float16"),
        ((theta.long(), phi.long(), g.long()), TypeError, "theta is torch.int64"),
        ((theta, phi, g.to("meta")), ShapeError, "g is on meta"),
    ]
    for inputs, error, message in cases:
        with pytest.raises(error, match=message):
            nonlocal_attention(*inputs)
    with pytest.raises(ConfigError, match="did you mean 'dot_product'"):
        nonlocal_attention(theta, phi, g, kind="dotproduct")
    with pytest.raises(ShapeError, match="concatenation expects 1"):
        nonlocal_attention(theta, phi, g, kind="concatenation")
    with pytest.raises(ConfigError, match="unknown backend"):
        nonlocal_attention(theta, phi, g, backend="cpuu")
    with pytest.raises(KernelUnavailable, match="needs a tensor on cuda"):
        nonlocal_attention(theta, phi, g, backend="triton")
