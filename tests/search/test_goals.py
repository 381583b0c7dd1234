"""Rewards that change with the search, against hand-made numbers and what they promise of the log."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import (
    Architecture,
    Archive,
    Cost,
    Measurement,
    Reward,
    SearchContext,
    Trial,
    feasible_first,
    hypervolume,
    pareto_front,
)
from rlnas_fast.search.goals import (
    LARGEST_MULTIPLIER,
    Adaptive,
    adaptive,
    excess,
    hypervolume_gain,
    random_scalarisation,
    volumes,
)
from rlnas_fast.search.rewards import limited


def measured(
    right: float, latency_s: float, low: float | None = None, high: float | None = None
) -> Measurement:
    return Measurement(accuracy=right, cost=Cost(latency_s, low, high))


def log_of(measurements: list[Measurement], size: int = 3) -> list[Trial]:
    """The trials of a search in batches of ``size``."""
    return [Trial(i, i // size, Architecture("s", (i,)), str(i), m, 0.0) for i, m in enumerate(measurements)]


def drawn(count: int, seed: int = 0) -> list[Measurement]:
    rng = np.random.default_rng(seed)
    return [measured(float(rng.random()), float(np.exp(rng.standard_normal()))) for _ in range(count)]


REWARDS = {
    "adaptive": lambda: adaptive(target=0.5),
    "adaptive, three targets": lambda: adaptive(targets=(0.5, 1.0, 2.0)),
    "adaptive, limited": lambda: limited(adaptive(target=0.5), {"latency_s": 2.0}),
    "hypervolume-gain": hypervolume_gain,
    "random-scalarisation": random_scalarisation,
}


@pytest.mark.parametrize("make", REWARDS.values(), ids=REWARDS.keys())
def test_what_was_asked_before_does_not_change_the_answer(make) -> None:  # type: ignore[no-untyped-def]
    trials, batch = log_of(drawn(30)), drawn(3, seed=1)
    used = make()
    for end in (30, 9, 0, 12, 30):
        used([], trials[:end])
        assert used(batch, trials[:end]) == make()(batch, trials[:end])
    others = log_of(drawn(30, seed=2))
    assert used(batch, others) == make()(batch, others)


@pytest.mark.parametrize("make", REWARDS.values(), ids=REWARDS.keys())
def test_rewards_are_finite_and_at_or_above_the_floor(make) -> None:  # type: ignore[no-untyped-def]
    reward: Reward = make()
    extremes = [measured(0.0, 1e-9), measured(1.0, 1e9), measured(0.5, 0.5), measured(0.5, 0.5)]
    failed = [Measurement(failure="out of memory")] * 3
    for before in ([], log_of(failed), log_of(failed + drawn(6)), log_of([measured(0.5, 1.0)] * 3)):
        for value in reward(extremes, before):
            assert math.isfinite(value)
            assert value >= reward.floor


def test_the_multiplier_rises_until_the_target_is_kept_and_then_falls() -> None:
    reward = adaptive(target=1.0)
    assert isinstance(reward, Adaptive)
    slow = [measured(0.5, latency) for latency in (2.0, 3.0, 4.0)]
    assert reward.multipliers([]) == (1.0,)
    (risen,) = reward.multipliers(log_of(slow))
    assert risen == pytest.approx(1.2)  # every excess is more than a deviation: one whole step
    (at_most,) = reward.multipliers(log_of(slow * 100))
    assert at_most == LARGEST_MULTIPLIER
    (fallen,) = reward.multipliers(log_of(slow + [measured(0.5, 0.1)] * 300))
    assert fallen == 0.0


def test_the_penalty_is_in_deviations_so_units_do_not_matter() -> None:
    before = drawn(12)
    batch = drawn(3, seed=1)

    def in_other_units(m: Measurement) -> Measurement:
        return measured(m.accuracy or 0.0, 1000 * (m.cost.latency_s or 0.0))

    seconds = adaptive(target=0.5)(batch, log_of(before))
    other = adaptive(target=500.0)(
        [in_other_units(m) for m in batch], log_of(list(map(in_other_units, before)))
    )
    assert other == pytest.approx(seconds, rel=1e-9)


def test_a_faster_network_than_asked_is_worth_its_accuracy() -> None:
    assert adaptive(target=1.0)([measured(0.7, 0.2), measured(0.7, 0.9)], []) == [0.7, 0.7]


def test_an_excess_within_the_interval_is_none() -> None:
    assert excess(measured(0.5, 1.1, low=0.9, high=1.2), "latency_s", 1.0) == 0.0
    assert excess(measured(0.5, 1.1, low=1.05, high=1.2), "latency_s", 1.0) == pytest.approx(math.log(1.1))
    assert adaptive(target=1.0)([measured(0.5, 1.1, low=0.9, high=1.2), measured(0.4, 3.0)], [])[0] == 0.5


def test_several_targets_take_turns_and_have_their_own_multipliers() -> None:
    reward = adaptive(targets=(1.0, 10.0))
    assert isinstance(reward, Adaptive)
    trials = log_of([measured(0.5, 3.0), measured(0.5, 4.0), measured(0.5, 5.0)] * 2)
    assert reward.conditioned(SearchContext(), []).targets == {"latency_s": 1.0}
    assert reward.conditioned(SearchContext(), trials[:3]).targets == {"latency_s": 10.0}
    tight, loose = reward.multipliers(trials)
    assert tight > 1.0 > loose
    batch = [measured(0.5, 5.0)]
    assert reward(batch, trials)[0] < reward(batch, trials[:3])[0] == 0.5


def test_feasible_first_orders_by_accuracy_and_then_by_excess() -> None:
    score = feasible_first({"latency_s": 1.0, "parameters": 10.0}).score
    values = np.array([[0.9, 1.0, 10.0], [0.1, 0.5, 1.0], [1.0, 1.1, 1.0], [1.0, 1.1, 11.0], [1.0, 9.0, 1.0]])
    assert list(np.argsort(-score(values))) == [0, 1, 2, 3, 4]


def test_the_goal_of_a_limited_reward_knows_both() -> None:
    context = limited(adaptive(target=1.0), {"parameters": 10.0}).conditioned(SearchContext(), [])
    assert context.goal is not None
    assert context.goal.numbers == ("accuracy", "latency_s", "parameters")
    good, slow, big = context.goal.score(np.array([[0.5, 1.0, 10.0], [0.5, 2.0, 10.0], [0.5, 1.0, 20.0]]))
    assert good == 0.5
    assert big == pytest.approx(0.0)
    assert slow < -1


def test_a_limited_front_keeps_its_goal() -> None:
    reward = limited(hypervolume_gain(), {"parameters": 10.0})
    goal = reward.conditioned(SearchContext(), log_of(drawn(12))).goal  # type: ignore[attr-defined]
    ideal, big = np.array([1.0, 1e-3, 5.0]), np.array([1.0, 1e-3, 20.0])
    assert goal.score(ideal) > goal.reached == 0.0
    assert goal.score(big) == pytest.approx(goal.score(ideal) - 0.5)
    assert goal.after(ideal).score(ideal) == pytest.approx(0.0)


def test_a_gain_is_the_volume_added_and_a_dominated_child_says_how_far_it_is() -> None:
    before = log_of([measured(0.0, 1.0), measured(1.0, 3.0), measured(0.5, 2.0)])
    # scaled to the box: (0, 1), (1, 0), (.5, .5); volume .25
    added, dominated = hypervolume_gain()([measured(0.75, 2.0), measured(0.25, 2.0)], before)
    assert added == pytest.approx(0.75 * 0.5 - 0.25)
    assert dominated == pytest.approx(0.0)  # it only ties in latency
    (inside,) = hypervolume_gain()([measured(0.3, 2.2)], before)
    assert inside == pytest.approx(-0.1)


@given(st.integers(0, 9))
def test_the_goal_of_a_front_of_two_is_the_volume_gained(seed: int) -> None:
    trials, reward = log_of(drawn(12)), hypervolume_gain()
    goal = reward.conditioned(SearchContext(), trials).goal  # type: ignore[attr-defined]
    archive = Archive(("accuracy", "latency_s"))
    archive.add(trials)
    low, high = archive.corners(archive.front)
    numbers = np.random.default_rng(seed).uniform(low, high, (20, 2)) * [1.0, -1.0]
    points = archive.scaled(archive.points([measured(a, c) for a, c in numbers]))
    front = archive.scaled(archive.front)
    corner = (-1.0, -1.0)  # as far below the worst seen as that is below the best
    gained = np.array(
        [hypervolume(np.vstack([front, p]), corner) - hypervolume(front, corner) for p in points]
    )
    np.testing.assert_allclose(goal.score(numbers).clip(0), gained / 4, rtol=0, atol=1e-12)
    assert (goal.score(numbers)[gained == 0] <= 0).all()
    best = int(np.argmax(gained))
    assert goal.after(numbers[best]).score(numbers[best]) <= 1e-12


points = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=24)


@given(points)
def test_an_archive_kept_as_trials_come_is_the_front_of_all(found: list[tuple[int, int]]) -> None:
    trials = log_of([measured(a / 6, float(c)) for a, c in found])
    archive = Archive(("accuracy", "latency_s"))
    for start in range(0, len(trials), 3):
        archive.add(trials[start : start + 3])
    table = archive.points([t.measurement for t in trials])
    assert sorted(t.number for t in archive.members) == pareto_front(table).tolist()


@given(points)
def test_hypervolume_over_time_grows_to_that_of_the_whole(found: list[tuple[int, int]]) -> None:
    trials = log_of([measured(a / 6, float(c)) for a, c in found])
    over_time = volumes(trials, ("accuracy", "latency_s"), points=4)
    figures = list(over_time.values())
    assert figures == sorted(figures)
    assert max(over_time) == len(trials)
    assert len(over_time) <= 4
    whole = Archive(("accuracy", "latency_s"))
    whole.add(trials)
    assert figures[-1] == pytest.approx(hypervolume(whole.scaled(whole.front), (0.0, 0.0)))


def test_the_goal_of_a_front_prefers_what_adds_volume() -> None:
    trials = log_of(drawn(30))
    goal = hypervolume_gain().conditioned(SearchContext(), trials).goal  # type: ignore[attr-defined]
    archive = Archive(("accuracy", "latency_s"))
    archive.add(trials)
    on_front = np.array([[t.measurement.accuracy, t.measurement.cost.latency_s] for t in archive.members])
    better = on_front * [1.1, 0.9]
    assert (goal.score(better) > goal.score(on_front)).all()
    assert goal.score(on_front).max() <= 1e-9


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: adaptive(), "needs a target"),
        (lambda: adaptive(target=-1.0), "target = -1.0"),
        (lambda: adaptive(targets=(1.0, math.nan)), "target = nan"),
        (lambda: adaptive(target=1.0, step=0.0), "step = 0.0"),
        (lambda: hypervolume_gain(objectives=("accuracy",)), "at least two"),
        (lambda: random_scalarisation(objectives=("accuracy", "accuracy")), "each once"),
        (lambda: adaptive(target=1.0)([Measurement(accuracy=0.5)], []), "did not measure"),
    ],
)
def test_bad_settings_are_named(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=says):
        make()
