"""The non-local block against float64: every kind, dtype, layout, instruction set and choice of biases."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from nonlocal_attention_checks import (
    BLOCKS,
    LAYOUTS,
    assert_as_exact_as_torch,
    block_operands,
    check_block,
    laid_out,
    with_gradients,
)

from rlnas_fast.errors import ShapeError
from rlnas_fast.ops import nonlocal_block
from rlnas_fast.ops.nonlocal_attention import reference
from rlnas_fast.ops.nonlocal_attention.library_block import library_block

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("kind", ["gaussian", "embedded_gaussian"])
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_block_on_every_instruction_set(isa: str, case: tuple, kind: str) -> None:
    check_block(*block_operands(case, torch.float32), case[3], kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_any_strides(layout: str) -> None:
    kinds = ("gaussian", "embedded_gaussian")
    for case, dtype, kind in itertools.product(BLOCKS[1:6], (torch.float32, torch.bfloat16), kinds):
        x, weights = block_operands(case, dtype)
        check_block(laid_out(x, layout), weights, case[3], kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_block_in_half_precision(dtype: torch.dtype) -> None:
    for case, kind in itertools.product(BLOCKS, ("gaussian", "embedded_gaussian")):
        check_block(*block_operands(case, dtype), case[3], kind)


@pytest.mark.parametrize("kind", ["gaussian", "embedded_gaussian"])
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_bfloat16_on_every_instruction_set(isa: str, bias: bool, kind: str) -> None:
    for case in [((2, 32, 7, 7), 16, 16, 1), ((3, 20, 9, 5), 10, 12, 2), ((2, 64, 14, 14), 32, 32, (2, 1))]:
        x, weights = block_operands(case, torch.bfloat16, bias)
        last = laid_out(x, "channels last")
        check_block(last, weights, case[3], kind)
        check_block(x, weights, case[3], kind)
        check_block(last, weights, case[3], kind, residual=False)
        batch, channels, height, width = x.shape
        views = [
            ((batch, channels, height, width + 1), (..., slice(1, None))),
            ((batch, channels + 1, height, width), (slice(None), slice(1, None))),
        ]
        for shape, inside in views:
            wide = torch.full(shape, torch.nan, dtype=x.dtype).to(memory_format=torch.channels_last)
            check_block(wide[inside].copy_(x), weights, case[3], kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "embedded_gaussian"])
def test_softmax_kept_or_recomputed_on_every_instruction_set(isa: str, kind: str, dtype: torch.dtype) -> None:
    """Up to 256 positions keep their terms."""
    for space, pool in [((9, 13), 1), ((15, 16), (2, 1)), ((257,), 1)]:
        x, weights = block_operands(((2, 12, *space), 6, 10, pool), dtype)
        check_block(laid_out(x, "channels last"), weights, pool, kind)
    x, weights = block_operands(((1, 12, 14, 14), 6, 10, 1), dtype, bias=False)
    check_block(x, weights, 1, kind, residual=False)


@pytest.mark.parametrize("kind", ["gaussian", "embedded_gaussian", "dot_product"])
def test_rows_far_apart_on_every_instruction_set(isa: str, kind: str) -> None:
    """From 256 columns on, tall products copy the right operand side by side, wide ones the left by tiles."""
    tall = [((1, 36, 17, 17), 101, 97, 1), ((2, 36, 7, 8), 90, 89, 1), ((2, 259, 7, 8), 20, 30, 1)]
    for case in [*tall, ((1, 131, 6, 7), 90, 89, 1), ((2, 259, 3, 5), 20, 130, 1)]:
        x, weights = block_operands(case, torch.float32)
        check_block(laid_out(x, "channels last"), weights, 1, kind)


@pytest.mark.parametrize("positions", [999, 1025])
def test_gaussian_in_bfloat16_with_both_products_joined_or_not(positions: int) -> None:
    x, weights = block_operands(((2, 12, positions), 6, 10, 1), torch.bfloat16)
    check_block(laid_out(x, "channels last"), weights, 1, "gaussian")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_concatenation_on_every_instruction_set(isa: str, bias: bool, dtype: torch.dtype) -> None:
    """Few positions, whose ranks are counted, and more, sorted by radix; whole vectors of channels or not."""
    for case in [((3, 32, 7, 7), 16, 16, 1), ((2, 10, 9, 15), 5, 33, 1), ((1, 6, 3), 2, 50, 1)]:
        x, weights = block_operands(case, dtype, bias)
        check_block(x, weights, 1, "concatenation")
        check_block(laid_out(x, "sliced"), weights, 1, "concatenation")
        check_block(laid_out(x, "channels last"), weights, 1, "concatenation", residual=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_pair(dtype: torch.dtype) -> None:
    """By the kernel, which multiplies the pair into theta and phi itself, and around it."""
    x, weights = block_operands(((2, 6, 5, 4), 3, 4, 1), dtype)
    pair, grad = torch.randn(6).to(dtype), torch.randn(x.shape)

    def block(function, x, pair, *weights, **options):
        return function(
            x, *weights[:4], biases=weights[4:], pair=pair, kind="concatenation", pool=(1, 1), **options
        )

    inputs = [x, pair, *weights]
    plain = functools.partial(block, reference.nonlocal_block)
    exact = with_gradients(plain, [t.double() for t in inputs], grad.double())
    theirs = with_gradients(plain, inputs, grad)
    assert_as_exact_as_torch(
        with_gradients(functools.partial(block, nonlocal_block), inputs, grad), theirs, exact
    )
    spread = [torch.stack([each, each], -1)[..., 0] for each in inputs]  # no longer contiguous
    assert_as_exact_as_torch(
        with_gradients(functools.partial(block, nonlocal_block), spread, grad), theirs, exact
    )


@pytest.mark.parametrize("kind", ["embedded_gaussian", "dot_product"])
def test_biases_of_any_strides(kind: str) -> None:
    x, weights = block_operands(((2, 6, 5, 4), 4, 4, 1), torch.float32)
    weights[4:] = [torch.stack([each, torch.full_like(each, torch.nan)], -1)[..., 0] for each in weights[4:]]
    check_block(x, weights, 1, kind)


@pytest.mark.parametrize("kind", ["dot_product", "concatenation"])
def test_block_of_other_kinds(kind: str) -> None:
    for case in BLOCKS:
        check_block(*block_operands(case, torch.float32), case[3], kind)


def test_block_without_bias_or_residual() -> None:
    x, weights = block_operands(BLOCKS[1], torch.float32, bias=False)
    check_block(x, weights, 2, residual=False)
    x, weights = block_operands(BLOCKS[0], torch.float32)
    check_block(x, weights, 1, residual=False)


@pytest.mark.parametrize("kind", ["gaussian", "embedded_gaussian"])
def test_block_of_one_image_is_shared_by_all_threads(kind: str) -> None:
    case = ((1, 16, 20, 20), 8, 8, 2)
    check_block(*block_operands(case, torch.float32), 2, kind)
    check_block(*block_operands(case, torch.float32), 1, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"])
def test_gradients_of_weights_over_thousands_of_images_on_one_thread(kind: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    x, weights = block_operands(((4000, 32, 3, 5), 16, 16, 1), dtype)
    check_block(x, weights, 1, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_with_any_of_the_biases(dtype: torch.dtype) -> None:
    x, weights = block_operands(((2, 6, 4, 5), 4, 2, 1), dtype)
    for present in itertools.product([False, True], repeat=4):
        biases = tuple(b if there else None for b, there in zip(weights[4:], present, strict=True))
        leaves = [x, *weights[:4], *biases]
        double = [None if leaf is None else leaf.double() for leaf in leaves]
        ours, plain, exact = (
            function(*given[:5], biases=tuple(given[5:]), kind="embedded_gaussian", pool=(1, 1))
            for function, given in (
                (nonlocal_block, leaves),
                (reference.nonlocal_block, leaves),
                (reference.nonlocal_block, double),
            )
        )
        assert_as_exact_as_torch([ours], [plain], [exact])


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_block_around_a_library_core(bias: bool, layout: str) -> None:
    """What wide heads run on a GPU is plain PyTorch: the same function, here on a CPU."""
    for dtype, residual in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        x, weights = block_operands(((2, 20, 5, 7), 8, 8, 1), dtype, bias)
        x, grad = laid_out(x, layout), torch.randn(2, 20, 5, 7)

        def ours(x, theta, phi, g, out, *biases, residual=residual):
            return library_block(x, theta, phi, g, out, biases or (None,) * 4, residual)

        def plain(x, theta, phi, g, out, *biases, residual=residual):
            return reference.nonlocal_block(
                x, theta, phi, g, out, biases=biases or (None,) * 4, residual=residual
            )

        results = [
            with_gradients(ours, [x, *weights], grad),
            with_gradients(plain, [x, *weights], grad),
            with_gradients(plain, [t.double() for t in (x, *weights)], grad.double()),
        ]
        with torch.no_grad():
            torch.testing.assert_close(ours(x, *weights), results[0][0])
        if bias:  # softmax ignores phi's bias: its gradient is noise
            results = [each[:7] + each[8:] for each in results]
        assert_as_exact_as_torch(*results)


def test_only_some_gradients_wanted() -> None:
    x, weights = block_operands(BLOCKS[0], torch.float32)
    weights[2].requires_grad_()
    z = nonlocal_block(x, *weights[:4], biases=tuple(weights[4:]))
    (gradient,) = torch.autograd.grad(z.sum(), [weights[2]])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["embedded_gaussian", "dot_product", "concatenation"])
def test_empty_batch_of_the_block(kind: str, dtype: torch.dtype) -> None:
    x, weights = block_operands(((0, 8, 3, 3), 4, 4, 1), dtype)
    pair = torch.randn(8).to(dtype) if kind == "concatenation" else None
    result, *gradients = with_gradients(
        lambda x, *w: nonlocal_block(x, *w[:4], biases=w[4:], kind=kind, pair=pair),
        [x, *weights],
        torch.randn(0, 8, 3, 3),
    )
    assert result.shape == x.shape
    assert all(not gradient.any() for gradient in gradients)


def test_bad_block_input_names_the_argument() -> None:
    x, weights = block_operands(BLOCKS[0], torch.float32)
    theta, phi, g, out, *_ = weights
    cases = [
        ((x[0, 0], theta, phi, g, out), {}, ShapeError, "x must be"),
        ((x, theta[:, :3], phi, g, out), {}, ShapeError, "theta has shape"),
        ((x, theta, phi, g, out.T[:3].T), {}, ShapeError, "out has shape"),
        ((x, theta, phi, g.bfloat16(), out), {}, TypeError, "g is torch.bfloat16"),
        ((x, None, None, g, out), {}, ShapeError, "needs theta"),
        ((x, theta, phi, g.sum(), out), {}, ShapeError, "g must be a matrix"),
        ((x.long(), theta, phi, g, out), {}, TypeError, "expected float32"),
        ((x.to("meta"), theta, phi, g, out), {}, ShapeError, "theta is on cpu, but x is on meta"),
        ((x[:, :, :0], theta, phi, g, out), {}, ShapeError, "leaves no key"),
        ((x[:, :20], theta, phi, g, out), {}, ShapeError, "theta has shape"),
        ((x, theta, phi, g, out), {"biases": (None, None)}, ShapeError, "biases has 2 entries"),
        ((x, theta, phi, g, out), {"kind": "gaussian"}, ShapeError, "has no theta"),
        ((x, theta, phi, g, out), {"kind": "concatenation"}, ShapeError, "needs pair"),
        ((x, theta, phi, g, out), {"pair": theta[0]}, ShapeError, "has no pair"),
        ((x, theta, phi, g, out), {"pool": 8}, ShapeError, "leaves no key"),
        ((x, theta, phi, g, out), {"pool": 0}, ShapeError, "at least 1"),
        ((x, theta, phi, g, out), {"pool": 1.5}, TypeError, "pool is 1.5"),
        ((x, theta, phi, g, out), {"pool": (1, 1.5)}, TypeError, "whole numbers"),
        ((x, theta, phi, g, out), {"pool": (1, 1, 1)}, ShapeError, "pool has 3 sizes"),
        ((x, theta, phi, g, out), {"biases": (g[0], None, None, None)}, ShapeError, "the bias of theta"),
    ]
    for inputs, options, error, message in cases:
        with pytest.raises(error, match=message):
            nonlocal_block(*inputs, **options)
