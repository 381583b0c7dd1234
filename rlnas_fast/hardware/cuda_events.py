"""Latency, memory and, where NVML answers, energy on an NVIDIA GPU."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

from ..errors import MeterError
from ..search.trial import Cost
from .energy import Energy, measure_energy
from .exclusion import measuring
from .nvml import NvmlBoard, gpu_uuid
from .sampling import Samples, sample, unsteady

SPREAD = 0.01
AGREEMENT = 0.02


class CudaEventMeter:
    """Measures a call on a CUDA device between two events, nothing else of ours running there.

    Each call starts on an idle device, so the eager latency has in it what launching costs; replayed as
    a CUDA graph the launches are gone.  For small networks the two differ by 3 and more.

    Args:
        device: "cuda" or "cuda:<index>".
        graph: replay the call as a CUDA graph.  A call that cannot be captured is measured eagerly, and
            a caveat says so.
        energy_seconds: length of a window in which energy is measured too, at least 50 ticks of the
            board's counter (1 to 5 s), or None to leave energy unknown.
        warmup_seconds: most time for the warm-up.
        seconds: most time for the calls that count.
    """

    def __init__(
        self,
        device: str = "cuda",
        *,
        graph: bool = False,
        energy_seconds: float | None = None,
        warmup_seconds: float = 0.2,
        seconds: float = 0.2,
    ) -> None:
        self._device = device
        self._graph = graph
        self._energy_seconds = energy_seconds
        self._warmup_seconds = warmup_seconds
        self._seconds = seconds

    def on_device(self, device: str) -> CudaEventMeter:
        """The same meter for another device."""
        other = copy.copy(self)
        other._device = device
        return other

    def provides(self) -> tuple[str, ...]:
        """Names of the costs it measures; energy only where a window for it was given."""
        energy = ("energy_j", "power_w") if self._energy_seconds is not None else ()
        return ("latency_s", "peak_memory_bytes", *energy)

    def measure(self, call: Callable[[], Any]) -> Cost:
        """Median latency with 10th and 90th percentile, peak memory, and energy if it was asked for."""
        import torch

        with measuring(self._device), torch.cuda.device(self._device):
            peak_memory_bytes = peak_memory(call)
            caveats: tuple[str, ...] = ()
            if self._graph:
                try:
                    call = captured(call)
                except MeterError as error:
                    caveats += (f"eager latency: {error}",)
            samples = time_on_device(call, self._warmup_seconds, self._seconds)
            caveats += unsteady(samples, AGREEMENT) + board_state(self._device)[1]
            energy = self._energy(call)
        if energy.reason:
            caveats += (f"energy unknown: {energy.reason}",)
        return Cost(
            latency_s=samples.median_s,
            latency_low_s=samples.percentile_s(10),
            latency_high_s=samples.percentile_s(90),
            energy_j=energy.energy_j,
            power_w=energy.power_w,
            peak_memory_bytes=peak_memory_bytes,
            caveats=caveats + energy.caveats,
        )

    def _energy(self, call: Callable[[], Any]) -> Energy:
        if self._energy_seconds is None:
            return Energy()
        return energy_on_device(self._device, call, self._energy_seconds)


def time_on_device(call: Callable[[], Any], warmup_seconds: float, seconds: float) -> Samples:
    """Times ``call`` between CUDA events on the current device, each call on an idle device."""
    import torch

    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)

    def timed() -> float:
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return sample(timed, warmup_seconds=warmup_seconds, seconds=seconds, spread=SPREAD)


def captured(*calls: Callable[[], Any]) -> Callable[[], None]:
    """``calls`` as CUDA graphs, one of which is replayed at a time, in turn.

    Raises:
        MeterError: a call cannot be captured; says why in one line.
    """
    import torch

    stream: Any = torch.cuda.Stream
    side = stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graphs: list[Any] = []
    try:
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
                call()
            graphs.append(graph)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()
        raise MeterError(f"the call is not captured as a CUDA graph: {str(error).splitlines()[0]}") from error
    turn = itertools.cycle(graphs)

    def replay() -> None:
        next(turn).replay()

    return replay


def peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes allocated on the current device during one call, what was there before included."""
    import torch

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def energy_on_device(device: str, call: Callable[[], Any], seconds: float) -> Energy:
    """Joules a call on ``device``, or why they are unknown."""
    import torch

    try:
        with NvmlBoard(gpu_uuid(device)) as board:
            return measure_energy(board, call, torch.cuda.synchronize, seconds=seconds)
    except MeterError as error:
        return Energy(reason=str(error))


def board_state(device: str) -> tuple[int | None, tuple[str, ...]]:
    """(clock in MHz, what spoils a figure) as the board of ``device`` says it now."""
    try:
        with NvmlBoard(gpu_uuid(device)) as board:
            state = board.state()
    except MeterError as error:
        return None, (f"throttling and other processes unknown: {error}",)
    found = [f"the clocks are held down: {reason}" for reason in state.throttled]
    found += [f"process {pid} uses the GPU too" for pid in state.foreign]
    return state.clock_mhz, tuple(found)
