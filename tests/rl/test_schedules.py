"""Schedules: a line and then a constant, read from what a user writes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlnas_fast.errors import ConfigError
from rlnas_fast.rl.schedules import Schedule, schedule


def test_by_hand() -> None:
    line = schedule("epsilon", "0.3:0.1:100")
    assert [line.at(trial) for trial in (0, 50, 100, 5000)] == pytest.approx([0.3, 0.2, 0.1, 0.1])
    rising = schedule("open", "0.5:1:4")
    assert [rising.at(trial) for trial in range(6)] == [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]


def test_steps_by_hand() -> None:
    steps = schedule("epsilon", "1x2,0.5x1,0.1x3")
    assert [steps.at(trial) for trial in range(8)] == [1, 1, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("value", [0.25, "0.25", Schedule(0.25, 0.25), "0.25:0.25:7", "0.9:0.25:0"])
def test_constants(value: float | str | Schedule) -> None:
    assert {schedule("epsilon", value).at(trial) for trial in (0, 3, 10**6)} == {0.25}


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000), st.integers(0, 2000))
def test_stays_between_its_ends(start: float, end: float, trials: int, trial: int) -> None:
    value = schedule("epsilon", f"{start!r}:{end!r}:{trials}", high=1).at(trial)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12


@pytest.mark.parametrize(
    "value",
    [
        "",
        "much",
        "0.1:0.2",
        "0.1:0.2:3:4",
        "0.1:0.2:x",
        "0.1:0.2:-3",
        "0:1:2.5",
        "1x0",
        "1x2,",
        "1x2x3",
        "1x0.5",
    ],
)
def test_nonsense_is_one_clear_error(value: str) -> None:
    with pytest.raises(ConfigError, match=r"epsilon = .*start:end:trials"):
        schedule("epsilon", value)


@pytest.mark.parametrize("value", [1.5, -0.1, "0.5:2:10", "1x3,2x3", "nan", float("nan"), "inf:0:3"])
def test_out_of_range_is_one_clear_error(value: float | str) -> None:
    with pytest.raises(ConfigError, match=r"epsilon = .*from 0 to 1"):
        schedule("epsilon", value, high=1)


def test_without_a_highest_value_the_message_names_the_least() -> None:
    with pytest.raises(ConfigError, match=r"entropy_weight = -1.*at least 0"):
        schedule("entropy_weight", -1)
