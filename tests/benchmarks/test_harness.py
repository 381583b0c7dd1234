"""How many rounds the benchmarks time, by a clock that the functions themselves move."""

from __future__ import annotations

from collections.abc import Callable

import harness
import pytest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    return now


def taking(clock: list[float], seconds: float) -> Callable[[], None]:
    def function() -> None:
        clock[0] += seconds

    return function


def test_every_round_runs_every_function_in_turn(clock: list[float]) -> None:
    order: list[str] = []

    def noting(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    times = harness.interleaved({"ours": noting("ours"), "peer": noting("peer")}, repeats=2, warmup=1)
    assert order == ["ours", "peer"] * 3
    assert times == {"ours": [0.0] * 2, "peer": [0.0] * 2}


@pytest.mark.parametrize(("peer", "rounds"), [(0.5, 21), (2.9, 21), (3.1, 3)])
def test_a_race_is_over_where_every_peer_is_far_behind(clock: list[float], peer: float, rounds: int) -> None:
    functions = {"ours": taking(clock, 1.0), "peer": taking(clock, peer), "slow": taking(clock, 9.0)}
    times = harness.interleaved(functions, ours="ours")
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys(functions, rounds)
    assert times["peer"][-1] == pytest.approx(peer)


@pytest.mark.parametrize(
    ("peer", "seconds", "rounds", "end"),
    [
        (9.0, 5.0, 1, 10.0),
        (9.0, 25.0, 3, 30.0),
        (9.0, 35.0, 1, 40.0),
        (9.0, 99.0, 3, 60.0),
        (2.0, 5.0, 5, 21.0),
    ],
)
def test_where_it_is_late_one_round_is_enough_for_that_and_the_warm_up_counts(
    clock: list[float], peer: float, seconds: float, rounds: int, end: float
) -> None:
    functions = {"ours": taking(clock, 1.0), "slow": taking(clock, peer)}
    assert len(harness.interleaved(functions, ours="ours", seconds=seconds)["ours"]) == rounds
    assert clock[0] == end


@pytest.mark.parametrize(
    ("seconds", "warm", "timed"), [(0.5, 1, 5), (1.5, 2, 5), (5.5, 3, 5), (8.5, 3, 6), (99.0, 3, 21)]
)
def test_what_comes_late_is_left_out_but_for_five_rounds(
    clock: list[float], seconds: float, warm: int, timed: int
) -> None:
    times = harness.interleaved({"ours": taking(clock, 1.0)}, seconds=seconds)
    assert (len(times["ours"]), clock[0]) == (timed, warm + timed)
