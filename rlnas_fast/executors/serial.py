"""Evaluates one child after the other in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ..search.protocols import Evaluator, Request
from ..search.trial import Measurement


class Serial:
    """Runs evaluations in the order asked.  What an evaluator raises ends the search."""

    def run(
        self, evaluator: Evaluator, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Measurement, float]]:
        """Yields (position in ``requests``, measurement, seconds) for each."""
        for position, request in enumerate(requests):
            started = time.perf_counter()
            measurement = evaluator.evaluate(request)
            yield position, measurement, time.perf_counter() - started
