"""``nonlocal_block``: projections, attention, W_z and residual in as few passes as pay.

On a CPU the block is one operator in C++; on a GPU, for softmax and the dot product's forward, one in Triton
where ``triton_block`` says that it fits, or products of a library where those are faster; elsewhere it is
composed from ``nonlocal_attention``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._C import _is_any_autocast_enabled
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from rlnas_fast.errors import ShapeError, unknown_name
from rlnas_fast.ops import native
from rlnas_fast.ops.nonlocal_attention import cpu, reference
from rlnas_fast.ops.nonlocal_attention.dispatch import AUTOCAST, DTYPES, check_backend, kernels_name
from rlnas_fast.ops.nonlocal_attention.dot_product import (
    dot_product_algorithm,
    gram_block,
    plain_is_faster,
    reassociated_block,
)
from rlnas_fast.ops.nonlocal_attention.library_block import library_block, use_library
from rlnas_fast.ops.nonlocal_attention.op import KINDS, nonlocal_attention
from rlnas_fast.ops.triton_launch import dot_precision

__all__ = ["nonlocal_block"]

LARGEST_FUSED_DOT = 128  # channels; beyond them the products of a library fill a GPU, unless keys are pooled
LARGEST_WINDOW = 255  # the place within a pooling window is kept in 8 bits
Biases = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
NO_BIASES: Biases = (None, None, None, None)
_calls = native.torch_calls()  # None where every call goes through the dispatcher


def nonlocal_block(
    x: torch.Tensor,
    theta: torch.Tensor | None,
    phi: torch.Tensor | None,
    g: torch.Tensor,
    out: torch.Tensor,
    *,
    biases: Biases = NO_BIASES,
    pair: torch.Tensor | None = None,
    kind: str = "embedded_gaussian",
    pool: int | Sequence[int] | None = None,
    residual: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Computes z = W_z y + x, where y weighs every position of x by every other one.

    With B batch, C channels, D inner channels of theta and phi, E of g:

    Args:
        x: [B, C, *space] with 1 to 3 spatial dimensions, float32 | bfloat16 | float16, any strides.
        theta: [D, C] weight of the queries; None for ``gaussian``, which compares x itself.
        phi: [D, C] weight of the keys, as theta.
        g: [E, C] weight of the values.
        out: [C, E] weight W_z.
        biases: of theta, phi, g and out, each [rows of its weight] or None.
        pair: [2D] weight of [theta_i, phi_j], for ``concatenation`` alone.
        kind: gaussian | embedded_gaussian | dot_product | concatenation.
        pool: keys and values are the maximum over windows of this size; one number, or one a dimension.
        residual: whether x is added.
        backend: as in ``nonlocal_attention``.

    Returns:
        [B, C, *space] in x's dtype and memory format.

    Raises:
        ShapeError: a rank, a size or a device does not fit, or a pool leaves no key; names the argument.
        TypeError: a dtype that is not supported, or differs.
        ConfigError: an unknown kind or backend.
        KernelUnavailable: a backend asked for by name cannot run here; says why.

    Source: Wang et al., Non-local Neural Networks (2018), eq. 1-6 and section 3.3.
    """
    compiling = is_compiling()
    given = (x, theta, phi, g, out, biases, pair, kind, pool, residual, backend)
    if not compiling and _calls is not None:
        z: torch.Tensor | None = _calls.call_block(*given)
        if z is not None:
            return z
    if len(biases) != 4:
        raise ShapeError(f"biases has {len(biases)} entries; expected 4: of theta, phi, g and out")
    may_cast = compiling or _is_any_autocast_enabled()
    if may_cast and x.device.type in AUTOCAST and torch.is_autocast_enabled(x.device.type):
        x, theta, phi, g, out, pair, *casted = _autocast(x, theta, phi, g, out, pair, *biases)
        biases = (casted[0], casted[1], casted[2], casted[3])
    tensors = (x, theta, phi, g, out, *biases, pair)
    wanted = forward_ad._current_level >= 0 or (  # autograd.Function says that it has no forward mode
        torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)
    )
    windows, route = _routed(tensors, kind, pool, backend, wanted)
    if route == "reference":
        return reference.nonlocal_block(
            x, theta, phi, g, out, biases=biases, pair=pair, kind=kind, pool=tuple(windows), residual=residual
        )
    if route == "fused" and not compiling and _calls is not None and _calls.serves_block(*given):
        _calls.remember_block(*given, cpu.block_kernel(kind, tensors, windows, residual).capsule())
        z = _calls.call_block(*given)
        if z is not None:
            return z
    if pair is not None and theta is not None and phi is not None and _trivial(windows):
        # Two linear maps in a row are one; a pooling would stand between phi and its part of the pair.
        first, second = pair.unflatten(0, (2, 1, -1))
        theta, theta_bias = _joined(first, theta, biases[0])
        phi, phi_bias = _joined(second, phi, biases[1])
        biases, pair = (theta_bias, phi_bias, *biases[2:]), None
    if route == "fused":
        operands = (x, theta, phi, g, out, *biases)
        if wanted:
            z = _Block.apply(windows, residual, kind, *operands)
            return z
        return _forward_op(*operands, windows, residual, False, kind)[0]
    if theta is None or phi is None or route == "composed":
        return _composed(x, theta, phi, g, out, biases, pair, kind, windows, residual, backend)
    if route == "library":
        return library_block(x, theta, phi, g, out, biases, residual)
    if route == "gram":
        return gram_block(x, theta, phi, g, out, biases, residual)
    return reassociated_block(x, theta, phi, g, out, biases, residual, windows)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, windows: list[int], residual: bool, kind: str, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        z, saved = _forward_op(*tensors, windows, residual, True, kind)
        ctx.save_for_backward(*tensors, *saved)
        ctx.settings = windows, residual, kind
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors, saved = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
        present = iter(_backward_op(grad_z, *tensors, list(saved), *ctx.settings))
        return (None, None, None, *(None if tensor is None else next(present) for tensor in tensors))


def _composed(
    x: torch.Tensor,
    theta: torch.Tensor | None,
    phi: torch.Tensor | None,
    g: torch.Tensor,
    out: torch.Tensor,
    biases: Biases,
    pair: torch.Tensor | None,
    kind: str,
    windows: list[int],
    residual: bool,
    backend: str,
) -> torch.Tensor:
    """The block from ``nonlocal_attention`` and 1x1 convolutions."""
    flat = x.flatten(2)
    rows = flat.stride(1) == 1  # channels innermost
    theta_bias, phi_bias, g_bias, out_bias = biases
    second = None
    if pair is not None and theta is not None:
        first, second = pair.unflatten(0, (2, 1, -1))
        theta, theta_bias = _joined(first, theta, theta_bias)

    def pooled(features: torch.Tensor) -> torch.Tensor:
        if _trivial(windows):
            return features
        return reference.pool_keys(features.unflatten(2, x.shape[2:]), tuple(windows))

    queries = project(flat, theta, theta_bias, rows)
    keys = project(pooled(project(flat, phi, phi_bias, rows)), second, None, rows)
    values = pooled(project(flat, g, g_bias, rows))
    y = nonlocal_attention(queries, keys, values, kind=kind, backend=backend)
    z = project(y, out, out_bias, rows).unflatten(2, x.shape[2:])
    return z + x if residual else z


def _joined(
    row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Two linear maps as one."""
    return row @ weight, None if bias is None else row @ bias


def project(
    flat: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, rows: bool
) -> torch.Tensor:
    """A 1x1 convolution of [B, C, N], with channels innermost if `rows`; no weight is the identity."""
    if weight is None:
        return flat
    if rows:
        return F.linear(flat.mT, weight, bias).mT
    projected = torch.matmul(weight, flat)
    return projected if bias is None else projected + bias[:, None]


class _Route(NamedTuple):
    windows: list[int]  # of the pooling
    name: str  # reference | fused | library | gram | reassociated | composed


_routes: dict[tuple[Any, ...], _Route] = {}
LARGEST_CACHE = 4096


def _routed(
    tensors: tuple[Any, ...],
    kind: str,
    pool: int | Sequence[int] | None,
    backend: str,
    wanted: bool,
) -> _Route:
    """Checks the arguments and chooses the algorithm, once for what depends on neither values nor addresses.

    ``wanted`` says whether gradients are.
    """
    if is_compiling():  # once a graph, whose shapes may be symbols
        return _route(tensors, kind, pool, backend, wanted)
    key = (
        kind, backend, wanted, tuple(pool) if isinstance(pool, list) else pool,
        torch.are_deterministic_algorithms_enabled(), dot_precision(tensors[0].dtype),
        *[
            None if each is None else (each.shape, each.dtype, each.device, each.is_contiguous())
            for each in tensors
        ],
    )  # fmt: skip
    route = _routes.get(key)
    if route is None:
        route = _route(tensors, kind, pool, backend, wanted)
        if len(_routes) >= LARGEST_CACHE:
            _routes.clear()
        _routes[key] = route
    return route


def _route(
    tensors: tuple[Any, ...],
    kind: str,
    pool: int | Sequence[int] | None,
    backend: str,
    wanted: bool,
) -> _Route:
    x, theta, phi, g, out, *rest, pair = tensors
    biases = (rest[0], rest[1], rest[2], rest[3])
    _check(x, theta, phi, g, out, biases, pair, kind)
    windows = _windows(x, pool)
    check_backend(backend, x.device)
    if backend == "reference":
        return _Route(windows, "reference")
    pooled = not _trivial(windows)
    if pair is not None and pooled:
        return _Route(windows, "composed")
    inner = x.shape[1] if theta is None else theta.shape[0]
    sizes = inner, g.shape[0], x.shape[2:].numel()
    if kind == "embedded_gaussian" and use_library(x.device.type, x.dtype, *sizes, backend, pooled=pooled):
        return _Route(windows, "library")
    dense = all(each is None or each.is_contiguous() for each in tensors[1:])
    if dense and _fused(kind, x, (theta, phi, g, out), biases, windows, backend, wanted):
        return _Route(windows, "fused")
    if kind == "dot_product" and not is_compiling():  # a compiler fuses the plain form itself
        order = dot_product_algorithm(x.shape, inner, g.shape[0], windows, x.device.type)[0]
        if order in ("gram", "reassociated"):
            return _Route(windows, order)
    return _Route(windows, "composed")


def _fused(
    kind: str,
    x: torch.Tensor,
    weights: tuple[torch.Tensor | None, ...],
    biases: Biases,
    windows: list[int],
    backend: str,
    wanted: bool,
) -> bool:
    """Says whether one operator runs the whole block."""
    name = kernels_name(backend, x.device.type, x.dtype)
    if math.prod(windows) > LARGEST_WINDOW:
        return False
    if name == "cpu":
        theta, _, g, _ = weights
        return kind in cpu.KINDS and not (
            kind == "dot_product"
            and backend == "auto"
            and theta is not None
            and g is not None
            and plain_is_faster(x.shape, theta.shape[0], g.shape[0], x.dtype, pooled=not _trivial(windows))
        )
    if name != "triton" or kind not in ("embedded_gaussian", "dot_product"):
        return False
    wide = x.shape[1] > LARGEST_FUSED_DOT and _trivial(windows)
    if kind == "dot_product" and (wanted or x.dtype == torch.float32 or wide):
        return False
    from rlnas_fast.ops.nonlocal_attention import triton_block

    return bool(triton_block.supports(x, triton_block.Projections._make((*weights, *biases))))


def _trivial(windows: list[int]) -> bool:
    return all(size == 1 for size in windows)


def _windows(x: torch.Tensor, pool: int | Sequence[int] | None) -> list[int]:
    space = x.shape[2:]
    if pool is not None and not isinstance(pool, (int, tuple, list)):
        raise TypeError(f"pool is {pool!r}; expected a whole number, or one a spatial dimension")
    windows = (
        [1 if pool is None else pool] * len(space) if pool is None or isinstance(pool, int) else list(pool)
    )
    if len(windows) != len(space):
        raise ShapeError(f"pool has {len(windows)} sizes, but x has {len(space)} spatial dimensions")
    for size, window in zip(space, windows, strict=True):
        if not isinstance(window, int):
            raise TypeError(f"pool {tuple(windows)} must be whole numbers")
        if window < 1:
            raise ShapeError(f"pool {tuple(windows)} must be at least 1 in every dimension")
        if window > size:
            raise ShapeError(
                f"pool {tuple(windows)} leaves no key of space {tuple(space)}; use a smaller one"
            )
    return windows


def _autocast(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *others))


def _check(
    x: torch.Tensor,
    theta: torch.Tensor | None,
    phi: torch.Tensor | None,
    g: torch.Tensor,
    out: torch.Tensor,
    biases: Biases,
    pair: torch.Tensor | None,
    kind: str,
) -> None:
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    if x.dim() not in (3, 4, 5):
        raise ShapeError(f"x must be [batch, channels, 1 to 3 spatial sizes], but has shape {list(x.shape)}")
    if x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(
            f"x is {x.dtype}; expected float32, bfloat16 or float16 (float64 runs in plain PyTorch)"
        )
    if (theta is None) != (kind == "gaussian") or (phi is None) != (kind == "gaussian"):
        raise ShapeError(f"kind {kind!r} {'has no' if kind == 'gaussian' else 'needs'} theta and phi weights")
    for label, tensor in (("theta", theta), ("phi", phi), ("g", g), ("out", out)):
        if tensor is not None and tensor.dim() != 2:
            raise ShapeError(f"{label} must be a matrix, but has shape {list(tensor.shape)}")
    channels, inner, width = x.shape[1], 0 if theta is None else theta.shape[0], g.shape[0]
    expected: dict[str, tuple[int, ...]] = {
        "theta": (inner, channels),
        "phi": (inner, channels),
        "g": (width, channels),
        "out": (channels, width),
    }
    if (pair is None) == (kind == "concatenation"):
        raise ShapeError(f"kind {kind!r} {'needs' if pair is None else 'has no'} pair weight")
    given = [
        (name, weight, expected[name]) for name, weight in zip(expected, (theta, phi, g, out), strict=True)
    ]
    given += [
        (f"the bias of {name}", bias, expected[name][:1]) for name, bias in zip(expected, biases, strict=True)
    ]
    for label, tensor, wanted in [*given, ("pair", pair, (2 * inner,))]:
        if tensor is not None:
            if tuple(tensor.shape) != wanted or 0 in wanted:
                raise ShapeError(
                    f"{label} has shape {list(tensor.shape)}; expected {list(wanted)}, none of them 0"
                )
            if tensor.dtype != x.dtype:
                raise TypeError(
                    f"{label} is {tensor.dtype}, but x is {x.dtype}; cast one, or use torch.autocast"
                )
            if tensor.device != x.device:
                raise ShapeError(f"{label} is on {tensor.device}, but x is on {x.device}; move one of them")


_TENSORS = (
    "Tensor x, Tensor? theta, Tensor? phi, Tensor g, Tensor out, Tensor? theta_bias, Tensor? phi_bias, "
    "Tensor? g_bias, Tensor? out_bias"
)
_library = torch.library.Library("rlnas_fast", "FRAGMENT")
_library.define(
    f"nonlocal_block({_TENSORS}, int[] pool, bool residual, bool save, str kind)"
    " -> (Tensor z, Tensor[] saved)"
)
_library.define(
    f"nonlocal_block_backward(Tensor grad_z, {_TENSORS}, Tensor[] saved, int[] pool, bool residual,"
    " str kind) -> Tensor[]"
)


def _split(
    tensors: tuple[Any, ...],
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], Biases, tuple[Any, ...]]:
    first, second, third, fourth = tensors[5:9]
    return tensors[0], tensors[1:5], (first, second, third, fourth), tensors[9:]


def _forward(*arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x, weights, biases, (windows, residual, save, kind) = _split(arguments)
    if x.device.type == "cpu":
        z, kept = cpu.block_forward(kind, (*arguments[:9], None), windows, residual, save)
        return z, [] if kept is None else [kept]
    from rlnas_fast.ops.nonlocal_attention import triton_block, triton_dot

    given = triton_block.Projections._make((*weights, *biases))
    if kind == "dot_product":
        return triton_dot.block_forward(x, given, pool=tuple(windows), residual=residual), []
    z, saved = triton_block.block_forward(x, given, pool=tuple(windows), residual=residual, save=save)
    return z, [tensor for tensor in saved or () if tensor is not None]


def _backward(grad_z: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    x, weights, biases, (saved, windows, residual, kind) = _split(arguments)
    if x.device.type == "cpu":
        tensors = (*arguments[:9], None)
        found = cpu.block_backward(grad_z, kind, tensors, saved[0], windows, residual)
        return [each for each in found if each is not None]
    from rlnas_fast.ops.nonlocal_attention import triton_block

    grad_x, gradients = triton_block.block_backward(
        grad_z,
        x,
        triton_block.Projections._make((*weights, *biases)),
        triton_block.Saved(*saved, *[None] * (7 - len(saved))),
        pool=tuple(windows),
        residual=residual,
    )
    return [grad_x, *(grad for grad in gradients if grad is not None)]


@torch.library.register_fake("rlnas_fast::nonlocal_block", lib=_library)
def _forward_fake(*arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x, weights, _, (windows, _, save, kind) = _split(arguments)
    z = torch.empty_like(x)
    if not save:
        return z, []
    if x.device.type == "cpu":
        inner = x.shape[1] if weights[0] is None else weights[0].shape[0]
        size = cpu.saved_size(kind, x.shape, inner, weights[2].shape[0], windows)
        return z, [x.new_empty(size, dtype=torch.float32)]
    batch, space = x.shape[0], x.shape[2:]
    inner, width, positions = weights[0].shape[0], weights[2].shape[0], math.prod(space)
    keys = math.prod(size // window for size, window in zip(space, windows, strict=True))
    shapes = [(positions, inner), (keys, inner), (keys, width), (positions, width)]
    saved = [x.new_empty((batch, *shape)) for shape in shapes]
    saved.append(x.new_empty((batch, positions), dtype=torch.float32))
    if not _trivial(windows):
        saved += [x.new_empty((batch, keys, size), dtype=torch.uint8) for size in (inner, width)]
    return z, saved


@torch.library.register_fake("rlnas_fast::nonlocal_block_backward", lib=_library)
def _backward_fake(grad_z: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    x, weights, biases, _ = _split(arguments)
    return [torch.empty_like(each) for each in (x, *weights, *biases) if each is not None]


for _device in ("CPU", "CUDA"):
    _library.impl("nonlocal_block", _forward, _device)
    _library.impl("nonlocal_block_backward", _backward, _device)
_forward_op = torch.ops.rlnas_fast.nonlocal_block.default
_backward_op = torch.ops.rlnas_fast.nonlocal_block_backward.default


def block_flops(
    kind: str, x: Sequence[int], theta: Sequence[int] | None, g: Sequence[int], pool: Sequence[int]
) -> tuple[int, int]:
    """Returns the FLOPs of a fused block's forward and backward: 2 a multiply-add."""
    batch, channels, positions = x[0], x[1], math.prod(x[2:])
    inner, width = channels if theta is None else theta[0], g[0]
    keys = math.prod(size // window for size, window in zip(x[2:], pool, strict=True))
    projections = positions * channels * ((0 if theta is None else 2 * inner) + width)
    output = positions * channels * width
    if kind in ("gaussian", "embedded_gaussian"):
        forward = projections + output + positions * keys * (inner + width)
        backward = 2 * (projections + output) + positions * keys * (3 * inner + 2 * width)
    elif kind == "concatenation":  # lower bounds: sorting is not counted
        forward = projections + output + positions * 4 * width
        backward = 2 * (projections + output) + positions * 7 * width
    else:
        small, mixed = keys * inner * width, channels * inner * width
        output = positions * channels * inner
        forward = projections + output + small + mixed
        backward = 2 * (projections + output + small + mixed)
    return 2 * batch * forward, 2 * batch * backward


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    def forward_flops(x: Any, theta: Any, phi: Any, g: Any, out: Any, *rest: Any, **_: Any) -> int:
        return block_flops(rest[7], x, theta, g, rest[4])[0]

    def backward_flops(
        grad_z: Any, x: Any, theta: Any, phi: Any, g: Any, out: Any, *rest: Any, **_: Any
    ) -> int:
        return block_flops(rest[7], x, theta, g, rest[5])[1]

    register_flop_formula(torch.ops.rlnas_fast.nonlocal_block)(forward_flops)
    register_flop_formula(torch.ops.rlnas_fast.nonlocal_block_backward)(backward_flops)


_register_flops()
