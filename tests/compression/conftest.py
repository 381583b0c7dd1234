"""One small trained network for all, and a cost model that takes no ten seconds to fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from rlnas_fast.compression.base_network import train_network
from rlnas_fast.ops.masked_matmul import cost_model
from rlnas_fast.tasks.digits import digits
from rlnas_fast.tasks.task import Task


@pytest.fixture(scope="session")
def task() -> Task:
    return digits()


@pytest.fixture(scope="session")
def _trained(task: Task) -> nn.Module:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    module, result = train_network("lenet-300-100", task, epochs=5)
    torch.set_num_threads(threads)
    assert result.accuracy is not None
    assert result.accuracy > 0.9
    return module


@pytest.fixture
def model(_trained: nn.Module) -> nn.Module:
    return copy.deepcopy(_trained)


@pytest.fixture(autouse=True, scope="package")
def _quick_cost_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(cost_model, "_SIZES", ((64, (1, 8, 32)),))
        cost_model._coefficients.cache_clear()
        yield
    cost_model._coefficients.cache_clear()
    torch.set_num_threads(threads)
