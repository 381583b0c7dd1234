"""Latency on a CPU, by the wall clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MeterError
from ..search.trial import Cost
from .energy import Energy, measure_energy
from .exclusion import measuring
from .rapl import RaplBoard
from .sampling import Samples, sample, unsteady

SPREAD = 0.025
AGREEMENT = 0.05
FOREIGN_SHARE = 0.25
AGAIN = 2
LONG_SECONDS = 1.0


class WallClockMeter:
    """Measures the latency of a call that is over when it returns, as calls on a CPU are.

    Nothing of ours trains on this CPU meanwhile (``exclusion``).  A call of some milliseconds takes
    about ``warmup_seconds`` + ``seconds`` to measure; one that takes longer is made 7 times.  Where
    something disturbs that, it is done again, up to twice: what was undisturbed counts, or the fastest.

    Args:
        warmup_seconds: most time for the warm-up.
        seconds: most time for the calls that count.
        energy_seconds: length of a window in which the packages' energy (RAPL) is measured too, or None to
            leave energy unknown.
        clock: a clock in seconds; a test gives its own.
    """

    def __init__(
        self,
        *,
        warmup_seconds: float = 0.04,
        seconds: float = 0.1,
        energy_seconds: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._warmup_seconds = warmup_seconds
        self._seconds = seconds
        self._energy_seconds = energy_seconds
        self._clock = clock

    def provides(self) -> tuple[str, ...]:
        """Names of the costs it measures; energy only where a window for it was given."""
        return ("latency_s", *(() if self._energy_seconds is None else ("energy_j", "power_w")))

    def measure(self, call: Callable[[], Any]) -> Cost:
        """Median latency with 10th and 90th percentile, and energy if it was asked for."""
        with measuring("cpu"):
            samples, caveats = self._timed(call)
            for _ in range(AGAIN):
                if not caveats or samples.seconds.sum() > LONG_SECONDS:
                    break
                again, said = self._timed(call)
                if not said or again.median_s < samples.median_s:
                    samples, caveats = again, said
            energy = self._energy(call)
        if energy.reason:
            caveats += (f"energy unknown: {energy.reason}",)
        return Cost(
            latency_s=samples.median_s,
            latency_low_s=samples.percentile_s(10),
            latency_high_s=samples.percentile_s(90),
            energy_j=energy.energy_j,
            power_w=energy.power_w,
            caveats=caveats + energy.caveats,
        )

    def _timed(self, call: Callable[[], Any]) -> tuple[Samples, tuple[str, ...]]:
        def timed() -> float:
            started = self._clock()
            call()
            return self._clock() - started

        load = Load()
        samples = sample(
            timed,
            warmup_seconds=self._warmup_seconds,
            seconds=self._seconds,
            spread=SPREAD,
            clock=self._clock,
        )
        return samples, load.caveats() + unsteady(samples, AGREEMENT)

    def _energy(self, call: Callable[[], Any]) -> Energy:
        if self._energy_seconds is None:
            return Energy()
        return package_energy(call, self._energy_seconds)


def package_energy(call: Callable[[], Any], seconds: float) -> Energy:
    """Joules a call of the CPU's packages, or why they are unknown."""
    try:
        return measure_energy(RaplBoard(), call, lambda: None, seconds=seconds)
    except MeterError as error:
        return Energy(reason=str(error))


class Load:
    """What else keeps this machine's CPUs busy, from its start to ``caveats``."""

    def __init__(self) -> None:
        self._busy_s, self._total_s, self._stolen_s = _cpu_seconds()
        self._own_s = _own_seconds()

    def caveats(self) -> tuple[str, ...]:
        busy_s, total_s, stolen_s = (
            now - then
            for now, then in zip(_cpu_seconds(), (self._busy_s, self._total_s, self._stolen_s), strict=True)
        )
        if total_s <= 0:
            return ()
        foreign = (busy_s - (_own_seconds() - self._own_s)) / total_s
        found = []
        if foreign > FOREIGN_SHARE:
            found.append(f"other processes used {foreign:.0%} of the CPU meanwhile")
        if stolen_s / total_s > 0.05:
            found.append(f"the hypervisor took {stolen_s / total_s:.0%} of the CPU away meanwhile")
        return tuple(found)


def _cpu_seconds() -> tuple[float, float, float]:
    """(busy, all, stolen) seconds of all CPUs since boot: proc_stat(5)."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0, 0.0, 0.0
    user, nice, system, idle, waiting, interrupt, soft, stolen, *_ = (int(f) / _TICKS for f in fields)
    busy = user + nice + system + interrupt + soft
    return busy, busy + idle + waiting + stolen, stolen


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


_TICKS = os.sysconf("SC_CLK_TCK")
