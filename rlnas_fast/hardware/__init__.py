"""What running a network costs on a device, measured; and what makes a figure less than it seems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import MeterError

if TYPE_CHECKING:
    from ..search.protocols import Meter

__all__ = ["meter_for", "require_energy"]

ENERGY_SECONDS = 2.0


def meter_for(device: str, *, energy: bool = False) -> Meter:
    """The latency meter for ``device``, with its default settings.  Can be pickled.

    On a GPU it replays the call as a CUDA graph.  Launched from Python, small networks take as long as
    the host needs, and 8 times as long as the GPU: two processes on one H200 agreed on that to within
    7 % (36 % at the 90th percentile), on the replayed latency to within 0.3 % (1 %).

    Args:
        device: "cpu", "cuda" or "cuda:<index>".
        energy: measure energy too, in windows of ``ENERGY_SECONDS``.
    Raises:
        MeterError: nothing here can measure on such a device, or not its energy; says why.
    """
    if energy:
        require_energy(device)
    window_s = ENERGY_SECONDS if energy else None
    if device == "cpu":
        from .wall_clock import WallClockMeter

        return WallClockMeter(energy_seconds=window_s)
    if device.partition(":")[0] == "cuda":
        from .cuda_events import CudaEventMeter

        return CudaEventMeter(device, graph=True, energy_seconds=window_s)
    raise MeterError(f"device {device!r} cannot be measured: give 'cpu', 'cuda' or 'cuda:<index>'")


def require_energy(device: str) -> None:
    """Returns if energy can be measured on ``device`` now.

    Raises:
        MeterError: it cannot; says why, and what to do.
    """
    from .energy import readable

    try:
        if device == "cpu":
            from .rapl import RaplBoard

            readable(RaplBoard())
        else:
            from .nvml import NvmlBoard, gpu_uuid

            with NvmlBoard(gpu_uuid(device)) as board:
                readable(board)
    except MeterError as error:
        raise MeterError(
            f"energy cannot be measured on {device}: {error}; leave out what asks for energy, "
            "or take a device that `rlnas doctor` shows to have it"
        ) from error
