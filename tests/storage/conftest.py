"""Trials that use every field a log must keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlnas_fast.search import Architecture, Cost, Measurement, Trial


def _trials(count: int, first: int = 0, batch_size: int = 4) -> list[Trial]:
    return [_trial(number, number // batch_size) for number in range(first, first + count)]


def _trial(number: int, batch: int) -> Trial:
    if number % 5 == 3:
        measurement = Measurement(failure="out of memory: 3 GiB wanted", transient=number % 2 == 0)
    else:
        measurement = Measurement(
            accuracy=0.1 + number / 3000,
            loss=1 / 3,
            curve=(0.1, 0.1 + number / 3000),
            train_seconds=1.25,
            parameters=2**40 + number,
            flops=123,
            cost=Cost(latency_s=1e-3 / 7, latency_low_s=1e-4, peak_memory_bytes=10**9, caveats=("a clause",)),
            extra={"température": 1e-300, "infinite": float("inf")},
        )
    return Trial(
        number,
        batch,
        Architecture("chain", (number, 0, 7)),
        f"key-{number}",
        measurement,
        -number / 7,
        0.5,
        number % 2 == 1,
    )


@pytest.fixture
def make_trials() -> Callable[..., list[Trial]]:
    return _trials
