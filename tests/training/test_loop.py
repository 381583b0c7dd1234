"""The one training loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from rlnas_fast.search import Budget
from rlnas_fast.tasks.digits import digits
from rlnas_fast.training.data import DeviceData
from rlnas_fast.training.loop import TrainResult, evaluate, train
from rlnas_fast.training.recipe import Recipe

CPU = torch.device("cpu")
RECIPE = Recipe()
BUDGET = Budget(3)


@pytest.fixture(scope="module")
def data() -> DeviceData:
    return DeviceData.of(digits(classes=(0, 1, 2)), CPU)


def child(seed: int = 0, gain: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        network[-1].weight.mul_(gain)
    return network


def result(data: DeviceData, recipe: Recipe = RECIPE, budget: Budget = BUDGET, seed: int = 0) -> TrainResult:
    return train(child(), data, recipe, budget, device=CPU, seed=seed)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(optimizer="sgd", learning_rate=0.05),
        Recipe(dtype="bfloat16"),
        Recipe(augment=("shift", "cutout"), label_smoothing=0.1),
    ],
    ids=["adam", "sgd", "bfloat16", "augmented"],
)
def test_learns_three_digits(data: DeviceData, recipe: Recipe) -> None:
    found = result(data, recipe, Budget(6))
    assert found.failure is None
    assert found.accuracy is not None
    assert found.accuracy > 0.93
    assert len(found.curve) == 6
    assert found.curve[-1] == found.accuracy


def test_equal_arguments_give_equal_results(data: DeviceData) -> None:
    recipe = Recipe(augment=("shift",))
    first, second = (result(data, recipe, seed=3) for _ in range(2))
    assert (first.curve, first.loss) == (second.curve, second.loss)
    assert result(data, recipe, seed=4).loss != first.loss


def test_the_validation_split_is_not_trained_on(data: DeviceData) -> None:
    blind = replace(data, x_validation=torch.zeros_like(data.x_validation))
    trained = []
    for some in (data, blind):
        network = child()
        train(network, some, Recipe(), Budget(1), device=CPU, seed=0)
        trained.append(network.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_stops_a_child_that_diverges(data: DeviceData) -> None:
    found = result(data, Recipe(optimizer="sgd", learning_rate=1e4), Budget(50))
    assert found.failure is not None
    assert found.failure.startswith("diverged: training loss")
    assert found.accuracy is None
    assert len(found.curve) < 50


def test_stops_a_child_of_nan(data: DeviceData) -> None:
    network = child(gain=math.nan)
    found = train(network, data, Recipe(), Budget(5), device=CPU, seed=0)
    assert found.failure == "diverged: training loss nan in epoch 1"


def test_seconds_end_a_budget_of_many_epochs(data: DeviceData) -> None:
    found = result(data, budget=Budget(10**6, seconds=0.3))
    assert found.failure is None
    assert found.accuracy is not None
    assert 0.3 <= found.seconds < 10
    assert 0 < len(found.curve) < 10**6


def test_over_time_before_the_first_epoch_is_a_failure(data: DeviceData) -> None:
    found = result(data, budget=Budget(3, seconds=1e-6))
    assert found.failure == "over time: 1e-06 s ended in the first epoch"


def test_a_batch_larger_than_the_data_is_the_data(data: DeviceData) -> None:
    assert len(result(data, Recipe(batch_size=10**6)).curve) == 3


def test_calls_back(data: DeviceData) -> None:
    epochs: list[tuple[int, float, float]] = []
    steps: list[None] = []
    found = train(
        child(),
        data,
        Recipe(batch_size=100),
        Budget(2),
        device=CPU,
        seed=0,
        on_epoch=lambda *values: epochs.append(values),
        on_step=lambda: steps.append(None),
    )
    assert [epoch for epoch, _, _ in epochs] == [1, 2]
    assert epochs[-1][1:] == (found.accuracy, found.loss)
    assert len(steps) == 2 * (len(data.x) // 100)


def test_evaluates_in_pieces_as_a_whole(data: DeviceData, monkeypatch: pytest.MonkeyPatch) -> None:
    network = child()
    whole = evaluate(network, data, data.x_validation, data.y_validation, Recipe())
    monkeypatch.setattr("rlnas_fast.training.loop._EVALUATION_BATCH", 7)
    pieces = evaluate(network, data, data.x_validation, data.y_validation, Recipe())
    assert pieces == pytest.approx(whole, rel=1e-6)  # sums of float32 losses in another order


def test_normalises_to_mean_0_and_deviation_1(data: DeviceData) -> None:
    images = data.normalise(data.x)
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns_on_a_gpu(dtype: str) -> None:
    device = torch.device("cuda")
    data = DeviceData.of(digits(classes=(0, 1, 2)), device)
    recipe = Recipe(dtype=dtype, augment=("flip", "shift", "cutout"))
    found = train(child().to(device), data, recipe, Budget(12), device=device, seed=0)
    assert found.accuracy is not None
    assert found.accuracy > 0.9
