"""Evaluators for the tests: at the top of an importable module, so that spawned workers find them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlnas_fast.errors import DataError
from rlnas_fast.search import Measurement, Request


@dataclass(frozen=True)
class Deterministic:
    """Answers with numbers made from the request alone."""

    seconds: float = 0.0

    def identity(self) -> Mapping[str, str]:
        return {"evaluator": "deterministic"}

    def evaluate(self, request: Request) -> Measurement:
        time.sleep(self.seconds)
        return Measurement(accuracy=request.seed / 7, parameters=sum(request.architecture.choices))


@dataclass(frozen=True)
class Dying(Deterministic):
    """Kills its worker at the request with seed ``at``: always, or only until ``marker`` exists."""

    at: int = 0
    marker: Path | None = None
    signal: int = signal.SIGKILL

    def evaluate(self, request: Request) -> Measurement:
        if request.seed == self.at and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            os.kill(os.getpid(), self.signal)
        return super().evaluate(request)


class Hanging(Deterministic):
    def evaluate(self, request: Request) -> Measurement:
        if request.seed == 1:
            time.sleep(600)
        return super().evaluate(request)


class Greedy(Deterministic):
    def evaluate(self, request: Request) -> Measurement:
        if request.seed == 1:
            held = bytearray(400 * 2**20)
            held[:: os.sysconf("SC_PAGE_SIZE")] = bytes(len(held[:: os.sysconf("SC_PAGE_SIZE")]))
            time.sleep(600)
        return super().evaluate(request)


class Raising(Deterministic):
    def evaluate(self, request: Request) -> Measurement:
        if request.seed == 1:
            raise DataError("the data set is gone")
        return super().evaluate(request)


class Unpicklable(Deterministic):
    def __reduce__(self) -> str:
        raise TypeError("cannot pickle this")


class FailsToLoad(Deterministic):
    def __reduce__(self) -> tuple[object, ...]:
        return (_fail, ())


def _fail() -> None:
    raise DataError("no data set in the worker\nand a second line")


class KillsItsStart(Deterministic):
    def __reduce__(self) -> tuple[object, ...]:
        return (_die, ())


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Placed(Deterministic):
    """Tells where it ran: the device in ``extra``, and the threads it may use."""

    device: str = "nowhere"

    def on_device(self, device: str) -> Placed:
        return replace(self, device=device)

    def evaluate(self, request: Request) -> Measurement:
        time.sleep(0.05)
        extra = {
            self.device: 1.0,
            "threads": float(os.environ.get("OMP_NUM_THREADS", "nan")),
            "process": float(os.getpid()),
            "children_allowed": float(not multiprocessing.current_process().daemon),
        }
        return replace(super().evaluate(request), extra=extra)


@dataclass(frozen=True)
class KillsEveryTenth(Deterministic):
    """Kills its worker at every tenth key it meets, the first time only; uneven evaluation times."""

    folder: Path = Path()

    def evaluate(self, request: Request) -> Measurement:
        number = request.architecture.choices[0] * 8 + request.architecture.choices[1]
        marker = self.folder / str(number)
        if number % 10 == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001 * (number % 3))
        return super().evaluate(request)
