"""Which device this is: a figure that was measured on one device says nothing of another."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from ..errors import MeterError


def device_identity(device: str) -> dict[str, str]:
    """What a measured cost depends on beside the network: the hardware and what drives it.

    Args:
        device: "cpu", "cuda" or "cuda:<index>".
    Raises:
        MeterError: there is no such device here.
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        return _cpu()
    if kind == "cuda":
        return _cuda(device)
    raise MeterError(f"device {device!r} is not known: give 'cpu', 'cuda' or 'cuda:<index>'")


def _cpu() -> dict[str, str]:
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else os.environ.get("OMP_NUM_THREADS", "default")
    return {
        "kind": "cpu",
        "name": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(threads),
        "machine": platform.machine(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _cuda(device: str) -> dict[str, str]:
    import torch

    try:
        properties = torch.cuda.get_device_properties(device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise MeterError(f"device {device!r} cannot be used: {reason}; see `rlnas doctor`") from error
    return {
        "kind": "cuda",
        "name": properties.name,
        "uuid": str(properties.uuid),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory_bytes": str(properties.total_memory),
        "cuda": str(torch.version.cuda),
    }
