"""One small trained network for all, and a cost model that is fitted quickly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rlnas_fast.compression.base_network import train_network
from rlnas_fast.tasks.digits import digits
from rlnas_fast.tasks.task import Task


@pytest.fixture(scope="session")
def task() -> Task:
    return digits()


@pytest.fixture(scope="session")
def _trained(task: Task) -> nn.Module:
    torch.set_num_threads(1)
    module, result = train_network("lenet-300-100", task, epochs=5)
    assert result.accuracy is not None
    assert result.accuracy > 0.9
    return module


@pytest.fixture
def model(_trained: nn.Module) -> nn.Module:
    return copy.deepcopy(_trained)


@pytest.fixture(autouse=True, scope="module")
def _quick_cost_model(quick_cost_model: None) -> None:
    """For every test of this folder."""
