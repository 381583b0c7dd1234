"""``y = x (W o M)^T + b`` with a mask that may change at every call.

Dispatch contract for CUDA tensors.  ``triton_kernels`` and ``cuda`` in this folder each expose

- ``unavailable_reason() -> str | None``: ``None`` where the kernels can run, else one line (why, and the
  remedy);
- ``forward(x, weight, mask, bias, int8_activations=False) -> y``: x [B, K] (stride 1 in its last dimension,
  any row stride), weight [N, K] contiguous, same dtype (float32 | bfloat16 | float16); bias [N] or None; y
  [B, N] contiguous;
- ``grad_input(grad_y, weight, mask) -> grad_x`` [B, K]: int8 tiles act through ``scale * payload``;
- ``grad_weight(grad_y, x, mask) -> grad_w`` [N, K], dense layout, exactly 0 off the mask (a sampled
  dense-dense product; int8 tiles are straight-through: treated like keep tiles);
- ``update_lists(mask) -> None``: fills counts, lists and stats from ``state`` and ``bits``, in place, no host
  sync;
- ``pack_mask(dense, mask) -> None``: bool [N, K] to ``bits`` and ``state`` in place (a tile without kept
  weights becomes prune, a pruned tile with kept weights becomes keep, int8 tiles with kept weights stay
  int8), then ``update_lists``; one memory-bound pass, no host sync.

``mask`` is a ``TileTensors``.  B, N or K may be 0 and lists may be empty: the result is zeros plus
bias.  Inputs were checked before the call.  A backend lacking one of these functions simply does not define
it, and the other is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from rlnas_fast.errors import ConfigError, ShapeError
from rlnas_fast.ops.masked_matmul import cost_model, cpu
from rlnas_fast.ops.masked_matmul.dispatch import check_backend, gpu_backend, gpu_product
from rlnas_fast.ops.masked_matmul.reference import effective_weight, masked_matmul_reference
from rlnas_fast.ops.masked_matmul.tile_mask import TileMask, TileTensors

__all__ = ["Packed", "masked_matmul", "pack", "plan"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Packed = cpu.Packed


def masked_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor | TileMask,
    bias: torch.Tensor | None = None,
    *,
    int8_activations: bool = False,
    backend: str = "auto",
    packed: Packed | None = None,
) -> torch.Tensor:
    """Computes ``y = x (W o M)^T + b`` without touching what the mask leaves out.

    Gradients: x, weight (``(gy^T x) o M``, exactly 0 off the mask; int8 tiles are straight-through), bias,
    twice differentiable unless there are int8 tiles; and a real-valued mask (``(gy^T x) o W``), for which the
    product is dense.  Sums are in float32 for every dtype.

    A pruned weight contributes nothing, but where x is infinite or NaN against a pruned weight it is not said
    whether y becomes NaN (as in the dense product) or not (where the weight was skipped).

    Args:
        x: [..., K], float32 | bfloat16 | float16, any strides.  Under autocast x, weight and bias are cast as
            ``F.linear`` would.
        weight: [N, K] in x's dtype.
        mask: bool [N, K]; or ``TileMask``; or a real-valued [N, K] that multiplies the weight and has a
            gradient.
        bias: [N] or None.
        int8_activations: int8 tiles see x quantised per row to 8 bits; the reference is that integer
            arithmetic.
        backend: ``"auto"`` asks this device's measured cost model; else ``"dense"`` (mask fused into a dense
            product's weight), ``"tiles"``, ``"rows"`` (unstructured), ``"direct"`` (at most 8 rows of x,
            nothing is packed), ``"reference"``, on a GPU ``"triton"`` or ``"cuda"``.
        packed: what ``pack`` made of this weight and mask, to skip that work; no gradients.  Weight and mask
            are then not looked at: make it anew when they change.

    Returns:
        [..., N] in x's dtype, contiguous.

    Raises:
        ShapeError: x, mask or bias do not fit the weight, or are on another device.
        ConfigError: a dtype that is not supported, or an unknown backend.
        KernelUnavailable: the backend cannot run here; says why.

    Source: the product of Gray et al. (2017), GPU kernels for block-sparse weights, and its sampled
    dense-dense gradient; here the mask is an argument, so it may change at every call.
    """
    if packed is not None and cpu.takes(packed, x, bias):
        return cpu.forward_packed(x, packed, bias)
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, bias)
    check_backend(backend, x.device)
    if isinstance(mask, torch.Tensor):
        _check_mask_tensor(mask, weight)
        if mask.is_floating_point():
            return F.linear(x, weight * mask.to(weight.dtype), bias)
        mask = TileMask.from_dense(mask)
    _check_tile_mask(mask, weight)
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if packed is not None:
        y = _packed_product(flat, packed, bias)
    elif backend != "reference" and _unwatched(x, weight, bias):
        y = cpu.forward(flat, weight, mask.tensors, bias, int8_activations, backend)
    else:
        y = torch.ops.rlnas_fast.masked_matmul.default(
            flat, weight, bias, *_flat(mask.tensors), int8_activations, backend
        )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def pack(weight: torch.Tensor, mask: TileMask, *, batch: int = 64, backend: str = "auto") -> Packed:
    """Brings a weight and its mask into the fastest kernel's form, for products in which neither changes.

    Args:
        weight: [N, K] on the CPU.
        mask: its mask.
        batch: the rows of x to choose a kernel for; any number of rows may follow (at most 8 with
            ``"direct"``).
        backend: forces a kernel; by default those that the cost model thinks promising are timed.
    """
    _check_tile_mask(mask, weight)
    if weight.device.type != "cpu":
        raise ConfigError(
            f"pack serves CPU kernels, but weight is on {weight.device}; call masked_matmul instead"
        )
    check_backend(backend, weight.device)
    if backend == "auto":
        return cpu.pack_fastest(weight.detach(), mask.tensors, batch)
    return cpu.pack(weight, mask.tensors, backend)


def plan(batch: int, mask: TileMask, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Says which kernel ``backend="auto"`` would run, and what it expects each to take.

    Returns:
        For a CPU: ``kernel``, ``seconds`` (expected, by kernel, for the forward product with its packing),
        ``dense_s`` and ``speedup`` (dense / chosen), and ``multiply_adds`` (useful work: rows of x times kept
        weights).  For a GPU ``kernel`` alone, because the device must not wait to count the mask.
    """
    if mask.state.device.type != "cpu":
        return {"kernel": gpu_backend("forward").__name__.rpartition(".")[2]}
    seconds = cost_model.estimates("forward", batch, mask.tensors, dtype)
    kernel = min(seconds, key=seconds.__getitem__)
    return {
        "kernel": kernel,
        "seconds": seconds,
        "dense_s": seconds["dense"],
        "speedup": seconds["dense"] / seconds[kernel],
        "multiply_adds": batch * mask.nonzeros(),
    }


_MASK_SCHEMA = (
    "Tensor state, Tensor? bits, Tensor row_count, Tensor row_tiles, Tensor col_count, Tensor col_tiles, "
    "Tensor stats, Tensor? payload, Tensor? scale, Tensor? input_permutation, Tensor? output_permutation, "
    "int[] shape, int[] tile"
)
_library = torch.library.Library("rlnas_fast", "FRAGMENT")
_library.define(
    f"masked_matmul(Tensor x, Tensor weight, Tensor? bias, {_MASK_SCHEMA}, "
    "bool int8_activations, str backend) -> Tensor"
)
_library.define(
    f"masked_matmul_grad_input(Tensor grad_y, Tensor weight, {_MASK_SCHEMA}, str backend) -> Tensor"
)
_library.define(f"masked_matmul_grad_weight(Tensor grad_y, Tensor x, {_MASK_SCHEMA}, str backend) -> Tensor")
_library.define(
    f"masked_matmul_gradients(Tensor grad_y, Tensor x, Tensor weight, {_MASK_SCHEMA}, str backend) "
    "-> (Tensor, Tensor)"
)
_MASK_FIELDS = 13


def _flat(mask: TileTensors) -> tuple[Any, ...]:
    """The mask in the order of the schema."""
    return (*mask[2:], list(mask.shape), list(mask.tile))


def _mask(fields: tuple[Any, ...]) -> TileTensors:
    *tensors, shape, tile = fields
    return TileTensors((shape[0], shape[1]), (tile[0], tile[1]), *tensors)


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    *fields, int8_activations, backend = rest
    mask = _mask(tuple(fields))
    if backend == "reference":
        return masked_matmul_reference(x, weight, mask, bias, int8_activations=int8_activations).contiguous()
    if x.device.type == "cpu":
        return cpu.forward(x, weight, mask, bias, int8_activations, backend)
    x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous()
    module = None
    if backend != "dense":
        module = gpu_product("forward", x, weight, mask, backend, int8_activations)
    if module is not None:
        y: torch.Tensor = module.forward(x, weight, mask, bias, int8_activations)
        return y
    if int8_activations and mask.payload is not None:
        return masked_matmul_reference(x, weight, mask, bias, int8_activations=True).contiguous()
    if mask.input_permutation is not None:
        x = x[:, mask.input_permutation.long()]
    y = _scattered(F.linear(x, _gpu_weight(weight, mask)), mask.output_permutation)
    return y if bias is None else y + bias


def _grad_input(grad_y: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    *fields, backend = rest
    mask = _mask(tuple(fields))
    if grad_y.device.type == "cpu" and backend != "reference":
        return cpu.grad_input(grad_y, weight, mask, backend)
    grad_y, weight = grad_y.contiguous(), weight.contiguous()
    module = None
    if backend not in ("reference", "dense"):
        module = gpu_product("grad_input", grad_y, weight, mask, backend)
    if module is None:
        if mask.output_permutation is not None:
            grad_y = grad_y[:, mask.output_permutation.long()]
        plain = effective_weight(weight, mask) if backend == "reference" else _gpu_weight(weight, mask)
        return _scattered(grad_y @ plain, mask.input_permutation)
    grad_x: torch.Tensor = module.grad_input(grad_y, weight, mask)
    return grad_x


def _grad_weight(grad_y: torch.Tensor, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    *fields, backend = rest
    mask = _mask(tuple(fields))
    if backend == "reference" or (backend == "dense" and x.device.type != "cpu"):
        if mask.output_permutation is not None:
            grad_y = grad_y[:, mask.output_permutation.long()]
        if mask.input_permutation is not None:
            x = x[:, mask.input_permutation.long()]
        return effective_weight(grad_y.t() @ x, mask._replace(payload=None, scale=None))
    if x.device.type == "cpu":
        return cpu.grad_weight(grad_y, x, mask, backend)
    grad_w: torch.Tensor = gpu_backend("grad_weight", backend).grad_weight(
        grad_y.contiguous(), x if x.stride(-1) == 1 else x.contiguous(), mask
    )
    return grad_w


def _gradients(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *fields, backend = rest
    if grad_y.device.type == "cpu" and backend != "reference":
        return cpu.gradients(grad_y, x, weight, _mask(tuple(fields)), backend)
    return _grad_input(grad_y, weight, *rest), _grad_weight(grad_y, x, *rest)


def _gpu_weight(weight: torch.Tensor, mask: TileTensors) -> torch.Tensor:
    """W o M in one pass over the weight."""
    masked: torch.Tensor = gpu_backend("effective_weight").effective_weight(weight, mask)
    return masked


def _scattered(y: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return y.contiguous() if order is None else torch.empty_like(y).index_copy_(1, order.long(), y)


def _on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Launches go to the current device, so the first argument's must be it."""

    def guarded(first: torch.Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device):
            return implementation(first, *rest)

    return guarded


_implementations: dict[str, Callable[..., Any]] = {
    "masked_matmul": _forward,
    "masked_matmul_grad_input": _grad_input,
    "masked_matmul_grad_weight": _grad_weight,
    "masked_matmul_gradients": _gradients,
}
for _name, _implementation in _implementations.items():
    _library.impl(_name, _implementation, "CPU")
    _library.impl(_name, _on_its_device(_implementation), "CUDA")


@torch.library.register_fake("rlnas_fast::masked_matmul", lib=_library)
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("rlnas_fast::masked_matmul_grad_input", lib=_library)
def _(grad_y: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return grad_y.new_empty(grad_y.shape[0], weight.shape[1])


@torch.library.register_fake("rlnas_fast::masked_matmul_grad_weight", lib=_library)
def _(grad_y: torch.Tensor, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(grad_y.shape[1], x.shape[1])


@torch.library.register_fake("rlnas_fast::masked_matmul_gradients", lib=_library)
def _(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    first, second, *rest = inputs
    tensors = [value for value in rest if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(first, second, *tensors)
    # Which arguments were tensors: saved ones go through autograd, so that a mask changed in between is
    # noticed.
    ctx.others = [None if isinstance(value, torch.Tensor) else (value,) for value in rest]


def _restore(ctx: Any) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    first, second, *tensors = ctx.saved_tensors
    saved = iter(tensors)
    return first, second, [next(saved) if other is None else other[0] for other in ctx.others]


def _backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
    x, weight, (_, *fields, _, backend) = _restore(ctx)
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    ops = torch.ops.rlnas_fast
    grad_x = grad_w = None
    if need_x and need_weight and not torch.is_grad_enabled():  # else each will be differentiated again
        grad_x, grad_w = ops.masked_matmul_gradients.default(grad_y, x, weight, *fields, backend)
    else:
        grad_x = ops.masked_matmul_grad_input.default(grad_y, weight, *fields, backend) if need_x else None
        grad_w = ops.masked_matmul_grad_weight.default(grad_y, x, *fields, backend) if need_weight else None
    grad_b = grad_y.sum(0) if need_bias else None
    return grad_x, grad_w, grad_b, *[None] * (_MASK_FIELDS + 2)


def _twice(fields: list[Any]) -> list[Any]:
    if fields[7] is not None:
        raise RuntimeError("masked_matmul with room for int8 tiles can be differentiated once, not twice")
    return fields


def _backward_of_grad_input(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_y, weight, (*fields, backend) = _restore(ctx)
    fields, ops = _twice(fields), torch.ops.rlnas_fast
    need_y, need_weight, *_ = ctx.needs_input_grad
    grad_grad_y = ops.masked_matmul.default(grad, weight, None, *fields, False, backend) if need_y else None
    grad_w = ops.masked_matmul_grad_weight.default(grad_y, grad, *fields, backend) if need_weight else None
    return grad_grad_y, grad_w, *[None] * (_MASK_FIELDS + 1)


def _backward_of_grad_weight(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_y, x, (*fields, backend) = _restore(ctx)
    fields, ops = _twice(fields), torch.ops.rlnas_fast
    need_y, need_x, *_ = ctx.needs_input_grad
    grad_grad_y = ops.masked_matmul.default(x, grad, None, *fields, False, backend) if need_y else None
    grad_x = ops.masked_matmul_grad_input.default(grad_y, grad, *fields, backend) if need_x else None
    return grad_grad_y, grad_x, *[None] * (_MASK_FIELDS + 1)


_derivatives: dict[str, Callable[..., Any]] = {
    "masked_matmul": _backward,
    "masked_matmul_grad_input": _backward_of_grad_input,
    "masked_matmul_grad_weight": _backward_of_grad_weight,
}
for _name, _derivative in _derivatives.items():
    torch.library.register_autograd(f"rlnas_fast::{_name}", _derivative, setup_context=_save, lib=_library)


_PLAIN_TENSOR = torch._C._dispatch_keys(torch.empty(0)).raw_repr()
_NO_MODE = torch._C._dispatch_tls_local_include_set().raw_repr()


def _unwatched(*tensors: torch.Tensor | None) -> bool:
    """Says whether only the product of CPU tensors is wanted: the operator's dispatch may then be skipped.

    It takes longer than small products.  Whoever watches operators (gradients, tracing, modes such as the
    counter of FLOPs, ``torch.func``, subclasses of tensors) shows in the keys that PyTorch dispatches by.
    """
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() & ~_NO_MODE:
        return False
    grad = torch.is_grad_enabled()
    return all(
        tensor is None
        or not (
            (grad and tensor.requires_grad) or torch._C._dispatch_keys(tensor).raw_repr() & ~_PLAIN_TENSOR
        )
        for tensor in tensors
    )


def _packed_product(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dtype != packed.weight.dtype:
        raise ConfigError(f"x is {x.dtype} but was packed for {packed.weight.dtype}; pack again")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ConfigError("a packed weight has no gradients; leave packed out, or use torch.no_grad()")
    if packed.kernel == "direct" and x.shape[0] > cpu.DIRECT_ROWS:
        raise ConfigError(
            f"packed for at most {cpu.DIRECT_ROWS} rows of x, got {x.shape[0]}; pack with batch="
        )
    return cpu.forward_packed(x.resolve_neg(), packed, None if bias is None else bias.resolve_neg())


def _autocast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if weight.dim() != 2:
        raise ShapeError(f"weight must be [out features, in features], got shape {list(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"x must end in {weight.shape[1]} features like the weight, got shape {list(x.shape)}"
        )
    if x.dtype not in _DTYPES:
        raise ConfigError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != x.dtype:
            raise ConfigError(f"{name} must have x's dtype {x.dtype}, got {other.dtype}; cast one of them")
        if other is not None and other.device != x.device:
            raise ShapeError(f"{name} is on {other.device} but x on {x.device}; move one of them")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ShapeError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")


def _check_mask_tensor(mask: torch.Tensor, weight: torch.Tensor) -> None:
    if mask.shape != weight.shape:
        raise ShapeError(f"mask must be {list(weight.shape)} like the weight, got {list(mask.shape)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ConfigError(f"mask must be bool, real-valued or a TileMask, got {mask.dtype}; use mask.bool()")
    if mask.device != weight.device:
        raise ShapeError(f"mask is on {mask.device} but weight on {weight.device}; move one of them")


def _check_tile_mask(mask: TileMask, weight: torch.Tensor) -> None:
    if not isinstance(mask, TileMask):
        raise ConfigError(f"mask must be a tensor or a TileMask, got {type(mask).__name__}")
    if mask.shape != tuple(weight.shape):
        raise ShapeError(f"mask must be {list(weight.shape)} like the weight, got {list(mask.shape)}")
    if mask.tensors.state.device != weight.device:
        raise ShapeError(
            f"mask is on {mask.tensors.state.device} but weight on {weight.device}; use mask.to(...)"
        )


def _register_flops() -> None:
    """Counts useful work: two operations for each row of x and kept weight.

    Under fake tensors, where the mask has no values, the dense product is counted.
    """
    from torch.utils.flop_counter import register_flop_formula

    def useful(batch: int, stats: Any, shape: list[int]) -> int:
        if type(stats) is torch.Tensor:
            return 2 * batch * int(stats[2])
        return 2 * batch * shape[0] * shape[1]

    ops = torch.ops.rlnas_fast
    for op, first_field, products in (
        (ops.masked_matmul, 3, 1),
        (ops.masked_matmul_grad_input, 2, 1),
        (ops.masked_matmul_grad_weight, 2, 1),
        (ops.masked_matmul_gradients, 3, 2),
    ):

        def formula(
            *args: Any, at: int = first_field, times: int = products, out_val: Any = None, **_: Any
        ) -> int:
            return times * useful(args[0].shape[0], args[at + 6], args[at + 11])

        register_flop_formula(op, get_raw=True)(formula)


_register_flops()
