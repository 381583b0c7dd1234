"""One thread inside, as many as before outside, whatever happens."""

from __future__ import annotations

import pytest
import torch

from rlnas_fast.rl.threads import one_thread


@pytest.mark.parametrize("before", [1, 2])
def test_restores_the_number_of_threads(before: int) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(before)
    try:
        with pytest.raises(ZeroDivisionError), one_thread():
            assert torch.get_num_threads() == 1
            1 / 0  # noqa: B018
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(usual)
