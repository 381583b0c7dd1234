"""What PyTorch expects of an operator: schema, one graph, autocast, determinism, memory, no stale state."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from nonlocal_attention_checks import (
    BLOCKS,
    assert_as_exact_as_torch,
    block_operands,
    check_block,
    laid_out,
    operands,
    with_gradients,
)
from torch.utils.flop_counter import FlopCounterMode

from rlnas_fast.errors import KernelUnavailable, ShapeError
from rlnas_fast.ops import nonlocal_attention, nonlocal_block
from rlnas_fast.ops.nonlocal_attention import KINDS, cpu
from rlnas_fast.ops.nonlocal_attention.dot_product import gram_block, reassociated_block
from rlnas_fast.ops.nonlocal_attention.library_block import library_block

pytestmark = pytest.mark.usefixtures("two_threads")


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


def test_a_remembered_route_still_refuses_bad_input() -> None:
    x, weights = block_operands(BLOCKS[0], torch.float32, bias=False)
    for _ in range(2):
        nonlocal_block(x, *weights)
        with pytest.raises(TypeError, match="g is torch"):
            nonlocal_block(x, *weights[:2], weights[2].double(), weights[3])
        with pytest.raises(ShapeError, match="leaves no key"):
            nonlocal_block(x, *weights, pool=8)
    assert nonlocal_block(x, *weights, backend="reference").shape == x.shape


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


def test_memory_kept_for_the_backward_is_linear_in_positions() -> None:
    """Terms of at most 256 keys a position, and none beyond."""

    def floats(side: int) -> int:
        return cpu.saved_size("embedded_gaussian", (1, 64, side, side), 32, 32, (1, 1))

    row = 4 * 32 + 1  # theta, phi, g, their mean, and the log-sum-exp
    assert floats(16) == 256 * (row + cpu.KEPT)
    assert floats(32) == 1024 * row


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
    for stance, space in (("default", (5, 8)), ("fail_on_recompile", (7, 11))):  # sizes that nothing else has
        x, weights = block_operands(((2, channels, *space), 3, 4, pool), dtype)
        grad = torch.randn(x.shape)
        with torch.compiler.set_stance(stance):
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
        y = nonlocal_attention(*operands((2, 16, 16, 49, 49), "gaussian", torch.float32))
        assert y.dtype == torch.bfloat16


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
