"""Non-local attention and its block against float64: odd sizes, strides, dtypes, instruction sets."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlnas_fast.errors import ConfigError, KernelUnavailable, ShapeError
from rlnas_fast.ops import nonlocal_attention, nonlocal_block
from rlnas_fast.ops.nonlocal_attention import KINDS, cpu, dot_product, reference
from rlnas_fast.ops.nonlocal_attention.dot_product import (
    dot_product_algorithm,
    gram_block,
    reassociated_block,
)
from rlnas_fast.ops.nonlocal_attention.library_block import library_block

SIZES = [  # batch, depth, width, queries, keys
    (2, 16, 16, 49, 49),
    (1, 7, 5, 33, 1),
    (1, 1, 3, 1, 40),
    (5, 40, 24, 70, 20),
    (1, 24, 33, 100, 1300),
]
LAYOUTS = ["channels first", "channels last", "sliced", "expanded", "misaligned"]


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values behind other strides; what lies around them is NaN."""
    if layout == "channels last":
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "sliced":
        wide = torch.full([size * 2 + 1 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "misaligned":
        flat = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)
        return flat[1:].view(tensor.shape).copy_(tensor)
    return tensor


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that reading what was never written shows."""
    kept = [torch.full((size,), torch.nan) for size in (64, 1024, 16_384, 262_144)]
    del kept


def operands(
    size: tuple[int, ...], kind: str, dtype: torch.dtype, layout: str = "channels first"
) -> list[torch.Tensor]:
    batch, depth, width, queries, keys = size
    depth = 1 if kind == "concatenation" else depth
    shapes = [(batch, depth, queries), (batch, depth, keys), (batch, width, keys)]
    return [laid_out(torch.randn(shape).to(dtype), layout) for shape in shapes]


def with_gradients(
    function, inputs: list[torch.Tensor], grad: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The result and the gradient of every input."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    poison()
    result = function(*leaves)
    poison()
    gradients = torch.autograd.grad(result, leaves, grad.to(result.dtype))
    return [result.detach(), *gradients]


def assert_as_exact_as_torch(
    ours: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]
) -> None:
    """Our error against float64 is at most twice that of plain PyTorch in the same dtype.

    That is flash-attention's rule.  The floor, 6 roundings of the largest value in the norm of the whole, is
    for results of a few elements that plain PyTorch happens to get almost exactly, such as a bias's gradient.
    """
    scale = max(tensor.abs().max().item() for tensor in exact if tensor.numel())
    for index, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.shape == truth.shape
        assert mine.dtype == theirs.dtype
        error, allowed = ((each.double() - truth).norm().item() for each in (mine, theirs))
        floor = 6 * torch.finfo(mine.dtype).eps * scale
        assert error <= 2 * allowed + floor, f"result {index}: error {error:.2e}, plain PyTorch {allowed:.2e}"


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


BLOCKS = [  # shape of x, inner, value, pool
    ((2, 32, 7, 7), 16, 16, 1),
    ((3, 20, 9, 6), 10, 12, 2),
    ((1, 24, 13, 14), 12, 12, (3, 2)),
    ((2, 3, 17), 2, 5, 2),
    ((1, 1, 5), 1, 1, 1),
    ((2, 10, 3, 4, 5), 5, 7, (1, 2, 2)),
    ((5, 40, 2, 2), 40, 33, 1),
]


def block_operands(
    case: tuple, dtype: torch.dtype, bias: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    shape, inner, value, _ = case
    channels = shape[1]
    sizes = [(inner, channels), (inner, channels), (value, channels), (channels, value)]
    weights = [torch.randn(size).div(size[1] ** 0.5).to(dtype) for size in sizes]
    biases = [torch.randn(size[0]).to(dtype) for size in sizes] if bias else []
    return torch.randn(shape).to(dtype), weights + biases


def check_block(
    x: torch.Tensor, weights: list[torch.Tensor], pool, kind: str = "embedded_gaussian", **options
) -> None:
    if kind == "gaussian":
        return check_gaussian_block(x, weights, pool, **options)
    pair = torch.randn(2 * weights[0].shape[0]).to(x.dtype) if kind == "concatenation" else None

    def ours(x, theta, phi, g, out, *biases):
        biases = biases or (None,) * 4
        return nonlocal_block(
            x, theta, phi, g, out, biases=biases, pair=pair, kind=kind, pool=pool, **options
        )

    def plain(x, theta, phi, g, out, *biases):
        windows = (pool,) * (x.dim() - 2) if isinstance(pool, int) else pool
        return reference.nonlocal_block(
            x, theta, phi, g, out, biases=biases or (None,) * 4, kind=kind, pool=windows,
            pair=None if pair is None else pair.to(x.dtype), residual=options.get("residual", True),
        )  # fmt: skip

    grad = torch.randn(x.shape)
    inputs = [x, *weights]
    exact = with_gradients(plain, [t.double() for t in inputs], grad.double())
    results = [with_gradients(ours, inputs, grad), with_gradients(plain, inputs, grad), exact]
    if kind == "embedded_gaussian" and len(weights) == 8:  # softmax ignores phi's bias: its gradient is noise
        assert results[0][7].norm() < 1e-2 * (1 + results[0][6].norm())
        results = [each[:7] + each[8:] for each in results]
    assert_as_exact_as_torch(*results)


def check_gaussian_block(x: torch.Tensor, weights: list[torch.Tensor], pool, **options) -> None:
    """Of the weights those of g and W_z; x is halved so that no position has all the weight."""
    windows = (pool,) * (x.dim() - 2) if isinstance(pool, int) else pool

    def block(function, x, g, out, g_bias=None, out_bias=None):
        biases, pool = (None, None, g_bias, out_bias), windows
        return function(x, None, None, g, out, biases=biases, kind="gaussian", pool=pool, **options)

    inputs, grad = [x * 0.5, *weights[2:4], *weights[6:]], torch.randn(x.shape)
    plain = functools.partial(block, reference.nonlocal_block)
    exact = with_gradients(plain, [t.double() for t in inputs], grad.double())
    ours = with_gradients(functools.partial(block, nonlocal_block), inputs, grad)
    assert_as_exact_as_torch(ours, with_gradients(plain, inputs, grad), exact)


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


@pytest.mark.parametrize("positions", [999, 1025])
def test_gaussian_in_bfloat16_with_both_products_joined_or_not(positions: int) -> None:
    x, weights = block_operands(((2, 12, positions), 6, 10, 1), torch.bfloat16)
    check_block(laid_out(x, "channels last"), weights, 1, "gaussian")


def test_memory_kept_for_the_backward_is_linear_in_positions() -> None:
    """Terms of at most 256 keys a position, and none beyond."""

    def floats(side: int) -> int:
        return cpu.saved_size("embedded_gaussian", (1, 64, side, side), 32, 32, (1, 1))

    row = 4 * 32 + 1  # theta, phi, g, their mean, and the log-sum-exp
    assert floats(16) == 256 * (row + cpu.KEPT)
    assert floats(32) == 1024 * row


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_concatenation_on_every_instruction_set(isa: str, bias: bool, dtype: torch.dtype) -> None:
    """Few positions, whose ranks are counted, and more, sorted by radix; whole vectors of channels or not."""
    for case in [((3, 32, 7, 7), 16, 16, 1), ((2, 10, 9, 15), 5, 33, 1), ((1, 6, 3), 2, 50, 1)]:
        x, weights = block_operands(case, dtype, bias)
        check_block(x, weights, 1, "concatenation")
        check_block(laid_out(x, "sliced"), weights, 1, "concatenation")
        check_block(laid_out(x, "channels last"), weights, 1, "concatenation", residual=False)


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


def test_call_by_call_other_layouts_and_settings() -> None:
    """What is remembered of one call does not leak into the next."""
    for case in [*BLOCKS[:3], *BLOCKS[:3]]:
        for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("channels first", "sliced")):
            x, weights = block_operands(case, dtype)
            check_block(laid_out(x, layout), weights, case[3])
            check_block(laid_out(x, layout), weights, case[3], residual=False)
    x, weights = block_operands(BLOCKS[0], torch.float32)
    nonlocal_block(x, *weights[:4])
    with pytest.raises(KernelUnavailable):
        nonlocal_block(x, *weights[:4], backend="triton")
    with pytest.raises(ShapeError, match="the bias of theta"):
        nonlocal_block(x, *weights[:4], biases=(weights[0], None, None, None))


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


def test_a_kept_graph_can_be_run_again() -> None:
    x, weights = block_operands(((2, 6, 4, 4), 3, 3, 1), torch.float64, bias=False)
    leaves = [tensor.requires_grad_() for tensor in (x, *weights)]
    none = (None,) * 4
    for z in (
        library_block(*leaves, none, True),
        gram_block(*leaves, none, True),
        reassociated_block(*leaves, none, True, (2, 2)),
    ):
        first, again = (torch.autograd.grad(z.sum(), leaves, retain_graph=True) for _ in range(2))
        for one, other in zip(first, again, strict=True):
            torch.testing.assert_close(one, other)


def test_a_remembered_route_still_refuses_bad_input() -> None:
    x, weights = block_operands(BLOCKS[0], torch.float32, bias=False)
    for _ in range(2):
        nonlocal_block(x, *weights)
        with pytest.raises(TypeError, match="g is torch"):
            nonlocal_block(x, *weights[:2], weights[2].double(), weights[3])
        with pytest.raises(ShapeError, match="leaves no key"):
            nonlocal_block(x, *weights, pool=8)
    assert nonlocal_block(x, *weights, backend="reference").shape == x.shape


def test_only_some_gradients_wanted() -> None:
    x, weights = block_operands(BLOCKS[0], torch.float32)
    weights[2].requires_grad_()
    z = nonlocal_block(x, *weights[:4], biases=tuple(weights[4:]))
    (gradient,) = torch.autograd.grad(z.sum(), [weights[2]])
    assert gradient.isfinite().all()


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


@pytest.mark.parametrize("kind", ["embedded_gaussian", "dot_product", "concatenation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 16, 12, 12), (16, 16, 7, 7)], ids=str)
def test_deterministic_run_to_run(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    x, weights = block_operands((shape, 8, 8, 1), dtype)
    grad = torch.randn(x.shape).to(dtype)
    pair = torch.randn(16).to(dtype) if kind == "concatenation" else None

    def block(x: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return nonlocal_block(x, *w[:4], biases=w[4:], kind=kind, pair=pair)

    torch.use_deterministic_algorithms(True)
    try:
        runs = [with_gradients(block, [x, *weights], grad) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_linear_in_positions(kind: str) -> None:
    """At N = 8100 one N x N matrix of float32 is 262 MB; all that the block needs is below 40 MB."""
    x, weights = block_operands(((1, 16, 90, 90), 8, 8, 1), torch.float32, bias=False)
    leaves = [tensor.requires_grad_() for tensor in (x, *weights)]
    pair = torch.randn(16) if kind == "concatenation" else None

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

    if kind == "gaussian":
        leaves[1:3] = None, None
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    nonlocal_block(*leaves, pair=pair, kind=kind).sum().backward()
    assert resident("VmHWM") - before < 40e6


def test_operators_follow_their_schema() -> None:
    theta, phi, g = operands((2, 5, 6, 10, 7), "gaussian", torch.float32, "channels last")
    torch.library.opcheck(torch.ops.rlnas_fast.nonlocal_attention.default, (theta, phi, g, "auto"))
    y, lse = torch.ops.rlnas_fast.nonlocal_attention.default(theta, phi, g, "auto")
    backward = (torch.randn_like(y), theta, phi, g, y, lse, "auto")
    torch.library.opcheck(torch.ops.rlnas_fast.nonlocal_attention_backward.default, backward)
    for kind, save in itertools.product(("gaussian", "embedded_gaussian", "dot_product"), (False, True)):
        x, weights = block_operands(((2, 6, 5, 4), 3, 4, 2), torch.float32)
        if kind == "gaussian":
            weights[:2] = weights[4:6] = None, None
        block = (x, *weights, [2, 2], True, save, kind)
        torch.library.opcheck(torch.ops.rlnas_fast.nonlocal_block.default, block)
    z, saved = torch.ops.rlnas_fast.nonlocal_block.default(*block)
    torch.library.opcheck(
        torch.ops.rlnas_fast.nonlocal_block_backward.default,
        (torch.randn_like(z), x, *weights, saved, [2, 2], True, "dot_product"),
    )
    rows = (torch.randn(2, 5), torch.randn(2, 4), torch.randn(2, 4, 3))
    torch.library.opcheck(torch.ops.rlnas_fast.concatenation_attention.default, rows)
    torch.library.opcheck(
        torch.ops.rlnas_fast.concatenation_attention_backward.default, (torch.randn(2, 5, 3), *rows)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind: str) -> None:
    """In float64, which runs the same autograd function over plain PyTorch."""
    inputs = [t.double().requires_grad_() for t in operands((2, 3, 2, 5, 4), kind, torch.float32)]
    assert torch.autograd.gradcheck(lambda *t: nonlocal_attention(*t, kind=kind), inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "dtype", "channels", "pool"),
    [
        ("embedded_gaussian", torch.float32, 6, 1),
        ("dot_product", torch.float32, 6, 1),
        ("dot_product", torch.float64, 6, 1),
        ("dot_product", torch.float64, 6, 2),
        ("dot_product", torch.bfloat16, 64, 1),
    ],
)
def test_compiles_into_one_graph_with_dynamic_shapes(
    kind: str, dtype: torch.dtype, channels: int, pool: int
) -> None:
    def step(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return nonlocal_block(x, *weights[:4], biases=weights[4:], kind=kind, pool=pool).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for side in (4, 6):
        x, weights = block_operands(((2, channels, side, side), 3, 4, pool), dtype)
        grad = torch.randn(x.shape)
        found = with_gradients(compiled, [x, *weights], grad)
        plain = with_gradients(step, [x, *weights], grad)
        if dtype == torch.bfloat16:  # another order than the eager one: as exact, not the same
            exact = with_gradients(step, [t.double() for t in (x, *weights)], grad.double())
            assert_as_exact_as_torch(found, plain, exact)
            continue
        for mine, wanted in zip(found, plain, strict=True):
            torch.testing.assert_close(mine, wanted)


def test_autocast_runs_in_its_dtype() -> None:
    x, weights = block_operands(BLOCKS[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert nonlocal_block(x, *weights[:4]).dtype == torch.bfloat16
        assert nonlocal_attention(*operands(SIZES[0], "gaussian", torch.float32)).dtype == torch.bfloat16


def test_flops_are_counted() -> None:
    theta, phi, g = operands((2, 5, 6, 10, 7), "gaussian", torch.float32)
    with FlopCounterMode(display=False) as counter:
        nonlocal_attention(theta, phi, g)
    assert counter.get_total_flops() == 2 * 2 * 10 * 7 * (5 + 6)
    x, weights = block_operands(((2, 8, 5), 4, 4, 1), torch.float32, bias=False)
    with FlopCounterMode(display=False) as counter:
        nonlocal_block(x.requires_grad_(), *weights).sum().backward()
    forward = 2 * 2 * (5 * 8 * 16 + 5 * 5 * 8)
    assert counter.get_total_flops() == forward + 2 * 2 * (2 * 5 * 8 * 16 + 5 * 5 * 20)


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
