"""Calls of fused blocks past Python: which arguments they serve, and that nobody can tell the difference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from rlnas_fast.ops import native, nonlocal_attention, nonlocal_block
from rlnas_fast.ops.nonlocal_attention import block, cpu

pytestmark = pytest.mark.usefixtures("two_threads")

CALLS: Any = native.torch_calls()
assert CALLS is not None, native.torch_calls_unavailable_reason()
NO_BIASES = (None,) * 4
PLAIN = torch.full((2, 3), 0.5)


class Imitation(torch.Tensor):
    """Behaves as a tensor, but whoever made it may want to hear of every call."""


def negated(*shape: int) -> torch.Tensor:
    """-x, not written out."""
    x = torch.complex(torch.zeros(shape), torch.randn(shape)).conj().imag
    assert x.is_neg()
    return x


def operands() -> list[torch.Tensor]:
    """x and the weights of a block."""
    torch.manual_seed(0)
    return [torch.randn(2, 8, 5, 6), *(0.3 * torch.randn(4, 8) for _ in range(3)), 0.3 * torch.randn(8, 4)]


def test_a_call_is_found_by_layouts_and_options() -> None:
    x = torch.randn(2, 3, 4)
    layouts: list[tuple[Any, ...]] = [
        (each, *[PLAIN] * 4, NO_BIASES, None)
        for each in (x, x.double(), x.to(torch.bfloat16), x.to(torch.float16), x[:1], x.transpose(1, 2),
                     x.transpose(1, 2).contiguous(), x[:, :, ::2], x.flatten(1))
    ]  # fmt: skip
    layouts += [
        (x, None, None, PLAIN, PLAIN, NO_BIASES, None),
        (x, None, PLAIN, None, PLAIN, NO_BIASES, None),
        (x, *[PLAIN] * 4, (PLAIN, None, None, None), None),
        (x, *[PLAIN] * 4, (None, PLAIN, None, None), None),
        (x, *[PLAIN] * 4, NO_BIASES, PLAIN),
    ]
    options: list[tuple[object, ...]] = [
        ("a", None), ("b", None), ("a", 0), ("a", 1), ("a", True), ("a", False), ("a", (1, 2)), ("a", (2, 1)),
        ("a", 1, 2), ("a", ()), ("a", "b"), ("ab",), (),
    ]  # fmt: skip
    nothing = x[:0], None, None, PLAIN
    fitting = cpu.block_kernel("gaussian", nothing, (1,), True).capsule()  # touches no memory
    for tensors in layouts:
        for each in options:
            assert CALLS.serves_block(*tensors, *each)
            assert CALLS.call_block(*tensors, *each) is None
            CALLS.remember_block(*tensors, *each, fitting)
    for same in (torch.nn.Parameter(x), x.clone(), x + 1):
        z = CALLS.call_block(same, *layouts[0][1:], "a", [1, 2])  # as the tuple
        assert z.shape == x.shape
    for unusual in ("a", 1.5), ("a", {}), ("a", (1.0, 2)), ("a", 1 << 70), ("a", "\ud800"):
        assert not CALLS.serves_block(*layouts[0], *unusual)
        CALLS.remember_block(*layouts[0], *unusual, fitting)
        assert CALLS.call_block(*layouts[0], *unusual) is None
    with pytest.raises(ValueError, match="PyCapsule"):
        CALLS.remember_block(*layouts[0], None)


def test_old_calls_are_forgotten() -> None:
    x = torch.randn(2, 3, 4)
    given = x, *[PLAIN] * 4, NO_BIASES, None
    kernel = cpu.block_kernel("gaussian", (x[:0], None, None, PLAIN), (1,), True).capsule()
    for number in range(5000):
        CALLS.remember_block(*given, "forgotten", number, kernel)
    assert CALLS.call_block(*given, "forgotten", 4999) is not None
    assert CALLS.call_block(*given, "forgotten", 0) is None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(2, 3, device="meta"),
        torch.eye(3).to_sparse(),
        torch._efficientzerotensor(2, 3),
        negated(2, 3),
        torch.randn(2, 3).as_subclass(Imitation),
        [[1.0]],
    ],
    ids=["meta", "sparse", "zero", "negated", "imitation", "list"],
)
def test_only_plain_tensors_are_served(tensor: object) -> None:
    assert CALLS.serves_block(*[PLAIN] * 5, NO_BIASES, PLAIN)
    assert not CALLS.serves_block(tensor, *[PLAIN] * 4, NO_BIASES, None)
    assert not CALLS.serves_block(*[PLAIN] * 4, tensor, NO_BIASES, None)
    assert not CALLS.serves_block(*[PLAIN] * 5, (None, None, tensor, None), None)
    assert not CALLS.serves_block(*[PLAIN] * 5, NO_BIASES, tensor)
    for biases in (None, (), (None,) * 3, (None,) * 5, [None] * 4):
        assert not CALLS.serves_block(*[PLAIN] * 5, biases, None)
    assert not CALLS.serves_block(*[PLAIN] * 5)


@pytest.mark.parametrize(
    "watching",
    [
        lambda: FlopCounterMode(display=False),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)),
    ],
    ids=["mode", "autocast", "below autograd"],
)
def test_nobody_is_passed_by(watching: Callable[[], AbstractContextManager[object]]) -> None:
    given = *[PLAIN] * 5, NO_BIASES, None
    with torch.inference_mode():
        assert CALLS.serves_block(*given)
    with watching():
        assert not CALLS.serves_block(*given)
    assert CALLS.serves_block(*given)
    seen = []
    torch.vmap(lambda x: [x, seen.append(CALLS.serves_block(x, *given[1:]))][0])(PLAIN)
    assert seen == [False]


@pytest.mark.parametrize("kind", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_gives_what_the_operator_gives(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, *weights = (each.to(dtype) for each in operands())
    weights += [torch.randn(rows).to(dtype) for rows in (4, 4, 4, 8)]
    if kind == "gaussian":
        weights[0] = weights[1] = weights[4] = weights[5] = None
    pair = torch.randn(8).to(dtype) if kind == "concatenation" else None
    leaves = [None if each is None else each.requires_grad_() for each in (x.mT, *weights, pair)]
    present = [each for each in leaves if each is not None]
    upstream = torch.randn(2, 8, 6, 5).to(dtype).to(memory_format=torch.channels_last)

    def results() -> tuple[torch.Tensor, ...]:
        x, theta, phi, g, out, *biases, pair = leaves
        z = nonlocal_block(x, theta, phi, g, out, biases=tuple(biases), pair=pair, kind=kind, backend="cpu")
        return z, *torch.autograd.grad(z, present, upstream)

    torch.use_deterministic_algorithms(True)  # otherwise threads add up gradients as they come
    try:
        z, *ours = results()
        monkeypatch.setattr(block, "_calls", None)
        same, *theirs = results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "NonLocalBlock" in z.grad_fn.name()
    assert "NonLocalBlock" not in same.grad_fn.name()
    exact = kind != "concatenation"  # the operator multiplies the pair's weights into the others beforehand
    close = {"atol": 0, "rtol": 0} if exact else {"atol": 2e-5, "rtol": 1e-5}
    if dtype == torch.bfloat16 and not exact:
        close = {"atol": 0.1, "rtol": 0.05}
    for a, b in zip((z, *ours), (same, *theirs), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, **close)


def test_a_default_device_is_that_of_others() -> None:
    x, *weights = operands()
    x.requires_grad_()
    upstream = torch.randn(2, 8, 5, 6)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(nonlocal_block(x, *weights), x, upstream)[0]

    wanted = gradient()
    with torch.device("meta"):
        torch.testing.assert_close(gradient(), wanted)


def test_gradients_that_are_not_written_out() -> None:
    x, *weights = operands()
    x.requires_grad_()
    z = nonlocal_block(x, *weights)
    minus = negated(2, 8, 5, 6)
    for upstream in (minus, torch._efficientzerotensor(2, 8, 5, 6), torch.randn(2, 8, 1, 1).expand(z.shape)):
        ours, plain = (torch.autograd.grad(z, x, each, True)[0] for each in (upstream, upstream + 0.0))
        torch.testing.assert_close(ours, plain)
    with pytest.raises(NotImplementedError, match="batched gradients"):
        torch.autograd.grad(z, x, torch.randn(3, *z.shape), is_grads_batched=True)
    negative = negated(8, 4)
    torch.testing.assert_close(
        nonlocal_block(minus, *weights[:3], negative),
        nonlocal_block(minus.resolve_neg(), *weights[:3], negative.resolve_neg()),
    )


def test_a_second_derivative_is_refused() -> None:
    x, *weights = operands()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(nonlocal_block(x, *weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.square().sum().backward()


def test_what_is_saved_is_watched_over() -> None:
    x, *weights = operands()
    weights[3].requires_grad_()
    z = nonlocal_block(x, *weights)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        z = nonlocal_block(x, *weights)
    assert packed[:5] == [x.shape, *(each.shape for each in weights)]
    z.sum().backward(retain_graph=True)
    first = weights[3].grad.clone()
    z.sum().backward()
    torch.testing.assert_close(weights[3].grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def test_a_profiler_sees_the_call() -> None:
    given = operands()
    nonlocal_block(*given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        nonlocal_block(*given)
    assert "rlnas_fast::nonlocal_block" in {event.name for event in profile.events()}


def test_another_torch_is_refused() -> None:
    code = (
        "import torch; torch.__version__ = '1.2.3+cpu'; from rlnas_fast.ops import native, nonlocal_block\n"
        "assert native.torch_calls() is None; print(native.torch_calls_unavailable_reason())\n"
        "x, w = torch.randn(1, 4, 3), torch.randn(4, 4); print(nonlocal_block(x, w, w, w, w).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "but torch 1.2.3+cpu is installed" in done.stdout
    assert "[1, 4, 3]" in done.stdout


# PyTorch loads its formulas at the first dual tensor.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["gaussian", "dot_product", "concatenation"])
def test_forward_mode_is_refused_and_not_forgotten(kind: str) -> None:
    channels = 1 if kind == "concatenation" else 4
    theta, phi, g = torch.randn(2, channels, 9), torch.randn(2, channels, 9), torch.randn(2, 4, 9)
    with forward_ad.dual_level():  # the refusals are PyTorch's own, of an autograd.Function without jvp
        dual = forward_ad.make_dual(theta, torch.ones_like(theta))
        with pytest.raises(NotImplementedError, match="forward mode"):
            nonlocal_attention(dual, phi, g, kind=kind)
        x = forward_ad.make_dual(torch.randn(2, 4, 9), torch.ones(2, 4, 9))
        weights = [None if kind == "gaussian" else torch.randn(2, 4) for _ in range(2)]
        pair = torch.randn(4) if kind == "concatenation" else None
        with pytest.raises(NotImplementedError, match="forward mode"):
            nonlocal_block(x, *weights, torch.randn(2, 4), torch.randn(4, 2), kind=kind, pair=pair)
