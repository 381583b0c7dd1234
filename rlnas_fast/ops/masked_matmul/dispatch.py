"""Which backend serves a tensor's device."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from rlnas_fast.errors import ConfigError, KernelUnavailable
from rlnas_fast.ops.masked_matmul.tile_mask import TileTensors

__all__ = ["BACKENDS", "check_backend", "gpu_backend", "gpu_product"]

CPU_KERNELS = ("dense", "tiles", "rows", "direct")
GPU_BACKENDS = ("triton", "cuda")
BACKENDS = ("auto", "reference", *CPU_KERNELS, *GPU_BACKENDS)


def check_backend(backend: str, device: torch.device) -> None:
    """Refuses a backend that does not exist or does not run on a device.

    Raises:
        ConfigError: there is no such backend.
        KernelUnavailable: it cannot run on this device, or on this machine.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; choose one of: {', '.join(BACKENDS)}")
    if backend in ("auto", "reference"):
        return
    if device.type == "cuda" and backend in CPU_KERNELS[1:]:
        raise KernelUnavailable(
            f"backend {backend!r} runs on a CPU, but x is on {device}; use 'auto' or 'triton'"
        )
    if device.type != "cuda" and backend in GPU_BACKENDS:
        raise KernelUnavailable(f"backend {backend!r} needs a CUDA device, but x is on {device}; use 'auto'")
    if device.type == "cuda" and backend in GPU_BACKENDS:
        reason = _module(backend).unavailable_reason()
        if reason is not None:
            raise KernelUnavailable(f"backend {backend!r}: {reason}")


def gpu_backend(function: str, backend: str = "auto") -> ModuleType:
    """Returns the GPU module that defines a function of the contract (see ``op``) and can run here.

    Raises:
        KernelUnavailable: none does; says why for each.
    """
    reasons = []
    for name in GPU_BACKENDS if backend == "auto" else (backend,):
        module = _module(name)
        reason = module.unavailable_reason()
        if reason is None and hasattr(module, function):
            return module
        reasons.append(f"{name}: {reason or f'has no {function}'}")
    raise KernelUnavailable(f"no GPU kernel for masked_matmul {function} ({'; '.join(reasons)})")


def gpu_product(
    function: str, x: torch.Tensor, weight: torch.Tensor, mask: TileTensors, backend: str, *options: bool
) -> ModuleType | None:
    """Returns the module for ``forward`` or ``grad_input``: CUDA C++ where it covers a case, or Triton.

    None means the dense product, with the mask applied to the weight first: with single weights masked,
    Triton's kernel took 350 us and more where the dense product took 24 (H200, 4096 x 4096, 512 rows, bf16).
    """
    if backend != "auto":
        return gpu_backend(function, backend)
    cuda = _module("cuda")
    refuses = getattr(cuda, f"{function}_refusal")
    proven = cuda.chosen_by_auto(function, x.shape[0], mask)
    if proven and cuda.unavailable_reason() is None and refuses(x, weight, mask, *options) is None:
        return cuda
    return gpu_backend(function) if mask.bits is None else None


def _module(backend: str) -> ModuleType:
    stem = {"triton": "triton_kernels", "cuda": "cuda"}[backend]
    try:
        return importlib.import_module(f"rlnas_fast.ops.masked_matmul.{stem}")
    except ImportError as error:
        raise KernelUnavailable(
            f"backend {backend!r} cannot be imported ({error}); install triton"
        ) from error
