"""Finds out what is usable on this machine, and why not."""

from __future__ import annotations

import importlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        required: a CPU search cannot run without it.
        detail: what was found, or why it cannot be used and what to do.
    """

    what: str
    usable: bool
    detail: str
    required: bool = False


def diagnose() -> list[Finding]:
    """Looks at everything; never raises."""
    return [
        Finding("rlnas_fast", True, __version__, required=True),
        Finding("Python", True, f"{platform.python_version()} on {platform.machine()}", required=True),
        _check("torch", _torch, required=True),
        _check("CPU kernels", _native, required=True),
        _check("fast CPU calls", _torch_calls),
        _check("CUDA devices", _cuda_devices),
        _check("CUDA kernels", _cuda_kernels),
        _check("Triton", _triton),
        _check("NVML", _nvml),
        _check("data folder", _data),
    ]


def print_diagnosis(findings: list[Finding], as_json: bool) -> None:
    """Prints the findings as a table or as JSON."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    table = Table("", "part", "found")
    for finding in findings:
        colour = "green" if finding.usable else "red" if finding.required else "yellow"
        table.add_row(Text("yes" if finding.usable else "no", colour), finding.what, finding.detail)
    Console(emoji=False, markup=False).print(table)
    ready = all(finding.usable for finding in findings if finding.required)
    Console(emoji=False, markup=False).print(
        "A CPU search can run." if ready else "A search cannot run yet.", highlight=False
    )


def _check(what: str, look: Callable[[], str], required: bool = False) -> Finding:
    try:
        return Finding(what, True, look(), required)
    except Exception as error:  # a diagnosis reports whatever a driver or a library throws
        return Finding(what, False, " ".join(str(error).split()) or type(error).__name__, required)


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _native() -> str:
    from ..ops import native

    module = native.cpu()
    return f"instruction set {module.isa()}"


def _torch_calls() -> str:
    from ..ops import native

    reason = native.torch_calls_unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"calls of small blocks take longer: {reason}")
    return "built for this torch"


def _cuda_devices() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _cuda_kernels() -> str:
    from ..ops import native

    reason = native.cuda_unavailable_reason()
    if reason is not None:
        raise RuntimeError(reason)
    return "built"


def _triton() -> str:
    triton = importlib.import_module("triton")
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"{triton.__version__} is installed, but there is no GPU to run its kernels")
    return str(triton.__version__)


def _nvml() -> str:
    pynvml = importlib.import_module("pynvml")
    pynvml.nvmlInit()
    try:
        return f"driver {pynvml.nvmlSystemGetDriverVersion()}, {pynvml.nvmlDeviceGetCount()} devices"
    finally:
        pynvml.nvmlShutdown()


def _data() -> str:
    folder = os.environ.get("RLNAS_DATA_DIR")
    if not folder:
        raise RuntimeError(
            "RLNAS_DATA_DIR is not set: data sets by name are downloaded when they are first used"
        )
    if not Path(folder).is_dir():
        raise RuntimeError(f"RLNAS_DATA_DIR = {folder} is not a folder")
    return folder
