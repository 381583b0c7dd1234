"""Recordings that stand for hardware: of a meter's costs, and of every answer of a board."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MeterError
from ..search.protocols import Meter
from ..search.trial import Cost
from .nvml import Board, BoardState


def record(meter: Meter, recording: str | Path) -> Meter:
    """A meter that measures with ``meter`` and adds each cost to ``recording``, one line of JSON each."""
    return _RecordingMeter(meter, Path(recording))


class ReplayMeter:
    """Answers with the costs of a recording, in their order, whatever it is asked to measure.

    It stands for the device in one process; several workers would each start at the first cost.

    Args:
        recording: a file that ``record`` wrote.
    Raises:
        MeterError: the file cannot be read, or more is measured than was recorded.
    """

    def __init__(self, recording: str | Path) -> None:
        self._path = Path(recording)
        self._costs = [_cost(entry) for entry in _entries(self._path)]
        self._next = 0

    def measure(self, call: Callable[[], Any]) -> Cost:
        """The next recorded cost; ``call`` is not made."""
        if self._next == len(self._costs):
            raise MeterError(f"recording {self._path} holds {len(self._costs)} costs and all have been given")
        self._next += 1
        return self._costs[self._next - 1]


class RecordingBoard:
    """Passes all questions on to ``board`` and adds each answer to ``recording``, a line of JSON each."""

    def __init__(self, board: Board, recording: str | Path) -> None:
        self._board = board
        self._path = Path(recording)

    def now(self) -> float:
        return float(self._keep("now", self._board.now))

    def wait(self, seconds: float) -> None:
        self._board.wait(seconds)

    def shared(self) -> str | None:
        answer: str | None = self._keep("shared", self._board.shared)
        return answer

    def energy_mj(self) -> int:
        return int(self._keep("energy_mj", self._board.energy_mj))

    def power_mw(self) -> int:
        return int(self._keep("power_mw", self._board.power_mw))

    def averaged_power(self) -> bool:
        return bool(self._keep("averaged_power", self._board.averaged_power))

    def state(self) -> BoardState:
        state: BoardState = self._keep("state", self._board.state)
        return state

    def _keep(self, question: str, ask: Callable[[], Any]) -> Any:
        entry: dict[str, Any]
        try:
            answer = ask()
            entry = {"answer": dataclasses.asdict(answer) if isinstance(answer, BoardState) else answer}
            return answer
        except MeterError as error:
            entry = {"error": type(error).__name__, "message": str(error)}
            raise
        finally:
            _add(self._path, {"question": question, **entry})


class ReplayBoard:
    """Answers what a board answered, question by question, its clock included.

    Raises:
        MeterError: the recording cannot be read, or something else is asked than was then.
    """

    def __init__(self, recording: str | Path) -> None:
        self._path = Path(recording)
        self._entries = iter(_entries(self._path))

    def now(self) -> float:
        return float(self._answer("now"))

    def wait(self, seconds: float) -> None:
        """The recorded clock has waited."""

    def shared(self) -> str | None:
        answer: str | None = self._answer("shared")
        return answer

    def energy_mj(self) -> int:
        return int(self._answer("energy_mj"))

    def power_mw(self) -> int:
        return int(self._answer("power_mw"))

    def averaged_power(self) -> bool:
        return bool(self._answer("averaged_power"))

    def state(self) -> BoardState:
        fields = self._answer("state")
        throttled, foreign = tuple(fields.pop("throttled")), tuple(fields.pop("foreign"))
        return BoardState(throttled=throttled, foreign=foreign, **fields)

    def _answer(self, question: str) -> Any:
        entry = next(self._entries, None)
        if entry is None or entry.get("question") != question:
            then = entry.get("question") if entry else "its end"
            raise MeterError(f"recording {self._path}: asked for {question} where it has {then}")
        if "error" in entry:
            from . import nvml

            raise getattr(nvml, entry["error"], MeterError)(entry["message"])
        return entry["answer"]


class _RecordingMeter:
    def __init__(self, meter: Meter, path: Path) -> None:
        self._meter = meter
        self._path = path

    def measure(self, call: Callable[[], Any]) -> Cost:
        cost = self._meter.measure(call)
        _add(self._path, dataclasses.asdict(cost))
        return cost


def _cost(entry: dict[str, Any]) -> Cost:
    try:
        return Cost(**{**entry, "caveats": tuple(entry["caveats"])})
    except (KeyError, TypeError) as error:
        raise MeterError(f"a recorded cost has other fields than this version knows: {error}") from error


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise MeterError(f"recording {path} cannot be read: {error.strerror}") from error
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise MeterError(f"recording {path}, line {number} is not JSON: {line[:40]!r}") from error
    return entries


def _add(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
