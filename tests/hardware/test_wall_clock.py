from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from rlnas_fast.errors import MeterError
from rlnas_fast.hardware import meter_for, wall_clock
from rlnas_fast.hardware.sampling import Samples, sample
from rlnas_fast.hardware.wall_clock import WallClockMeter


class ScriptedClock:
    """A clock that only calls move on, each by the next of ``durations``, the last one for ever."""

    def __init__(self, durations: Iterable[float]) -> None:
        self.now = 0.0
        self.calls = 0
        self._durations = list(durations)

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += self._durations[min(self.calls, len(self._durations) - 1)]
        self.calls += 1


def measure(durations: Iterable[float]) -> tuple[ScriptedClock, WallClockMeter]:
    clock = ScriptedClock(durations)
    return clock, WallClockMeter(clock=clock)


def test_the_median_is_of_calls_after_the_warm_up() -> None:
    clock, meter = measure([0.5, 0.02, 0.01, 0.004, 0.004, 0.002])
    cost = meter.measure(clock.run)
    assert cost.latency_s == pytest.approx(0.002)
    assert cost.latency_low_s == pytest.approx(0.002)
    assert cost.energy_j is None
    assert cost.peak_memory_bytes is None


def test_a_small_child_is_measured_in_a_seventh_of_a_second() -> None:
    clock, meter = measure([0.001])
    cost = meter.measure(clock.run)
    assert clock.now <= 0.15 * (1 if not cost.caveats else 3)


def test_a_long_call_is_made_seven_times() -> None:
    clock, meter = measure([1.0])
    meter.measure(clock.run)
    assert clock.calls == 7


def test_the_percentiles_show_the_spread() -> None:
    clock, meter = measure([0.002, 0.001, 0.003, 0.001, 0.001] * 100)
    cost = meter.measure(clock.run)
    assert cost.latency_s == pytest.approx(0.001)
    assert cost.latency_high_s == pytest.approx(0.003)


def test_a_figure_that_is_not_steady_says_so() -> None:
    clock, meter = measure(0.001 * 1.05**call for call in range(1000))
    cost = meter.measure(clock.run)
    assert any("unsteady" in caveat for caveat in cost.caveats)


def test_what_was_disturbed_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wall_clock.Load, "caveats", lambda self: ())
    clock, meter = measure([0.01] * 9 + [0.02] * 5 + [0.01] * 100)
    cost = meter.measure(clock.run)
    assert cost.latency_s == pytest.approx(0.01)
    assert cost.caveats == ()


def test_under_a_lasting_disturbance_the_fastest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wall_clock.Load, "caveats", lambda self: ("busy",))
    clock, meter = measure([0.003] * 45 + [0.001] * 140 + [0.002] * 500)
    cost = meter.measure(clock.run)
    assert cost.latency_s == pytest.approx(0.001)
    assert cost.caveats == ("busy",)


def test_an_interval_covers_the_median_it_claims_to() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        samples = Samples(generator.lognormal(0.0, 0.5, size=41))
        low, high = samples.interval_s
        covered += low <= 1.0 <= high
    # 95 % of 400, less 3 standard deviations of a binomial
    assert covered >= 400 * 0.95 - 3 * math.sqrt(400 * 0.95 * 0.05)


def test_sampling_ends_early_when_the_median_is_known() -> None:
    clock = ScriptedClock([0.001])

    def timed() -> float:
        clock.run()
        return 0.001

    samples = sample(timed, warmup_seconds=0.01, seconds=0.9, spread=0.02, clock=clock)
    assert 0.3 <= len(samples.seconds) * 0.001 <= 0.4


@pytest.mark.parametrize("device", ["tpu", "", "cpu:0"])
def test_an_unknown_device_is_named(device: str) -> None:
    with pytest.raises(MeterError, match=f"device '{device}' cannot be measured"):
        meter_for(device)


def test_a_real_call_takes_the_time_it_takes() -> None:
    import time

    def call() -> None:
        time.sleep(0.002)

    cost = meter_for("cpu").measure(call)
    assert cost.latency_s is not None
    assert cost.latency_s >= 0.002
