"""Children trained for real, and children that cannot be."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from rlnas_fast.evaluators.train_child import TrainChild
from rlnas_fast.search import Architecture, Budget, Cost, Evaluator, Request, TaskSpec
from rlnas_fast.spaces.chain_cnn import ChainCNN
from rlnas_fast.tasks.digits import digits
from rlnas_fast.tasks.task import Task
from rlnas_fast.training.recipe import Recipe

RECIPE = Recipe(augment=("shift",))


@pytest.fixture(scope="module")
def task() -> Task:
    return digits(classes=(0, 1, 2))


@pytest.fixture(scope="module")
def space(task: Task) -> ChainCNN:
    return ChainCNN(task.spec, attention=True)


def request(space: ChainCNN, *layers: str, epochs: int = 2, seed: int = 1) -> Request:
    names = space.decisions[0].choices
    return Request(
        Architecture("chain-cnn", tuple(names.index(layer) for layer in layers)), Budget(epochs), seed
    )


def small(space: ChainCNN, epochs: int = 2, seed: int = 1) -> Request:
    return request(space, "conv3x3-10", "attention", "fc-64", "end", epochs=epochs, seed=seed)


class CountingMeter:
    """Calls once and knows the answer."""

    def __init__(self, latency_s: float = 0.25) -> None:
        self.latency_s = latency_s

    def measure(self, call: Callable[[], Any]) -> Cost:
        call()
        return Cost(latency_s=self.latency_s)


def test_robustness_is_measured_when_asked_for(task: Task, space: ChainCNN) -> None:
    plain = TrainChild(space, task, RECIPE, "cpu", None, 1)
    asked = TrainChild(space, task, RECIPE, "cpu", None, 1, robustness="fgsm:0.2")
    assert "robust_accuracy" not in plain.provides()
    assert "robust_accuracy" in asked.provides()
    assert plain.identity() != asked.identity()
    before, after = (evaluator.evaluate(small(space)) for evaluator in (plain, asked))
    assert before.value("robust_accuracy") is None
    robust = after.value("robust_accuracy")
    assert after.accuracy == before.accuracy
    assert robust is not None
    assert robust <= (after.accuracy or 0.0)


def test_measures_what_it_says_it_provides(task: Task, space: ChainCNN) -> None:
    evaluator = TrainChild(space, task, RECIPE, "cpu", CountingMeter(), 1)
    assert isinstance(evaluator, Evaluator)
    measurement = evaluator.evaluate(small(space, epochs=4))
    assert measurement.failure is None
    assert all(measurement.value(name) is not None for name in evaluator.provides())
    assert measurement.accuracy is not None
    assert measurement.accuracy > 0.9
    assert measurement.cost.latency_s == 0.25
    assert measurement.extra["latency_batch_size"] == 1
    assert measurement.extra["train_peak_memory_bytes"] > 1e6
    assert len(measurement.curve) == 4


def test_counts_parameters_and_flops(task: Task, space: ChainCNN) -> None:
    measurement = TrainChild(space, task, RECIPE).evaluate(small(space, epochs=1))
    convolution, block, connected, classifier = 10 * 9 + 20, 3 * 55 + 60 + 20, 640 * 64 + 128, 64 * 3 + 3
    assert measurement.parameters == convolution + block + connected + classifier
    multiplied = 64 * 90 + 4 * 64 * 50 + 2 * 64 * 64 * 5 + 640 * 64 + 64 * 3
    assert measurement.flops == 2 * multiplied


def test_equal_requests_give_equal_children_here_and_after_pickling(task: Task, space: ChainCNN) -> None:
    evaluator = TrainChild(space, task, RECIPE, threads=1)
    found = [e.evaluate(small(space)) for e in (evaluator, evaluator, pickle.loads(pickle.dumps(evaluator)))]
    assert len({(m.curve, m.loss) for m in found}) == 1
    assert evaluator.evaluate(small(space, seed=2)).loss != found[0].loss


def test_data_does_not_travel_twice(task: Task, space: ChainCNN) -> None:
    evaluator = TrainChild(space, task, RECIPE)
    before = len(pickle.dumps(evaluator))
    evaluator.evaluate(small(space, epochs=1))
    assert len(pickle.dumps(evaluator)) == before


def test_the_trained_network_is_given_back_for_the_test_split(task: Task, space: ChainCNN) -> None:
    evaluator = TrainChild(space, task, RECIPE)
    network, measurement = evaluator.train(small(space, epochs=4))
    assert network is not None
    assert evaluator.test_accuracy(network) == pytest.approx(measurement.accuracy, abs=0.1)


def test_identity_knows_all_that_a_result_depends_on(task: Task, space: ChainCNN) -> None:
    plain = TrainChild(space, task, RECIPE, threads=1)
    others = [
        TrainChild(ChainCNN(task.spec, attention=True, max_fc=1), task, RECIPE, threads=1),
        TrainChild(space, digits(classes=(0, 1, 2), seed=5), RECIPE, threads=1),
        TrainChild(space, task, Recipe(learning_rate=0.5), threads=1),
        TrainChild(space, task, RECIPE, threads=2),
        TrainChild(space, task, RECIPE, "cpu", CountingMeter(), 1),
        TrainChild(space, task, RECIPE, "cpu", CountingMeter(0.5), 1),
        TrainChild(space, task, RECIPE, threads=1, latency_batch=2),
        TrainChild(space, task, RECIPE, threads=1, environment={"name": "another CPU"}),
    ]
    identities = [dict(evaluator.identity()) for evaluator in (plain, *others)]
    assert all(identities.count(identity) == 1 for identity in identities)
    assert TrainChild(space, task, RECIPE, threads=1).identity() == plain.identity()
    assert all(isinstance(value, str) for value in identities[0].values())


def test_trains_in_its_turn(task: Task, space: ChainCNN) -> None:
    events: list[str] = []

    @contextmanager
    def turn(device: str) -> Iterator[Callable[[], None]]:
        events.append(f"enter {device}")
        yield lambda: events.append("step")
        events.append("leave")

    class Meter:
        def measure(self, call: Callable[[], Any]) -> Cost:
            events.append("measure")
            return Cost()

    TrainChild(space, task, RECIPE, "cpu", Meter(), turn=turn).evaluate(small(space, epochs=1))
    assert events[0] == "enter cpu"
    assert events[-2:] == ["leave", "measure"]
    assert set(events[1:-2]) == {"step"}


class Building:
    """A space of one network."""

    name = "one"

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make

    def build(self, architecture: Architecture, task_spec: TaskSpec) -> nn.Module:
        return self.make()


class Raising(nn.Module):
    """Fails once it is trained."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise self.error
        return self.layer(x)


def failure(task: Task, make: Callable[[], nn.Module], recipe: Recipe = RECIPE) -> Any:
    return TrainChild(Building(make), task, recipe).evaluate(Request(Architecture("one", ()), Budget(2), 0))


def too_large() -> nn.Module:
    return nn.Linear(2**23, 2**23)  # 2^48 bytes: more than an address space


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(60, 3)), "does not fit the task: mat1 and mat2"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), r"shape \(1, 4\), not \(1, 3\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(3)), "has no trainable parameters"),
        (too_large, "out of memory"),
        (lambda: Raising(MemoryError()), "out of memory: MemoryError"),
        (lambda: Raising(torch.OutOfMemoryError("CUDA out of memory")), "out of memory: CUDA out"),
    ],
)
def test_a_failed_child_is_data(task: Task, make: Callable[[], nn.Module], reason: str) -> None:
    measurement = failure(task, make)
    assert measurement.failure is not None
    assert re.search(reason, measurement.failure)
    assert not measurement.transient
    assert measurement.accuracy is None


def test_the_number_of_threads_is_the_users_again(task: Task) -> None:
    before, seen = torch.get_num_threads(), []

    def make(error: Exception | None) -> nn.Module:
        seen.append(torch.get_num_threads())
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) if error is None else Raising(error)

    for error in (None, MemoryError()):
        child = TrainChild(Building(functools.partial(make, error)), task, RECIPE, threads=before + 1)
        measurement = child.evaluate(Request(Architecture("one", ()), Budget(1), 0))
        assert (measurement.failure is None) == (error is None)
        assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="ours"):
        TrainChild(
            Building(functools.partial(make, ValueError("ours"))), task, RECIPE, threads=before + 1
        ).evaluate(Request(Architecture("one", ()), Budget(1), 0))
    assert torch.get_num_threads() == before
    assert seen == [before + 1] * 3


def test_a_diverging_child_keeps_what_was_counted(task: Task) -> None:
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3))  # noqa: E731
    measurement = failure(task, make, Recipe(optimizer="sgd", learning_rate=1e9))
    assert measurement.failure.startswith("diverged")
    assert measurement.parameters == 195


def test_a_device_error_is_transient(task: Task) -> None:
    measurement = failure(task, lambda: Raising(torch.AcceleratorError("CUDA error: unspecified")))
    assert measurement.failure == "device error: CUDA error: unspecified"
    assert measurement.transient


def test_any_other_error_is_ours_and_goes_on(task: Task) -> None:
    with pytest.raises(ZeroDivisionError):
        failure(task, lambda: Raising(ZeroDivisionError()))
    with pytest.raises(RuntimeError, match="a defect"):
        failure(task, lambda: Raising(RuntimeError("a defect")))


@pytest.mark.gpu
def test_trains_and_measures_on_a_gpu(task: Task, space: ChainCNN) -> None:
    evaluator = TrainChild(space, task, Recipe(dtype="bfloat16"), "cuda", CountingMeter())
    measurement = evaluator.evaluate(small(space, epochs=8))
    assert measurement.accuracy is not None
    assert measurement.accuracy > 0.9
    assert measurement.extra["train_peak_memory_bytes"] < 1e9
