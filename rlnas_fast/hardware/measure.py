"""Everything that running one module costs on one device, with every caveat that applies."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import MeterError, ShapeError
from . import cuda_events, wall_clock
from .energy import Energy
from .exclusion import measuring
from .identity import device_identity
from .sampling import Samples, sample, unsteady
from .wall_clock import Load

Call = Callable[[], Any]
INPUTS = 8


@dataclass(frozen=True)
class Latency:
    """Seconds of one call.

    Attributes:
        median_s: of all calls.
        interval_s: 95 % interval of the median.
        p10_s, p90_s: 10th and 90th percentile.
        calls: how many were timed.
    """

    median_s: float
    interval_s: tuple[float, float]
    p10_s: float
    p90_s: float
    calls: int


@dataclass(frozen=True)
class ModuleCost:
    """What one forward pass costs.  Unknown is None, and ``unknown`` says why.

    Attributes:
        device: what it was measured on (``identity.device_identity``).
        batch: samples in one pass.
        dtype: of the input, e.g. "float32".
        eager: latency as Python launches it.
        graph: latency as a CUDA graph is replayed.
        throughput_per_s: samples a second, pass after pass without waiting in between.
        energy_j: joules a sample above idle.
        energy_low_j, energy_high_j: its 95 % interval.
        power_w, idle_power_w: of the whole board while it works, and just before.
        peak_memory_bytes: most device memory held, weights included.
        clock_mhz: of the multiprocessors right after the passes.
        flops: of one sample; a multiply-add is two.
        parameters: all, trainable or not.
        unknown: why, by the name of each attribute that is None.
        caveats: what makes figures less than they seem.
    """

    device: dict[str, str]
    batch: int
    dtype: str
    eager: Latency
    graph: Latency | None
    throughput_per_s: float
    energy_j: float | None
    energy_low_j: float | None
    energy_high_j: float | None
    power_w: float | None
    idle_power_w: float | None
    peak_memory_bytes: int | None
    clock_mhz: int | None
    flops: int
    parameters: int
    unknown: dict[str, str]
    caveats: tuple[str, ...]


def measure_module(
    module: nn.Module,
    example_input: Tensor,
    device: str | None = None,
    *,
    energy_seconds: float = 2.0,
    seconds: float = 0.5,
) -> ModuleCost:
    """Measures inference of a copy of ``module`` in eval mode, nothing else of ours on the device.

    Inputs rotate among eight of the same shape, so that a warm cache does not flatter.  A fixed
    reference is timed before and after: if it changed, the device drifted, which a caveat says.

    Args:
        module: takes one tensor; stays as it is.
        example_input: [batch, ...], any dtype that the module takes; its values do not matter.
        device: "cpu", "cuda" or "cuda:<index>"; None takes where the example is.
        energy_seconds: least length of the energy window; 0 leaves energy unknown.
        seconds: most time for each of the two halves of a latency.
    Raises:
        MeterError: the device cannot be used.
        ShapeError: the module does not take this input.
    """
    if example_input.dim() == 0 or example_input.shape[0] == 0:
        raise ShapeError(
            f"example_input {tuple(example_input.shape)}: give [batch, ...] with at least one sample"
        )
    device = device or str(example_input.device)
    identity = device_identity(device)
    backend: _Cpu | _Cuda = _Cuda(device) if identity["kind"] == "cuda" else _Cpu()
    module = copy.deepcopy(module).to(device).eval()
    inputs = [example_input.detach().to(device, copy=True) for _ in range(INPUTS)]
    batch = len(example_input)
    held_bytes = sum(t.nbytes for t in (*module.parameters(), *module.buffers(), *inputs))
    with torch.inference_mode(), measuring(device), backend.active():
        flops = _flops(module, inputs[0])
        calls = [lambda x=x: module(x) for x in inputs]
        eager, caveats = _timed(backend, _rotating(calls), seconds)
        graph, unknown = None, {}
        try:
            graph, graph_caveats = _timed(backend, backend.captured(calls), seconds)
            caveats += graph_caveats
        except MeterError as error:
            unknown["graph"] = str(error)
        throughput_per_s = batch * _passes_a_second(backend, _rotating(calls), eager.median_s)
        peak_memory_bytes = backend.peak_memory(calls[0])
        clock_mhz, state_caveats = backend.state()
        energy = backend.energy(_rotating(calls), energy_seconds)
    if peak_memory_bytes is None:
        unknown["peak_memory_bytes"] = "PyTorch does not count memory on a CPU"
    if clock_mhz is None:
        unknown["clock_mhz"] = "this device does not tell (virtual machines seldom do)"
    for name in ("energy_j", "energy_low_j", "energy_high_j", "power_w", "idle_power_w"):
        if getattr(energy, name) is None:
            unknown[name] = energy.reason or (
                "not asked for" if energy.energy_j is None else "the window has too few ticks for an interval"
            )
    return ModuleCost(
        device=identity,
        batch=batch,
        dtype=str(example_input.dtype).removeprefix("torch."),
        eager=eager,
        graph=graph,
        throughput_per_s=throughput_per_s,
        energy_j=_shared(energy.energy_j, batch),
        energy_low_j=_shared(energy.energy_low_j, batch),
        energy_high_j=_shared(energy.energy_high_j, batch),
        power_w=energy.power_w,
        idle_power_w=energy.idle_power_w,
        peak_memory_bytes=peak_memory_bytes,
        clock_mhz=clock_mhz,
        flops=flops // batch,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        unknown=unknown,
        caveats=tuple(
            dict.fromkeys((*caveats, *backend.warm_cache(held_bytes), *state_caveats, *energy.caveats))
        ),
    )


class _Cpu:
    """How a call is timed on the CPU."""

    agreement = wall_clock.AGREEMENT

    @contextmanager
    def active(self) -> Iterator[None]:
        self._load = Load()
        yield

    def timed(self, call: Call, seconds: float) -> Samples:
        def timed() -> float:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started

        return sample(timed, warmup_seconds=seconds / 2, seconds=seconds, spread=wall_clock.SPREAD / 2)

    def captured(self, calls: Sequence[Call]) -> Call:
        raise MeterError("there are no CUDA graphs on a CPU")

    def synchronize(self) -> None:
        """A call is over when it returns."""

    def warm_cache(self, held_bytes: int) -> tuple[str, ...]:
        return ()  # how much of the last cache is ours, a shared machine does not say

    def peak_memory(self, call: Call) -> int | None:
        return None

    def state(self) -> tuple[int | None, tuple[str, ...]]:
        return _clock_mhz(), self._load.caveats()

    def energy(self, call: Call, seconds: float) -> Energy:
        return wall_clock.package_energy(call, seconds) if seconds else Energy()


def _clock_mhz() -> int | None:
    """Clock of the fastest core that we may use, where the kernel tells."""
    found = []
    for core in os.sched_getaffinity(0):
        with suppress(OSError, ValueError):
            found.append(int(Path(f"/sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq").read_text()))
    return max(found) // 1000 if found else None


class _Cuda:
    """How a call is timed on a GPU."""

    agreement = cuda_events.AGREEMENT

    def __init__(self, device: str) -> None:
        self._device = device

    @contextmanager
    def active(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            yield

    def timed(self, call: Call, seconds: float) -> Samples:
        return cuda_events.time_on_device(call, seconds / 2, seconds)

    def captured(self, calls: Sequence[Call]) -> Call:
        return cuda_events.captured(*calls)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def warm_cache(self, held_bytes: int) -> tuple[str, ...]:
        cache_bytes = int(torch.cuda.get_device_properties(self._device).L2_cache_size)
        if held_bytes > cache_bytes:
            return ()
        return (
            f"warm cache: weights and inputs, {held_bytes / 2**20:.1f} MiB, stay in the L2 between calls",
        )

    def peak_memory(self, call: Call) -> int | None:
        return cuda_events.peak_memory(call)

    def state(self) -> tuple[int | None, tuple[str, ...]]:
        return cuda_events.board_state(self._device)

    def energy(self, call: Call, seconds: float) -> Energy:
        return cuda_events.energy_on_device(self._device, call, seconds) if seconds else Energy()


def _timed(backend: _Cpu | _Cuda, call: Call, seconds: float) -> tuple[Latency, tuple[str, ...]]:
    """Reference, call, call, reference: what drifts in between shows in the reference."""
    x = torch.ones(256, 256, device="cuda" if isinstance(backend, _Cuda) else "cpu")
    before = backend.timed(lambda: x @ x, seconds / 5)
    halves = [backend.timed(call, seconds) for _ in range(2)]
    after = backend.timed(lambda: x @ x, seconds / 5)
    samples = Samples(np.concatenate([half.seconds for half in halves]))
    caveats = unsteady(samples, backend.agreement)
    drift = after.median_s / before.median_s - 1
    if abs(drift) > backend.agreement:
        caveats += (f"the device drifted: a fixed reference took {drift:+.0%} longer afterwards",)
    latency = Latency(
        median_s=samples.median_s,
        interval_s=samples.interval_s,
        p10_s=samples.percentile_s(10),
        p90_s=samples.percentile_s(90),
        calls=len(samples.seconds),
    )
    return latency, caveats


def _rotating(calls: Sequence[Call]) -> Call:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _passes_a_second(backend: _Cpu | _Cuda, call: Call, latency_s: float, seconds: float = 0.2) -> float:
    count = max(3, round(seconds / latency_s))
    backend.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
    backend.synchronize()
    return count / (time.perf_counter() - started)


def _flops(module: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        try:
            module(x)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise ShapeError(
                f"the module does not take an input {tuple(x.shape)}, {x.dtype}: {reason}"
            ) from error
    return int(counter.get_total_flops())


def _shared(joules: float | None, batch: int) -> float | None:
    return None if joules is None else joules / batch
