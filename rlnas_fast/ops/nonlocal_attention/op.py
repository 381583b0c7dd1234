"""``nonlocal_attention``: one operator over every backend, with fakes, gradients and FLOP counts.

A backend is a module with ``unavailable_reason() -> str | None`` and, for the softmax kinds,
``attention_forward(theta, phi, g) -> (y, lse)`` and
``attention_backward(grad_y, theta, phi, g, y, lse) -> (gtheta, gphi, gg)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from rlnas_fast.errors import ShapeError, unknown_name
from rlnas_fast.ops.nonlocal_attention import reference
from rlnas_fast.ops.nonlocal_attention.concatenation import concatenation_attention
from rlnas_fast.ops.nonlocal_attention.cpu import like_queries
from rlnas_fast.ops.nonlocal_attention.dispatch import AUTOCAST, DTYPES, check_backend, kernels
from rlnas_fast.ops.nonlocal_attention.dot_product import dot_product_attention

__all__ = ["KINDS", "nonlocal_attention"]

KINDS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def nonlocal_attention(
    theta: torch.Tensor,
    phi: torch.Tensor,
    g: torch.Tensor,
    *,
    kind: str = "embedded_gaussian",
    backend: str = "auto",
) -> torch.Tensor:
    """Weighs every position by every other one, in O(N) extra memory.

    With B batch, D channels of queries and keys, E channels of values, N queries and M keys:

    Args:
        theta: [B, D, N] queries, float32 | bfloat16 | float16, any strides; under autocast all three are
            cast as a matrix product's operands would be.  ``concatenation`` takes D = 1: the two halves of
            its weight vector are already multiplied in, f = ReLU(theta_i + phi_j).
        phi: [B, D, M] keys.
        g: [B, E, M] values.
        kind: ``gaussian`` and ``embedded_gaussian`` (softmax, no 1/sqrt(D)), ``dot_product`` and
            ``concatenation`` (divided by M).
        backend: ``auto``; ``cpu``, ``triton`` or ``cuda`` for softmax kernels by name; ``reference`` for the
            definition with its N x M matrix.  ``auto`` runs plain PyTorch where no kernel exists.

    Returns:
        [B, E, N] in theta's dtype; positions or channels innermost, as theta.

    Raises:
        ShapeError: a rank, a size or a device does not fit; names the argument.
        TypeError: a dtype that is not supported.
        ConfigError: an unknown kind or backend.
        KernelUnavailable: a backend asked for by name cannot run here; says why.

    Gradients reach theta, phi and g once; a second derivative raises.

    Source: Wang et al., Non-local Neural Networks (2018), eq. 1-6.  Deviations: none; sums are in float32.
    """
    theta, phi, g = _autocast(theta, phi, g)
    _check(theta, phi, g, kind)
    check_backend(backend, theta.device)
    if backend == "reference":
        return reference.nonlocal_attention(theta, phi, g, kind)
    if kind == "dot_product":
        return dot_product_attention(theta, phi, g)
    if kind == "concatenation":
        return concatenation_attention(theta, phi, g, backend)
    wanted = torch.is_grad_enabled() and (theta.requires_grad or phi.requires_grad or g.requires_grad)
    if wanted or forward_ad._current_level >= 0:  # autograd.Function says that it has no forward mode
        y: torch.Tensor = _Softmax.apply(theta, phi, g, backend)
        return y
    return _forward_op(theta, phi, g, backend)[0]


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, backend: str
    ) -> torch.Tensor:
        y, lse = _forward_op(theta, phi, g, backend)
        ctx.save_for_backward(theta, phi, g, y, lse)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*_backward_op(grad_y, *ctx.saved_tensors, ctx.backend), None)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    device = tensors[0].device.type
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    for name, tensor in (("theta", theta), ("phi", phi), ("g", g)):
        if tensor.dim() != 3:
            raise ShapeError(
                f"{name} must be [batch, channels, positions], but has shape {list(tensor.shape)}"
            )
        if tensor.dtype != theta.dtype or tensor.dtype not in (*DTYPES, torch.float64):
            raise TypeError(
                f"{name} is {tensor.dtype}; theta, phi and g must share one of float32, bfloat16, float16 "
                f"(float64 runs in plain PyTorch), and theta is {theta.dtype}"
            )
        if tensor.device != theta.device:
            raise ShapeError(
                f"{name} is on {tensor.device}, but theta is on {theta.device}; move one of them"
            )
        if tensor.shape[0] != theta.shape[0]:
            raise ShapeError(f"{name} has batch {tensor.shape[0]}, but theta has {theta.shape[0]}")
    if phi.shape[1] != theta.shape[1] or theta.shape[1] == 0:
        raise ShapeError(f"phi has {phi.shape[1]} channels; expected theta's {theta.shape[1]}, at least 1")
    if kind == "concatenation" and theta.shape[1] != 1:
        raise ShapeError(f"theta has {theta.shape[1]} channels; concatenation expects 1: w_theta . theta_i")
    if g.shape[2] != phi.shape[2] or phi.shape[2] == 0:
        raise ShapeError(f"g has {g.shape[2]} positions; expected phi's {phi.shape[2]}, at least 1")


_library = torch.library.Library("rlnas_fast", "FRAGMENT")
_library.define(
    "nonlocal_attention(Tensor theta, Tensor phi, Tensor g, str backend) -> (Tensor y, Tensor lse)"
)
_library.define(
    "nonlocal_attention_backward(Tensor grad_y, Tensor theta, Tensor phi, Tensor g, Tensor y, Tensor lse, "
    "str backend) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    module = kernels(backend, theta.device, theta.dtype)
    if module is not None:
        y, lse = module.attention_forward(theta, phi, g)
        return y, lse
    logits = theta.mT @ phi
    lse = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    y = like_queries(theta, g.shape[1])
    y.copy_(g @ torch.softmax(logits, -1).mT)
    return y, lse


def _backward(
    grad_y: torch.Tensor,
    theta: torch.Tensor,
    phi: torch.Tensor,
    g: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    module = kernels(backend, theta.device, theta.dtype)
    if module is not None:
        gradients: tuple[torch.Tensor, ...] = module.attention_backward(grad_y, theta, phi, g, y, lse)
        return gradients
    weights = torch.exp(theta.mT @ phi - lse.unsqueeze(-1)).to(theta.dtype)
    grad_logits = weights * (grad_y.mT @ g - (grad_y * y).sum(1).unsqueeze(-1))
    exact = (phi @ grad_logits.mT, theta @ grad_logits, grad_y @ weights)
    return tuple(
        like_queries(tensor, tensor.shape[1]).copy_(gradient)
        for tensor, gradient in zip((theta, phi, g), exact, strict=True)
    )


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.register_fake("rlnas_fast::nonlocal_attention", lib=_library)
def _forward_fake(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = theta.new_empty((theta.shape[0], theta.shape[2]), dtype=_lse_dtype(theta.dtype))
    return like_queries(theta, g.shape[1]), lse


@torch.library.register_fake("rlnas_fast::nonlocal_attention_backward", lib=_library)
def _backward_fake(
    grad_y: torch.Tensor, theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, ...]:
    return tuple(like_queries(tensor, tensor.shape[1]) for tensor in (theta, phi, g))


for _device in ("CPU", "CUDA"):
    _library.impl("nonlocal_attention", _forward, _device)
    _library.impl("nonlocal_attention_backward", _backward, _device)
_forward_op = torch.ops.rlnas_fast.nonlocal_attention.default
_backward_op = torch.ops.rlnas_fast.nonlocal_attention_backward.default


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    def forward_flops(theta: list[int], phi: list[int], g: list[int], *_: object, **__: object) -> int:
        batch, depth, queries = theta
        return 2 * batch * queries * phi[2] * (depth + g[1])

    def backward_flops(grad_y: list[int], theta: list[int], phi: list[int], *_: object, **__: object) -> int:
        batch, depth, queries = theta
        return 2 * batch * queries * phi[2] * (3 * depth + 2 * grad_y[1])

    register_flop_formula(torch.ops.rlnas_fast.nonlocal_attention)(forward_flops)
    register_flop_formula(torch.ops.rlnas_fast.nonlocal_attention_backward)(backward_flops)


_register_flops()
