"""Small matrices want one thread.

What a strategy computes is too small to share out: on a busy machine a second thread made the
surrogate ten times slower.  And sums come out the same whatever the number of threads, as replay needs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Runs torch on one CPU thread inside, and on as many as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Runs NumPy's linear algebra on one thread inside, and on as many as before afterwards."""
    with _controller().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
