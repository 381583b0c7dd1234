from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from rlnas_fast.errors import MeterError, ShapeError
from rlnas_fast.hardware.measure import measure_module


class Recorder(nn.Module):
    """A linear layer that remembers where its inputs were and in which mode it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN.add((x.data_ptr(), self.training, torch.is_grad_enabled()))
        return self.linear(x)  # type: ignore[no-any-return]


SEEN: set[tuple[int, bool, bool]] = set()


def test_a_linear_layer_on_a_cpu() -> None:
    SEEN.clear()
    module = Recorder().train()
    before = copy.deepcopy(module.state_dict())
    cost = measure_module(module, torch.zeros(3, 16), seconds=0.02, energy_seconds=0.1)
    assert cost.batch == 3
    assert cost.dtype == "float32"
    assert cost.flops == 2 * 16 * 4
    assert cost.parameters == 16 * 4 + 4
    low, high = cost.eager.interval_s
    assert 0 < low <= cost.eager.median_s <= high
    assert cost.eager.p10_s <= cost.eager.median_s <= cost.eager.p90_s
    assert cost.throughput_per_s > 0
    assert cost.graph is None
    assert "no CUDA graphs" in cost.unknown["graph"]
    assert cost.peak_memory_bytes is None
    for name, value in dataclasses.asdict(cost).items():
        if value is None:
            assert cost.unknown[name]
    assert json.loads(json.dumps(dataclasses.asdict(cost)))["batch"] == 3
    assert {(training, grad) for _, training, grad in SEEN} == {(False, False)}
    assert len({address for address, _, _ in SEEN}) == 8
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_same_from_the_package() -> None:
    import rlnas_fast as rf

    cost = rf.measure(nn.Linear(4, 4), torch.zeros(2, 4), seconds=0.01, energy_seconds=0)
    assert (cost.batch, cost.device["kind"], cost.parameters) == (2, "cpu", 20)


def test_energy_that_was_not_asked_for_says_so() -> None:
    cost = measure_module(nn.Linear(4, 4), torch.zeros(1, 4), seconds=0.01, energy_seconds=0)
    assert cost.energy_j is None
    assert cost.unknown["energy_j"] == "not asked for"


@pytest.mark.parametrize("shape", [(), (0, 16), (2, 5)])
def test_an_input_that_does_not_fit_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"\("):
        measure_module(nn.Linear(16, 4), torch.zeros(shape), seconds=0.01, energy_seconds=0)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(MeterError, match="cuda:97"):
        measure_module(nn.Linear(4, 4), torch.zeros(1, 4), "cuda:97")


@pytest.mark.gpu
def test_a_network_on_a_gpu_has_every_figure() -> None:
    network = nn.Sequential(*(layer for _ in range(10) for layer in (nn.Linear(256, 256), nn.ReLU())))
    cost = measure_module(network, torch.zeros(8, 256), "cuda:0", seconds=0.2, energy_seconds=1.0)
    assert cost.graph is not None
    assert cost.graph.median_s < cost.eager.median_s
    assert cost.peak_memory_bytes is not None
    assert cost.peak_memory_bytes >= 10 * 256 * 256 * 4
    assert cost.clock_mhz is not None
    assert cost.energy_j is not None or cost.unknown["energy_j"]
    assert not next(network.parameters()).is_cuda
