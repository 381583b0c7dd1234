"""Loads the compiled modules and says why one of them cannot be used."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch  # first: the compiled modules share the thread pool it has loaded

from rlnas_fast.errors import KernelUnavailable

__all__ = ["cpu", "cuda", "cuda_unavailable_reason", "torch_calls", "torch_calls_unavailable_reason"]


@functools.cache
def cpu() -> ModuleType:
    """Returns the compiled CPU module.

    Raises:
        KernelUnavailable: it was not built, or cannot be loaded.
    """
    return _load("_cpu", "install the package with a C++17 compiler: pip install .")


@functools.cache
def torch_calls() -> ModuleType | None:
    """Returns the module that calls CPU kernels past Python, or None where it cannot be used.

    It serves the torch that it was compiled against. Nothing but time is lost without it.
    """
    return None if torch_calls_unavailable_reason() else importlib.import_module("rlnas_fast._torch")


@functools.cache
def torch_calls_unavailable_reason() -> str | None:
    """Returns why calls of CPU kernels go through Python, or None when they need not."""
    remedy = "install the package again where torch is: pip install --force-reinstall --no-deps ."
    try:
        kernels, calls = cpu(), _load("_torch", remedy)
    except KernelUnavailable as error:
        return str(error)
    if calls.KERNEL_INTERFACE != kernels.KERNEL_INTERFACE:
        return f"rlnas_fast._torch is from another build than rlnas_fast._cpu; {remedy}"
    return None


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
