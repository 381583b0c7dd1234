"""What running a network costs on a device, measured; and what makes a figure less than it seems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import MeterError

if TYPE_CHECKING:
    from ..search.protocols import Meter

__all__ = ["meter_for"]


def meter_for(device: str) -> Meter:
    """The latency meter for ``device``, with its default settings.  Can be pickled.

    On a GPU it replays the call as a CUDA graph.  Launched from Python, small networks take as long as
    the host needs, and 8 times as long as the GPU: two processes on one H200 agreed on that to within
    7 % (36 % at the 90th percentile), on the replayed latency to within 0.3 % (1 %).

    Args:
        device: "cpu", "cuda" or "cuda:<index>".
    Raises:
        MeterError: nothing here can measure on such a device.
    """
    if device == "cpu":
        from .wall_clock import WallClockMeter

        return WallClockMeter()
    if device.partition(":")[0] == "cuda":
        from .cuda_events import CudaEventMeter

        return CudaEventMeter(device, graph=True)
    raise MeterError(f"device {device!r} cannot be measured: give 'cpu', 'cuda' or 'cuda:<index>'")
