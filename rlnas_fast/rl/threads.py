"""Small tensors want one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one CPU thread inside, and on as many as before afterwards.

    A controller's tensors are too small to share out: a second thread costs more than it gives, far more
    on a busy machine.  And its sums come out the same whatever the number of threads, as replay needs.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
