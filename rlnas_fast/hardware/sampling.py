"""Repeats a timed call until its median is known, and says how well it is known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Samples:
    """Seconds of repeated calls.

    Attributes:
        seconds: float64 [calls], in the order measured.
    """

    seconds: np.ndarray

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))

    def percentile_s(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))

    @property
    def interval_s(self) -> tuple[float, float]:
        """95 % interval of the median, from order statistics: no distribution is assumed."""
        ordered = np.sort(self.seconds)
        count = len(ordered)
        reach = 0.98 * math.sqrt(count)
        low, high = math.floor(count / 2 - reach), math.ceil(count / 2 + reach)
        return float(ordered[max(low, 0)]), float(ordered[min(high, count - 1)])

    @property
    def spread(self) -> float:
        """How far the median may be off: half the interval, relative to the median."""
        low, high = self.interval_s
        return (high - low) / 2 / self.median_s if self.median_s > 0 else 0.0

    @property
    def drift(self) -> float:
        """Relative difference between the medians of the later and the earlier half of the calls."""
        half = len(self.seconds) // 2
        if half == 0:
            return 0.0
        early, late = float(np.median(self.seconds[:half])), float(np.median(self.seconds[half:]))
        return late / early - 1.0 if early > 0 else 0.0


def sample(
    timed: Callable[[], float],
    *,
    warmup_seconds: float,
    seconds: float,
    spread: float,
    least_calls: int = 5,
    most_calls: int = 2000,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Calls ``timed`` until it no longer gets faster, then until its median is known.

    Args:
        timed: makes one call and returns its seconds.
        warmup_seconds: the warm-up ends when the last calls were as fast as those before, at the
            latest after this time; the first two calls never count.
        seconds: the measurement ends after this time, or earlier, after a third of it, once the median
            is known to within ``spread``.
        spread: relative; see ``Samples.spread``.
        least_calls: calls that count, however long they take.
    """
    _warm_up(timed, warmup_seconds, clock)
    measured: list[float] = []
    started = clock()
    enough = 20
    while len(measured) < most_calls:
        measured.append(timed())
        elapsed = clock() - started
        if len(measured) < least_calls:
            continue
        if elapsed >= seconds:
            break
        if len(measured) >= enough and elapsed >= seconds / 3:
            known = Samples(np.array(measured))
            if known.spread <= spread and abs(known.drift) <= spread:
                break
            enough = len(measured) * 5 // 4
    return Samples(np.array(measured))


def unsteady(samples: Samples, agreement: float) -> tuple[str, ...]:
    """Says so if the samples do not agree with each other."""
    if samples.spread > agreement:
        return (f"unsteady: the median is known to within {samples.spread:.0%} only",)
    if abs(samples.drift) > agreement:
        return (f"unsteady: drifted by {samples.drift:+.0%} while it was measured",)
    return ()


def _warm_up(timed: Callable[[], float], most_seconds: float, clock: Callable[[], float]) -> None:
    started = clock()
    timed()
    before = [timed()]
    while clock() - started < most_seconds:
        latest = [timed() for _ in range(3)]
        if min(latest) >= 0.98 * min(before):
            return
        before = latest
