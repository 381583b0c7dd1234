"""One GPU as NVIDIA's management library sees it: its energy counter, its power, what spoils a figure."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ..errors import MeterError


class NvmlError(MeterError):
    """The management library answered with an error."""


class NvmlMissing(NvmlError):
    """The library, its binding or its driver is not there, or they do not fit each other."""


class NotSupported(NvmlError):
    """This board or its mode does not offer what was asked for."""


class PermissionNeeded(NvmlError):
    """What was asked for needs rights that this process does not have."""


class GpuLost(NvmlError):
    """The GPU fell off the bus or needs a reset."""


class GpuNotFound(NvmlError):
    """There is no GPU with this UUID or index."""


@dataclass(frozen=True)
class BoardState:
    """What may spoil a figure, at one moment.

    Attributes:
        throttled: reasons for which the clocks are held down: "thermal", "power cap", ...
        foreign: ids of processes that use the GPU and are not ours.
        clock_mhz: clock of the multiprocessors, or None.
        ecc_errors: uncorrected memory errors since boot, or None.
    """

    throttled: tuple[str, ...] = ()
    foreign: tuple[int, ...] = ()
    clock_mhz: int | None = None
    ecc_errors: int | None = None


class Board(Protocol):
    """What energy is measured with: a board, a recording of one, or one that is being recorded."""

    def now(self) -> float:
        """Seconds of a clock that never goes back."""
        ...

    def wait(self, seconds: float) -> None: ...

    def shared(self) -> str | None:
        """Why energy counted here is not that of our work alone, or None."""
        ...

    def energy_mj(self) -> int:
        """Millijoules since the driver loaded, in ticks of 10 to 100 ms.  NotSupported before Volta."""
        ...

    def power_mw(self) -> int:
        """Momentary power of the board."""
        ...

    def averaged_power(self) -> bool:
        """Whether ``power_mw`` is an average over about a second, for want of a momentary value."""
        ...

    def state(self) -> BoardState: ...


class NvmlBoard:
    """A GPU through ``nvidia-ml-py``.  Holds the library from construction to ``close``.

    Not to be pickled: a worker process opens its own.

    Args:
        gpu: its UUID ("GPU-..."), or its index among all GPUs, whatever CUDA_VISIBLE_DEVICES says.
        clock, sleep: time in seconds; a test gives its own.
    Raises:
        NvmlMissing: no binding, library or driver, or a mismatch of the two.
        GpuNotFound: no such GPU; says which there are.
    """

    def __init__(
        self,
        gpu: str | int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.now = clock
        self.wait = sleep
        self._nvml = _binding()
        self._open = False
        with _typed("opening the library"):
            self._nvml.nvmlInit()
        self._open = True
        try:
            self._handle = self._find(gpu)
            with _typed("reading the UUID"):
                self.uuid: str = self._nvml.nvmlDeviceGetUUID(self._handle)
        except BaseException:
            self.close()
            raise

    def shared(self) -> str | None:
        """MIG splits the board between tenants; its counters do not."""
        try:
            with _typed("reading the MIG mode"):
                current, _ = self._nvml.nvmlDeviceGetMigMode(self._handle)
        except NotSupported:
            return None
        return "the GPU is split (MIG) and its energy is counted for all of it" if current else None

    def energy_mj(self) -> int:
        with _typed("reading the energy counter"):
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def power_mw(self) -> int:
        instant = self._instant_power_mw()
        if instant is not None:
            return instant
        with _typed("reading the power"):
            return int(self._nvml.nvmlDeviceGetPowerUsage(self._handle))

    def averaged_power(self) -> bool:
        return self._instant_power_mw() is None

    def state(self) -> BoardState:
        nvml = self._nvml
        clock = self._if_supported(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM)
        errors = self._if_supported(
            nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
        reasons = self._if_supported(_clock_reasons(nvml)) or 0
        processes = self._if_supported(nvml.nvmlDeviceGetComputeRunningProcesses) or []
        return BoardState(
            throttled=tuple(name for bit, name in _throttles(nvml) if reasons & bit),
            foreign=_foreign([int(process.pid) for process in processes]),
            clock_mhz=clock,
            ecc_errors=errors,
        )

    def close(self) -> None:
        """Lets go of the library.  More than once does nothing."""
        if self._open:
            self._open = False
            with _typed("closing the library"):
                self._nvml.nvmlShutdown()

    def __enter__(self) -> NvmlBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, gpu: str | int) -> Any:
        try:
            with _typed(f"looking for GPU {gpu}"):
                if isinstance(gpu, int):
                    return self._nvml.nvmlDeviceGetHandleByIndex(gpu)
                return self._nvml.nvmlDeviceGetHandleByUUID(gpu)
        except GpuNotFound as error:
            with _typed("counting the GPUs"):
                count = self._nvml.nvmlDeviceGetCount()
            raise GpuNotFound(f"there is no GPU {gpu}: NVML sees {count}, see `nvidia-smi -L`") from error

    def _instant_power_mw(self) -> int | None:
        nvml = self._nvml
        try:
            with _typed("reading the momentary power"):
                (field,) = nvml.nvmlDeviceGetFieldValues(self._handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
        except NotSupported:
            return None
        return int(field.value.uiVal) if field.nvmlReturn == nvml.NVML_SUCCESS else None

    def _if_supported(self, query: Callable[..., Any], *arguments: Any) -> Any:
        try:
            with _typed(f"asking {getattr(query, '__name__', 'NVML')}"):
                return query(self._handle, *arguments)
        except (NotSupported, PermissionNeeded):
            return None


def gpu_uuid(device: str) -> str:
    """The UUID by which NVML knows the CUDA device that torch calls ``device``."""
    from .exclusion import lock_key

    return lock_key(device).replace("gpu-", "GPU-", 1)


@functools.cache
def _binding() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise NvmlMissing("the package nvidia-ml-py is not installed: pip install nvidia-ml-py") from error
    return pynvml


@contextmanager
def _typed(doing: str) -> Iterator[None]:
    """Turns the library's codes into our errors, the cause chained."""
    nvml = _binding()
    try:
        yield
    except nvml.NVMLError as error:
        kind, remedy = _KINDS.get(error.value, (NvmlError, "see the driver's log"))
        raise kind(f"NVML, {doing}: {error} ({remedy})") from error


_KINDS: dict[int, tuple[type[NvmlError], str]] = {
    2: (GpuNotFound, "give an index or UUID that `nvidia-smi -L` lists"),
    3: (NotSupported, "this board or its mode does not offer it"),
    4: (PermissionNeeded, "ask the administrator, or run without it"),
    6: (GpuNotFound, "give an index or UUID that `nvidia-smi -L` lists"),
    9: (NvmlMissing, "the NVIDIA driver is not loaded: see `rlnas doctor`"),
    12: (NvmlMissing, "libnvidia-ml.so.1 comes with the driver: see `rlnas doctor`"),
    13: (NotSupported, "the driver is older than this function"),
    15: (GpuLost, "the GPU fell off the bus: reset it or restart the machine"),
    16: (GpuLost, "reset the GPU or restart the machine"),
    18: (NvmlMissing, "the driver was updated while it was loaded: restart the machine"),
}
"""NVML's codes (nvmlReturn_t): numbers, because an older binding does not name all of them."""


def _clock_reasons(nvml: Any) -> Any:
    """The query that says why clocks are held down, under the name this binding has for it."""
    return getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or (
        nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    )


def _throttles(nvml: Any) -> tuple[tuple[int, str], ...]:
    """Bits that mean held down by heat or power; idle and clocks that a user has set are none of these."""
    return (
        (nvml.nvmlClocksThrottleReasonSwPowerCap, "power cap"),
        (nvml.nvmlClocksThrottleReasonHwSlowdown, "hardware slowdown"),
        (0x20, "thermal, by software"),
        (0x40, "thermal, by hardware"),
        (0x80, "power brake"),
    )


def _foreign(pids: list[int]) -> tuple[int, ...]:
    """Those that are not ours: neither this process, nor the one it works for, nor workers of either.

    Workers of ours wait while one of them measures (``exclusion``).

    In a container NVML may give the host's numbers.  Then none is ours by number, but one of them is
    this process, which is using the GPU: with n of them n - 1 are foreign.
    """
    parent = multiprocessing.parent_process()
    own = {os.getpid()} | ({parent.pid} if parent and parent.pid else set())
    if own.isdisjoint(pids):
        return tuple(pids[1:])
    return tuple(pid for pid in pids if pid not in own and _parent_of(pid) not in own)


def _parent_of(pid: int) -> int | None:
    """The parent of a process: proc_pid_stat(5), field 4."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
