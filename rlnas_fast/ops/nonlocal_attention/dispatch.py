"""Which backend serves a tensor, and why another does not."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from rlnas_fast.errors import KernelUnavailable, unknown_name

__all__ = ["AUTOCAST", "BACKENDS", "DTYPES", "check_backend", "kernels", "kernels_name"]

MODULES = {"cpu": "cpu", "triton": "triton_kernels", "cuda": "cuda"}
BACKENDS = ("auto", "reference", *MODULES)
AUTOCAST = ("cpu", "cuda")  # asking torch about another device raises
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_backend(backend: str, device: torch.device) -> None:
    """Refuses a backend that does not exist, or was asked for by name and cannot run.

    Raises:
        ConfigError: there is no such backend.
        KernelUnavailable: it cannot run on this device, or on this machine; says why and what to do.
    """
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if backend in ("auto", "reference"):
        return
    wanted = "cpu" if backend == "cpu" else "cuda"
    if device.type != wanted:
        raise KernelUnavailable(
            f"backend {backend!r} needs a tensor on {wanted}, but theta is on {device}; use backend='auto'"
        )
    if (reason := _module(backend)[1]) is not None:
        raise KernelUnavailable(f"backend {backend!r}: {reason}")


def kernels(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Returns the module whose kernels run on this device, or None where plain PyTorch does."""
    name = kernels_name(backend, device.type, dtype)
    return _module(name)[0] if name else None


@torch.compiler.assume_constant_result
def kernels_name(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """Returns ``cpu``, ``triton`` or ``cuda``, or nothing where plain PyTorch runs.

    ``auto`` takes the first that is usable: the compiled module on a CPU, Triton before CUDA C++ on a GPU.
    float64 has no kernels.
    """
    if backend == "reference" or dtype not in DTYPES:
        return ""
    if backend != "auto":
        return backend
    candidates = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}.get(device_type, ())
    return next((name for name in candidates if _module(name)[1] is None), "")


@functools.cache
def _module(backend: str) -> tuple[ModuleType | None, str | None]:
    """The backend's module, and why it cannot run here."""
    try:
        module = importlib.import_module(f"rlnas_fast.ops.nonlocal_attention.{MODULES[backend]}")
    except ImportError as error:
        return None, f"{error}; install it: pip install 'rlnas_fast[gpu]'"
    return module, module.unavailable_reason()
