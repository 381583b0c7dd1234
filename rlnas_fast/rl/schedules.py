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


@dataclass(frozen=True)
class Steps:
    """One value after the other, each for so many trials, and the last one from then on.

    Attributes:
        steps: (value, trials) in order.
    """

    steps: tuple[tuple[float, int], ...]

    def at(self, trial: int) -> float:
        """The value when ``trial`` trials came before."""
        for value, trials in self.steps:
            if trial < trials:
                return value
            trial -= trials
        return self.steps[-1][0]


def schedule(
    name: str, value: float | str | Schedule | Steps, *, low: float = 0.0, high: float = math.inf
) -> Schedule | Steps:
    """Reads a number, a line "start:end:trials" ("0.3:0.05:100") or steps "value x trials" ("1x60,0.1x40").

    Args:
        name: of the setting, for the message.
        low: least value that makes sense.
        high: largest.
    Raises:
        ConfigError: names the setting and what came.
    """
    read = value if isinstance(value, (Schedule, Steps)) else _read(name, value)
    for end in [step for step, _ in read.steps] if isinstance(read, Steps) else (read.start, read.end):
        if not low <= end <= high:
            limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            raise ConfigError(f"{name} = {value}: give numbers {limits}")
    return read


def _read(name: str, value: float | str) -> Schedule | Steps:
    text = str(value)
    wrong = ConfigError(
        f"{name} = {value}: write a number, start:end:trials such as 0.3:0.05:100, "
        "or steps such as 1x60,0.1x40"
    )
    try:
        if "x" in text:
            parts = [step.split("x") for step in text.split(",")]
            steps = tuple((float(step), int(trials)) for step, trials in parts)
            if min(trials for _, trials in steps) < 1:
                raise wrong
            return Steps(steps)
        if ":" not in text:
            return Schedule(float(text), float(text))
        start, end, count = text.split(":")
        read = Schedule(float(start), float(end), int(count))
    except ValueError as error:
        raise wrong from error
    if read.trials < 0:
        raise wrong
    return read
