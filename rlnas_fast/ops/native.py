"""Loads the compiled modules and says why one of them cannot be used."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch  # first: the compiled modules share the thread pool it has loaded

from rlnas_fast.errors import KernelUnavailable

__all__ = ["cpu", "cuda", "cuda_unavailable_reason"]


@functools.cache
def cpu() -> ModuleType:
    """Returns the compiled CPU module.

    Raises:
        KernelUnavailable: it was not built, or cannot be loaded.
    """
    module = _load("_cpu", "install the package with a C++17 compiler: pip install .")
    module.learn_torch(torch, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
    return module


@functools.cache
def cuda() -> ModuleType:
    """Returns the compiled CUDA module (importing it needs no driver).

    Raises:
        KernelUnavailable: it was not built, or cannot be loaded.
    """
    return _load("_cuda", "install the package where nvcc is: RLNAS_CUDA=1 pip install .")


@functools.cache
def cuda_unavailable_reason() -> str | None:
    """Returns why CUDA C++ kernels cannot run here, or None when they can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    try:
        cuda()
    except KernelUnavailable as error:
        return str(error)
    return None


def _load(name: str, remedy: str) -> ModuleType:
    try:
        return importlib.import_module(f"rlnas_fast.{name}")
    except ImportError as error:
        raise KernelUnavailable(f"rlnas_fast.{name} cannot be imported ({error}); {remedy}") from error
