"""The operators that a forward pass consists of, each with all it needs to run alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Operator:
    """One call of an operator.

    Attributes:
        key: the operator and its arguments' shapes, strides and dtypes: equal keys cost the same.
        kind: the operator alone, e.g. "aten.convolution.default".
        flops: a multiply-add is two; 0 for operators that have no formula.
        bytes_moved: of all tensors that go in and come out.
        alone: makes the same call on fresh tensors of a device.
    """

    key: str
    kind: str
    flops: int
    bytes_moved: int
    alone: Callable[[str], Callable[[], Any]]


def operators_of(module: nn.Module, x: Tensor) -> list[Operator]:
    """The operators that ``module(x)`` runs, in order, found by running it once; views cost nothing."""
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        module(x)
    return recorder.found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Operator] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if not function.is_view:
            self.found.append(_operator(function, args, kwargs, out))
        return out


def _operator(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Operator:
    described = tree_map(_describe, (args, kwargs))
    formula = flop_registry.get(function._overloadpacket)

    def alone(device: str) -> Callable[[], Any]:
        made_args, made_kwargs = tree_map(lambda value: _make(value, device), described)
        return lambda: function(*made_args, **made_kwargs)

    moved = [leaf for leaf in tree_flatten((args, kwargs, out))[0] if isinstance(leaf, Tensor)]
    return Operator(
        key=f"{function}{described}",
        kind=str(function),
        flops=int(formula(*args, **kwargs, out_val=out)) if formula else 0,
        bytes_moved=sum(tensor.numel() * tensor.element_size() for tensor in moved),
        alone=alone,
    )


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}/{list(self.strides)}"


def _describe(value: Any) -> Any:
    return _Tensor(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _make(value: Any, device: str) -> Any:
    """Ones, which no operator of a network is slow or undefined at."""
    if isinstance(value, torch.device):
        return torch.device(device)
    if not isinstance(value, _Tensor):
        return value
    return torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device=device).fill_(1)
