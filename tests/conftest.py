"""What every test relies on: seeds, threads, and where GPU tests run."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

# A shell that runs tests in the background has them ignore Ctrl-C, and so would every process they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips GPU tests only where there is no GPU; a failed build or import is a failure."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(autouse=True)
def _seed_and_one_thread() -> None:
    """Small networks gain nothing by more threads, whose sums are not always added up in the same order."""
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test may draw from the global generator)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def two_threads(_seed_and_one_thread: None) -> None:
    """For kernels, which share their work among threads."""
    import torch

    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def quick_cost_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cost model of masked products that takes no ten seconds to fit."""
    from rlnas_fast.ops.masked_matmul import cost_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(cost_model, "_SIZES", ((64, (1, 8, 32)),))
        cost_model._coefficients.cache_clear()
        yield
    cost_model._coefficients.cache_clear()


@pytest.fixture(params=["plain", "avx2", "avx512", "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for each instruction set that this CPU has."""
    from rlnas_fast.ops.native import cpu

    if request.param not in cpu().usable_isas():
        pytest.skip(f"this CPU has no {request.param}")
    cpu().set_isa(request.param)
    yield request.param
    cpu().set_isa("auto")
