"""Numbers that change as a search goes on: epsilon, the weight of the entropy, the open part of a space."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """A line from ``start`` to ``end`` over ``trials`` trials, and ``end`` from then on.

    Attributes:
        start: before the first trial.
        end: from trial number ``trials`` (counted from 0) on.
        trials: 0 for a constant.
    """

    start: float
    end: float
    trials: int = 0

    def at(self, trial: int) -> float:
        """The value when ``trial`` trials came before."""
        if trial >= self.trials:
            return self.end
        return self.start + (self.end - self.start) * trial / self.trials


def schedule(
    name: str, value: float | str | Schedule, *, low: float = 0.0, high: float = math.inf
) -> Schedule:
    """Reads a number, or "start:end:trials" such as "0.3:0.05:100".

    Args:
        name: of the setting, for the message.
        low: least value that makes sense.
        high: largest.
    Raises:
        ConfigError: names the setting and what came.
    """
    read = value if isinstance(value, Schedule) else _read(name, value)
    for end in (read.start, read.end):
        if not low <= end <= high:
            limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            raise ConfigError(f"{name} = {value}: give numbers {limits}")
    return read


def _read(name: str, value: float | str) -> Schedule:
    parts = str(value).split(":")
    try:
        if len(parts) == 1:
            return Schedule(float(parts[0]), float(parts[0]))
        start, end, trials = parts
        read = Schedule(float(start), float(end), int(trials))
    except ValueError:
        read = Schedule(0.0, 0.0, -1)
    if read.trials < 0:
        raise ConfigError(f"{name} = {value}: write a number, or start:end:trials such as 0.3:0.05:100")
    return read
