"""The dot-product block: its kernel for pairs of bfloat16, and its forms that reassociate the products."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from nonlocal_attention_checks import (
    BLOCKS,
    assert_as_exact_as_torch,
    block_operands,
    check_block,
    laid_out,
    with_gradients,
)

from rlnas_fast.ops import nonlocal_block
from rlnas_fast.ops.nonlocal_attention import dot_product, reference
from rlnas_fast.ops.nonlocal_attention.dot_product import (
    dot_product_algorithm,
    gram_block,
    reassociated_block,
)

pytestmark = pytest.mark.usefixtures("two_threads")

PAIRS = [  # even channel counts and several images, which the kernel for bfloat16 pairs serves; then not
    ((2, 64, 7, 5), 32, 32, 1),
    ((3, 20, 9, 5), 10, 12, 2),
    ((2, 66, 3, 4, 5), 34, 30, (1, 2, 2)),
    ((2, 2, 1), 2, 2, 1),
    ((4, 130, 6), 6, 70, 1),
    ((2, 7, 5, 4), 4, 6, 2),
    ((1, 8, 5, 4), 4, 6, 1),
]


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_dot_product_in_bfloat16_on_every_instruction_set(isa: str, case: tuple, bias: bool) -> None:
    x, weights = block_operands(case, torch.bfloat16, bias)
    for layout in ("channels first", "channels last", "sliced", "misaligned"):
        check_block(laid_out(x, layout), weights, case[3], "dot_product", backend="cpu")
    check_block(x, weights, case[3], "dot_product", residual=False, backend="cpu")


def test_plain_products_only_where_the_kernel_for_pairs_does_not_serve(monkeypatch) -> None:
    monkeypatch.setattr(dot_product, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(dot_product, "_threads", lambda: 4)

    def plain(shape, inner=64, width=64, dtype=torch.bfloat16) -> bool:
        return dot_product.plain_is_faster(shape, inner, width, dtype, pooled=False)

    assert not plain((4, 128, 7, 7))
    assert plain((3, 128, 7, 7))  # a thread would be idle
    assert plain((4, 127, 7, 7))
    assert plain((4, 128, 7, 7), inner=63)
    assert plain((4, 128, 7, 7), width=63)
    assert not plain((4, 32, 7, 7), inner=15)  # so few channels that converting costs less
    assert not plain((1, 128, 7, 7), dtype=torch.float32)


def plain_dot_product(x, theta, phi, g, out, *biases, residual=True, pool=1):
    windows = (pool,) * (x.dim() - 2) if isinstance(pool, int) else pool
    biases = biases or (None,) * 4
    options = {"kind": "dot_product", "residual": residual, "pool": windows}
    return reference.nonlocal_block(x, theta, phi, g, out, biases=biases, **options)


def gram_form(x, theta, phi, g, out, *biases, residual=True, pool=1):
    return gram_block(x, theta, phi, g, out, biases or (None,) * 4, residual)


def reassociated_form(x, theta, phi, g, out, *biases, residual=True, pool=1):
    windows = (pool,) * (x.dim() - 2) if isinstance(pool, int) else pool
    return reassociated_block(x, theta, phi, g, out, biases or (None,) * 4, residual, windows)


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [gram_form, reassociated_form])
def test_forms_of_the_dot_product_block(form, dtype: torch.dtype, layout: str) -> None:
    for case, bias, residual in itertools.product(BLOCKS[:6], (True, False), (True, False)):
        if form is gram_form and case[3] != 1:
            continue
        x, weights = block_operands(case, dtype, bias)
        inputs, grad = [laid_out(x, layout), *weights], torch.randn(x.shape)
        options = {"residual": residual, "pool": case[3]}
        wanted = functools.partial(plain_dot_product, **options)
        exact = with_gradients(wanted, [t.double() for t in inputs], grad.double())
        plain = with_gradients(wanted, inputs, grad)
        assert_as_exact_as_torch(
            with_gradients(functools.partial(form, **options), inputs, grad), plain, exact
        )


@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("form", [gram_block, functools.partial(reassociated_block, windows=(1, 1))])
def test_forms_with_any_of_the_biases(form, present: tuple[bool, ...]) -> None:
    x, weights = block_operands(((2, 5, 3, 4), 3, 2, 1), torch.float64)
    leaves = [x, *weights[:4], *(b for b, there in zip(weights[4:], present, strict=True) if there)]

    def spread(given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        rest = iter(given)
        return [next(rest) if there else None for there in present]

    grad = torch.randn(x.shape, dtype=torch.float64)
    ours = with_gradients(
        lambda x, *w: form(x, *w[:4], biases=tuple(spread(w[4:])), residual=True), leaves, grad
    )
    plain = with_gradients(lambda x, *w: plain_dot_product(x, *w[:4], *spread(w[4:])), leaves, grad)
    for mine, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_new_gram_block_is_the_identity() -> None:
    x, weights = block_operands(((2, 6, 5, 4), 3, 3, 1), torch.bfloat16, bias=False)
    weights[3].zero_()
    assert torch.equal(gram_block(x, *weights, (None,) * 4, True), x)


@pytest.mark.parametrize("form", ["gram", "reassociated", "direct"])
def test_dot_product_saves_nothing_of_all_pairs(form: str) -> None:
    """float64 has no kernel of its own, so the block runs in the plain products of each form."""
    shape, pool = {
        "gram": ((1, 8, 40, 40), 1),
        "reassociated": ((1, 8, 40, 40), 2),
        "direct": ((1, 96, 6, 6), 1),
    }[form]
    x, weights = block_operands((shape, shape[1] // 2, shape[1] // 2, pool), torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, *weights)]
    chosen = dot_product_algorithm(shape, shape[1] // 2, shape[1] // 2, (pool, pool), "cpu")[0]
    saved: list[tuple[int, ...]] = []
    positions = shape[2] * shape[3]
    keys = positions // pool**2
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        z = nonlocal_block(*leaves[:5], biases=tuple(leaves[5:]), kind="dot_product", pool=pool)
    assert chosen == form
    assert not any(
        {positions, keys} <= set(each[-2:]) and each[-1] * each[-2] == positions * keys for each in saved
    )
    exact = reference.nonlocal_block(
        *leaves[:5], biases=tuple(leaves[5:]), kind="dot_product", pool=(pool, pool)
    )
    for mine, wanted in zip(
        torch.autograd.grad(z.square().sum(), leaves),
        torch.autograd.grad(exact.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted)
