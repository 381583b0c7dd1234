"""Tensors as compiled code sees them, through DLPack's table of C functions and without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.autograd import forward_ad

from rlnas_fast.ops import native, nonlocal_attention, nonlocal_block

TABLE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


class Imitation(torch.Tensor):
    """Behaves as a tensor, but whoever made it may want to hear of every call."""


@pytest.fixture(params=["table", "attributes"], autouse=True)
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    learn = native.cpu().learn_torch
    learn(torch, TABLE if request.param == "table" else None)
    yield
    learn(torch, TABLE)


def negated(*shape: int) -> torch.Tensor:
    """-x, not written out."""
    x = torch.complex(torch.zeros(shape), torch.randn(shape)).conj().imag
    assert x.is_neg()
    return x


def test_a_call_is_found_by_layouts_and_options() -> None:
    x = torch.randn(2, 3, 4)
    layouts = [
        (x,), (x.double(),), (x.to(torch.bfloat16),), (x.to(torch.float16),), (x[:1],), (x.transpose(1, 2),),
        (x.transpose(1, 2).contiguous(),), (x[:, :, ::2],), (x.flatten(1),), (x, None), (None, x), (x, x),
    ]  # fmt: skip
    options: list[tuple[object, ...]] = [
        ("a", None), ("b", None), ("a", 0), ("a", 1), ("a", True), ("a", False), ("a", (1, 2)), ("a", (2, 1)),
        ("a", 1, 2), ("a", ()), ("a", "b"), ("ab",), (),
    ]  # fmt: skip
    calls = native.cpu().BlockCalls()
    wanted = {}
    for tensors in layouts:
        for each in options:
            assert calls.find(tensors, each) is None
            wanted[len(wanted)] = tensors, each
            calls.add(tensors, each, len(wanted) - 1)
    for kernel, (tensors, each) in wanted.items():
        assert calls.find(tensors, each) == kernel
    for same in (torch.nn.Parameter(x), x.clone(), x + 1):
        assert calls.find((same,), ("a", [1, 2])) == calls.find((x,), ("a", (1, 2)))
        assert calls.find((same,), ("a", (1, 2))) == 6
    for unusual in ("a", 1.5), ("a", {}), ("a", (1.0, 2)), ("a", 1 << 70):
        calls.add((x,), unusual, 0)
        assert calls.find((x,), unusual) is None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(2, 3, device="meta"),
        torch.eye(3).to_sparse(),
        torch._efficientzerotensor(2, 3),
        negated(2, 3),
        torch.randn(2, 3).as_subclass(Imitation),
    ],
    ids=["meta", "sparse", "zero", "negated", "imitation"],
)
def test_only_plain_tensors_are_served(tensor: torch.Tensor) -> None:
    calls, plain = native.cpu().BlockCalls(), torch.randn(2)
    assert calls.serves((plain, None))
    assert not calls.serves((plain, tensor))
    calls.add((plain, tensor), (), 0)
    assert calls.find((plain, tensor), ()) is None


def test_a_block_of_either_way() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 8, 5, 6), [0.3 * torch.randn(4, 8) for _ in range(3)]
    tensors = [each.requires_grad_() for each in (x.mT, *weights, torch.randn(8, 4))]
    upstream = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)

    def run(backend: str) -> tuple[torch.Tensor, ...]:
        z = nonlocal_block(*tensors, pool=2, backend=backend)
        return z, *torch.autograd.grad(z, tensors, upstream)

    for ours, plain in zip(run("cpu"), run("reference"), strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-5)


def test_a_default_device_is_that_of_others() -> None:
    x, weights = torch.randn(2, 8, 5, 6, requires_grad=True), [torch.randn(4, 8) for _ in range(3)]
    out, upstream = torch.randn(8, 4), torch.randn(2, 8, 5, 6)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(nonlocal_block(x, *weights, out), x, upstream)[0]

    wanted = gradient()
    with torch.device("meta"):
        torch.testing.assert_close(gradient(), wanted)


def test_negated_tensors_are_what_they_say() -> None:
    x, weights = negated(2, 8, 5, 6), [torch.randn(4, 8) for _ in range(3)]
    out = negated(8, 4)
    torch.testing.assert_close(
        nonlocal_block(x, *weights, out), nonlocal_block(x.resolve_neg(), *weights, out.resolve_neg())
    )
    leaf, upstream = torch.randn(2, 8, 5, 6, requires_grad=True), negated(2, 8, 5, 6)
    z = nonlocal_block(leaf, *weights, weights[0].mT.contiguous())
    ours, plain = (torch.autograd.grad(z, leaf, each, True)[0] for each in (upstream, upstream.resolve_neg()))
    torch.testing.assert_close(ours, plain)


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
