"""Searches: what they start from, what they keep to, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlnas_fast.compression.autoencoder import Autoencoder
from rlnas_fast.compression.layers import INT8, bits, kept
from rlnas_fast.compression.problem import Prices, Problem
from rlnas_fast.compression.search import SEARCHES, Settings, features, search
from rlnas_fast.errors import ConfigError
from rlnas_fast.tasks.task import Task


@pytest.mark.parametrize("method", list(SEARCHES))
class TestEverySearch:
    def test_starts_at_lamp_never_ends_below_it_and_is_exact(
        self, method: str, model: nn.Module, task: Task
    ) -> None:
        problem = Problem(model, task)
        lamp = problem.by_rule("lamp", 0.05)
        rows: list[dict[str, object]] = []
        found = search(
            problem, density=0.05, method=method, evaluations=14, fine_tune_steps=2, log=rows.append
        )
        first, total = found.history[0], problem.layers.total
        assert first["layers"] == {
            name: pytest.approx(float(mask.double().mean()), abs=1e-6) for name, mask in lamp.items()
        }
        assert kept(found.masks) == round(0.05 * total)
        assert len(found.history) == problem.evaluations == 14
        assert list(found.history) == rows
        assert found.history[-1]["best"] == max(row["reward"] for row in found.history)
        assert len({tuple(row["layers"].values()) for row in found.history}) > 3, "it tries something else"

    def test_the_same_seed_gives_the_same_masks(self, method: str, model: nn.Module, task: Task) -> None:
        first, second = (
            search(Problem(model, task), density=0.1, method=method, evaluations=8, fine_tune_steps=1, seed=5)
            for _ in range(2)
        )
        assert first.history == second.history
        assert all(torch.equal(mask, second.masks[name]) for name, mask in first.masks.items())


def test_the_first_masks_are_those_of_lamp(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    found = search(problem, density=0.1, evaluations=1)
    lamp = problem.by_rule("lamp", 0.1)
    assert all(torch.equal(mask, lamp[name]) for name, mask in found.masks.items())


def test_int8_spends_the_same_bits_and_keeps_more(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    found = search(problem, density=0.05, method="ppo", evaluations=6, fine_tune_steps=2, int8=True)
    budget = 32 * round(0.05 * problem.layers.total)
    assert budget - 8 < bits(found.states) <= budget
    assert all(row["density"] <= 0.05 for row in found.history)
    quantised = [bool((state == INT8).any()) for state in found.states.values()]
    assert not any(quantised) or kept(found.masks) > round(0.05 * problem.layers.total)


def test_a_price_of_reconstruction_lowers_the_reward(model: nn.Module, task: Task) -> None:
    free, priced = (
        search(Problem(model, task), density=0.1, evaluations=1, fine_tune_steps=0, reward=prices)
        for prices in (Prices(), Prices(density=1.0, reconstruction=0.1))
    )
    accuracy = free.history[0]["accuracy"]
    assert free.history[0]["reward"] == accuracy
    assert priced.history[0]["reward"] < accuracy - 0.1


@pytest.mark.parametrize(
    "settings",
    [
        Settings(hierarchical=False),
        Settings(autoencoder=False),
        Settings(differentiable=False),
        Settings(curriculum=4.0),
    ],
)
def test_each_part_can_be_left_out(settings: Settings, model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    found = search(problem, density=0.05, evaluations=9, fine_tune_steps=2, settings=settings)
    assert kept(found.masks) == round(0.05 * problem.layers.total)
    densities = [row["density"] for row in found.history]
    assert densities[0] == densities[-1] == pytest.approx(0.05, abs=1e-4)
    assert (max(densities) > 0.1) == (settings.curriculum > 1)


def test_features_are_standardised_and_tell_weights_apart(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    plain = features(problem)
    full = features(problem, Autoencoder(problem.layers, steps=5))
    assert plain.shape == (6, problem.layers.total)
    assert full.shape == (7, problem.layers.total)
    for known in (plain, full):
        torch.testing.assert_close(known.mean(1), torch.zeros(len(known)), atol=1e-3, rtol=0)
        torch.testing.assert_close(known.std(1), torch.ones(len(known)), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pp0"}, "unknown method"),
        ({"evaluations": 0}, "evaluations = 0"),
        ({"fine_tune_steps": -1}, "fine_tune_steps = -1"),
        ({"density": 1.5}, "density = 1.5"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, object], message: str, model: nn.Module, task: Task
) -> None:
    given: dict[str, object] = {"density": 0.1, "evaluations": 2, **options}
    with pytest.raises(ConfigError, match=message):
        search(Problem(model, task), **given)  # type: ignore[arg-type]
