"""Memory that a forward keeps for its backward goes from each holder to the next, and to nobody before."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from nonlocal_attention_checks import block_operands

from rlnas_fast.ops import native, nonlocal_block
from rlnas_fast.ops.nonlocal_attention import cpu

pytestmark = pytest.mark.usefixtures("two_threads")

CALLS: Any = native.torch_calls()
assert CALLS is not None, native.torch_calls_unavailable_reason()
FLOATS = CALLS.LENT_FROM + 5


def test_memory_goes_from_one_holder_to_the_next() -> None:
    first = CALLS.lent(FLOATS)
    assert first.shape == (FLOATS,)
    assert first.dtype == torch.float32
    assert first.data_ptr() % 64 == 0
    address = first.data_ptr()
    del first
    assert CALLS.lent(FLOATS).data_ptr() == address


def test_memory_that_a_view_holds_is_lent_to_nobody_else() -> None:
    whole = CALLS.lent(FLOATS)
    part = whole[3:9].fill_(7)
    address = whole.data_ptr()
    del whole
    other = CALLS.lent(FLOATS).fill_(0)
    assert other.data_ptr() != address
    assert part.tolist() == [7] * 6


def test_threads_never_hold_the_same_memory() -> None:
    failures: list[int] = []

    def holder(mark: int) -> None:
        for _ in range(20):
            held = CALLS.lent(FLOATS).fill_(mark)
            if not bool((held == mark).all()):
                failures.append(mark)

    threads = [threading.Thread(target=holder, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "pool", "depth"),
    [
        ("gaussian", 1, 32), ("gaussian", 2, 32), ("embedded_gaussian", 1, 16), ("embedded_gaussian", 2, 16),
        ("dot_product", 1, 16), ("dot_product", 2, 16), ("concatenation", 1, 1),
    ],
)  # fmt: skip
def test_block_reads_nothing_of_lent_memory(kind: str, pool: int, depth: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weights = block_operands(((4000, 32, 3, 5), 16, 16, pool), dtype)
    pair = torch.randn(32).to(dtype) if kind == "concatenation" else None
    skipped = 2 if kind == "gaussian" else 0
    leaves = [each.requires_grad_() for each in (x, *weights[skipped:4], *weights[4 + skipped :])]
    size, upstream = cpu.saved_size(kind, x.shape, depth, 16, (pool, pool)), torch.randn(x.shape).to(dtype)
    assert size >= CALLS.LENT_FROM

    def results(found: float) -> list[torch.Tensor]:
        CALLS.lent(size).fill_(found)
        given = [None] * skipped + weights[skipped:4]
        biases = (*[None] * skipped, *weights[4 + skipped :])
        z = nonlocal_block(x, *given, biases=biases, pair=pair, kind=kind, pool=pool)
        gradients = torch.autograd.grad(z, leaves, upstream)
        z = z.detach()  # gives the memory back
        assert not CALLS.lent(size).isnan().all()  # it was in this memory
        return [z, *gradients]

    torch.use_deterministic_algorithms(True)
    try:
        for ours, same in zip(results(torch.nan), results(0.0), strict=True):
            assert torch.equal(ours, same)
    finally:
        torch.use_deterministic_algorithms(False)
