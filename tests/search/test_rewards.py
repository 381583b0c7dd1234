"""Rewards against their formulas, worked out by hand, and what every one of them promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Architecture, Cost, Measurement, Reward, Trial
from rlnas_fast.search.rewards import (
    absolute,
    accuracy,
    constrained,
    hard,
    limited,
    size_penalty,
    soft,
    summed,
    weighted_sum,
    within,
)


def measured(
    right: float = 0.8, latency_s: float | None = 0.010, parameters: int | None = 1000, flops: int = 2_000_000
) -> Measurement:
    return Measurement(
        accuracy=right,
        parameters=parameters,
        flops=flops,
        cost=Cost(latency_s=latency_s),
        extra={"loss_b": 3.0},
    )


def trial(measurement: Measurement, number: int = 0, batch: int = 0) -> Trial:
    return Trial(number, batch, Architecture("s", (number,)), str(number), measurement, 0.0)


def one(reward: Reward, measurement: Measurement) -> float:
    (value,) = reward([measurement], [])
    return value


@pytest.mark.parametrize(
    ("reward", "value"),
    [
        (accuracy(), 0.8),
        (soft(target=0.005), 0.8 * 2**-0.07),
        (soft(target=0.020), 0.8),
        (soft(target=0.020, one_sided=False), 0.8 * 2**0.07),
        (hard(target=0.005), 0.4),
        (hard(target=0.020), 0.8),
        (absolute(target=0.005), 0.8 - 0.1),
        (absolute(target=0.020), 0.8 - 0.05),
        (size_penalty(), 0.8 - 0.01 * (1e-5 + math.log(1000))),
        (weighted_sum(), 80 + 10 / 3 - 0.1),
        (weighted_sum(terms={"loss_b": -2.0}), 80 + 10 / 3 - 0.1 - 6),
        (weighted_sum(efficiency="latency_s"), 80 + 10 / 11 - 0.1),
        (constrained(limits={"parameters": 1000, "latency_s": 0.01}), 80.0),
        (constrained(limits={"parameters": 999}), -1000.0),
        (limited(accuracy(), {"latency_s": 0.010}), 0.8),
        (limited(accuracy(), {"latency_s": 0.004}), 0.8 - 0.6),
        (limited(accuracy(), {"latency_s": 0.005, "flops": 1e6}, weight=2.0), 0.8 - 1.0 - 1.0),
        (summed([(2.0, accuracy()), (-1.0, hard(target=0.005))]), 1.2),
    ],
)
def test_values_by_hand(reward: Reward, value: float) -> None:
    assert one(reward, measured()) == pytest.approx(value)


REWARDS: dict[str, Callable[[], Reward]] = {
    "accuracy": accuracy,
    "soft": soft,
    "soft, target": lambda: soft(target=0.01),
    "hard": hard,
    "absolute": lambda: absolute(target=0.01),
    "size": size_penalty,
    "sum": weighted_sum,
    "constrained": lambda: constrained(limits={"parameters": 100.0}),
    "limited": lambda: limited(soft(), {"latency_s": 0.001, "flops": 1e3}),
    "summed": lambda: summed([(1.0, accuracy()), (0.5, soft(target=0.01))]),
}


@pytest.fixture(params=REWARDS.values(), ids=REWARDS.keys())
def reward(request: pytest.FixtureRequest) -> Reward:
    made: Reward = request.param()
    return made


def test_follows_the_protocol(reward: Reward) -> None:
    assert isinstance(reward, Reward)


def test_no_network_that_works_scores_less_than_one_that_failed(reward: Reward) -> None:
    worst = Measurement(accuracy=0.0, parameters=10**6, flops=10**12, cost=Cost(latency_s=100.0), extra={})
    before = [trial(measured())]
    assert reward([worst], before)[0] >= reward.floor


def test_grows_with_accuracy(reward: Reward) -> None:
    before = [trial(measured())]
    low, high = reward([measured(0.5, parameters=50), measured(0.9, parameters=50)], before)
    assert high > low


def test_names_what_is_missing(reward: Reward) -> None:
    for name in reward.needs:
        blank: dict[str, Any] = {"accuracy": 0.5, "parameters": 1, "flops": 1, "cost": Cost(latency_s=1.0)}
        if name == "latency_s":
            blank["cost"] = Cost()
        else:
            blank.pop(name)
        with pytest.raises(ConfigError, match=name):
            reward([Measurement(**blank)], [])


def test_a_batch_in_which_every_child_failed_has_no_rewards_to_work_out(reward: Reward) -> None:
    assert reward([], []) == []


def test_is_a_pure_function(reward: Reward) -> None:
    batch, before = [measured(0.6), measured(0.7, latency_s=0.02)], [trial(measured())]
    assert reward(batch, before) == reward(batch, before)


def test_without_a_target_the_scale_is_the_first_batch_for_ever() -> None:
    reward = soft(exponent=-1.0)
    first = [measured(latency_s=latency) for latency in (0.01, 0.02, 0.05)]
    assert reward(first, []) == pytest.approx([0.8, 0.8, 0.8 * 0.02 / 0.05])
    before = [trial(m, i) for i, m in enumerate(first)]
    later = measured(latency_s=0.04)
    assert reward([later], before) == pytest.approx([0.4])
    assert reward([later], [*before, trial(measured(latency_s=9.0), 3, batch=1)]) == pytest.approx([0.4])


def test_failed_children_do_not_set_the_scale() -> None:
    failed = Measurement(failure="out of memory")
    before = [trial(failed), trial(measured(latency_s=0.01), 1)]
    assert soft(exponent=-1.0)([measured(latency_s=0.02)], before) == pytest.approx([0.4])


def test_where_the_whole_first_batch_failed_the_next_measurement_sets_the_scale() -> None:
    failed = [trial(Measurement(failure="nan"), i) for i in range(2)]
    reward = soft(exponent=-1.0)
    batch = [measured(latency_s=0.01), measured(latency_s=0.04)]
    assert reward(batch, failed) == pytest.approx([0.8, 0.2])
    before = [*failed, *(trial(m, 2 + i, batch=1) for i, m in enumerate(batch))]
    assert reward([measured(latency_s=0.02)], before) == pytest.approx([0.4])


@pytest.mark.parametrize(
    "make",
    [
        lambda: soft(target=0.0),
        lambda: soft(target=-1.0),
        lambda: hard(target=math.nan),
        lambda: absolute(target=math.inf),
        lambda: soft(exponent=0.5),
        lambda: hard(exponent=1.0),
        lambda: absolute(target=1.0, beta=0.1),
        lambda: size_penalty(beta=-1.0),
        lambda: constrained(limits={}),
        lambda: limited(accuracy(), {"latency_s": 0.0}),
        lambda: summed([]),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_clear_error(make: Callable[[], Reward]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_within_needs_every_number_known_and_under_its_limit() -> None:
    assert within(measured(), {"latency_s": 0.010, "parameters": 1000})
    assert not within(measured(), {"latency_s": 0.009})
    assert not within(measured(latency_s=None), {"latency_s": 1.0})
