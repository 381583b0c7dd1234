"""Searches: what they start from, what they keep to, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rlnas_fast.compression.layers import INT8, bits, kept
from rlnas_fast.compression.layerwise import Layerwise, Procedure
from rlnas_fast.compression.problem import Prices, Problem
from rlnas_fast.compression.search import SEARCHES, Allocation, Settings, search
from rlnas_fast.errors import ConfigError
from rlnas_fast.storage.measurement_cache import SqliteCache
from rlnas_fast.tasks.task import Task


@pytest.mark.parametrize("method", list(SEARCHES))
class TestEverySearch:
    def test_starts_at_the_rules_never_ends_below_them_and_is_exact(
        self, method: str, model: nn.Module, task: Task
    ) -> None:
        problem = Problem(model, task)
        lamp = problem.by_rule("lamp", 0.05)
        rows: list[dict[str, object]] = []
        found = search(
            problem, density=0.05, method=method, evaluations=30, fine_tune_steps=2, log=rows.append
        )
        first, total = found.history[0], problem.layers.total
        assert first["layers"] == {
            name: pytest.approx(float(mask.double().mean()), abs=1e-6) for name, mask in lamp.items()
        }
        assert kept(found.masks) == round(0.05 * total)
        assert len(found.history) == problem.evaluations == 30
        assert list(found.history) == rows
        assert [row["of"] for row in rows[:5]] == ["lamp", "uniform", "uniform+", "global", "erk"]
        assert {row["of"] for row in rows[5:27]} == {"proposal"}
        candidates = {str(row["of"]): row for row in found.history[27:]}
        assert set(candidates) == {"best rule", "best proposal", "most often kept"}
        best_rule = max(found.history[:5], key=lambda row: row["reward"])
        assert candidates["best rule"]["layers"] == best_rule["layers"]
        ended = max(candidates.values(), key=lambda row: row["reward"])
        assert ended["layers"] == {
            name: pytest.approx(float(mask.double().mean()), abs=1e-6) for name, mask in found.masks.items()
        }
        assert len({tuple(row["layers"].values()) for row in found.history}) > 8, "it tries something else"

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
    settings = Settings(curriculum=0.0)
    found = search(
        problem, density=0.05, method="ppo", evaluations=7, fine_tune_steps=2, int8=True, settings=settings
    )
    budget = 32 * round(0.05 * problem.layers.total)
    assert budget - 8 < bits(found.states) <= budget
    assert all(row["density"] <= 0.05 for row in found.history)
    quantised = [bool((state == INT8).any()) for state in found.states.values()]
    assert not any(quantised) or kept(found.masks) > round(0.05 * problem.layers.total)


@pytest.mark.parametrize("hierarchical", [True, False])
def test_int8_that_was_no_worse_stays(hierarchical: bool, model: nn.Module, task: Task) -> None:
    found = search(
        Problem(model, task),
        density=0.01,
        evaluations=8,
        fine_tune_steps=2,
        int8=True,
        settings=Settings(hierarchical=hierarchical, curriculum=0.0),
    )
    sizes = {name: state.numel() for name, state in found.states.items()}
    weights = [sum(sizes[name] * share for name, share in row["layers"].items()) for row in found.history]
    assert found.history[5]["reward"] > max(row["reward"] for row in found.history[:5])
    wanted = round(0.01 * sum(sizes.values()))
    assert weights[:5] == [pytest.approx(wanted, abs=1)] * 5
    assert all(count > 1.5 * wanted for count in weights[5:])


@pytest.mark.parametrize("layerwise", [True, False])
def test_latency_is_priced_at_the_batch_asked_for(
    layerwise: bool, model: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def measured(problem: Problem, network: nn.Module, masks: object, batch: int) -> float:
        seen.append(batch)
        return 0.5e-3

    module = "layerwise" if layerwise else "search"
    monkeypatch.setattr(f"rlnas_fast.compression.{module}.masked_latency_s", measured)
    problem, prices = Problem(model, task), Prices(latency_ms=0.1, latency_batch=7)
    if layerwise:
        _, _, history = Layerwise(problem, 0.2, procedure=Procedure(steps=1, prices=prices)).run()
    else:
        history = list(search(problem, density=0.1, evaluations=2, reward=prices).history)
    assert len(seen) >= 2
    assert set(seen) == {7}
    assert all(row["reward"] == pytest.approx(row["accuracy"] - 0.05) for row in history)


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
        Settings(carried=False),
        Settings(curriculum=0.0),
    ],
)
def test_each_part_can_be_left_out(settings: Settings, model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    found = search(problem, density=0.05, evaluations=12, fine_tune_steps=2, settings=settings)
    assert kept(found.masks) == round(0.05 * problem.layers.total)
    densities = [row["density"] for row in found.history]
    assert densities[0] == densities[-1] == pytest.approx(0.05, abs=1e-4)
    assert densities[5] == pytest.approx(settings.curriculum or 0.05, abs=1e-4)


def test_without_agents_it_is_gradual_magnitude_pruning(model: nn.Module, task: Task) -> None:
    plain = Settings(
        hierarchical=False, differentiable=False, budget_deviation=0.0, coefficient_deviation=0.0
    )
    problem = Problem(model, task)
    found = search(problem, density=0.05, evaluations=25, fine_tune_steps=10, settings=plain)
    proposals = [row for row in found.history if row["of"] == "proposal"]
    shares = [row["density"] for row in proposals]
    assert shares == sorted(shares, reverse=True)
    assert proposals[-1]["accuracy"] > max(row["accuracy"] for row in found.history[:5])


def test_a_search_that_was_killed_goes_on_from_the_weights_it_carried(
    model: nn.Module, task: Task, tmp_path: Path
) -> None:
    def run(stop_at: int | None = None) -> Allocation:
        def stop(row: dict[str, object]) -> None:
            if row["evaluation"] == stop_at:
                raise KeyboardInterrupt

        with SqliteCache(tmp_path / "log.sqlite") as log:
            problem = Problem(model, task, memory=log, gains=tmp_path / "gains")
            return search(problem, density=0.05, evaluations=12, fine_tune_steps=2, log=stop)

    whole = search(Problem(model, task), density=0.05, evaluations=12, fine_tune_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=6)
    kept_on_disk = {file.name for file in (tmp_path / "gains").iterdir()}
    again = run()
    assert again.history == whole.history
    assert all(torch.equal(mask, again.masks[name]) for name, mask in whole.masks.items())
    assert kept_on_disk < {file.name for file in (tmp_path / "gains").iterdir()}


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
