"""One thread inside, as many as before outside, whatever happens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from rlnas_fast.rl.threads import one_blas_thread, one_torch_thread


@one_torch_thread()
def _fail_in_torch() -> None:
    assert torch.get_num_threads() == 1
    raise RuntimeError("inside")


@one_blas_thread()
def _fail_in_numpy() -> None:
    assert blas_threads() == {1}
    raise RuntimeError("inside")


def blas_threads() -> set[int]:
    np.ones((2, 2)) @ np.ones((2, 2))
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("fail", [_fail_in_torch, _fail_in_numpy])
def test_restores_the_number_of_threads(before: int, fail: Callable[[], None]) -> None:
    torch.set_num_threads(before)
    with threadpool_limits(before, user_api="blas"):
        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert torch.get_num_threads() == before
        assert blas_threads() == {before}
