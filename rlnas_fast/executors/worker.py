"""What runs in a worker process: takes requests from its pipe until the pipe or its parent ends."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ..errors import RlnasError
from ..search.protocols import Request
from ..search.trial import Measurement


@dataclass(frozen=True)
class Ready:
    """The worker holds its evaluator and waits for requests."""


@dataclass(frozen=True)
class Unusable:
    """The worker cannot be started; ``reason`` is one line."""

    reason: str


@dataclass(frozen=True)
class Done:
    """The evaluator answered after ``seconds``."""

    measurement: Measurement
    seconds: float


@dataclass(frozen=True)
class Raised:
    """The evaluator raised; its exception goes on in the parent."""

    error: BaseException


def serve(connection: Connection, evaluator: bytes, device: str, threads: int) -> None:
    """Answers each ``Request`` from ``connection`` with ``Done`` or ``Raised``, after one ``Ready``.

    Args:
        evaluator: pickled; moved to ``device`` if it has a method ``on_device``.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        loaded = pickle.loads(evaluator)
        if hasattr(loaded, "on_device"):
            loaded = loaded.on_device(device)
        _limit_threads(threads)
    except Exception as error:
        connection.send(Unusable(f"{type(error).__name__}: {_first_line(error)}"))
        return
    connection.send(Ready())
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_answer(loaded, request))


def _answer(evaluator: Any, request: Request) -> Done | Raised:
    started = time.perf_counter()
    try:
        return Done(evaluator.evaluate(request), time.perf_counter() - started)
    except Exception as error:
        return Raised(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """``error`` with its traceback as a note, or its text alone where it does not survive pickling."""
    trace = "".join(traceback.format_exception(error))
    try:
        sent: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        sent = RlnasError(f"{type(error).__name__}: {_first_line(error)}")
    sent.add_note(f"In a worker process:\n{trace}")
    return sent


def _limit_threads(threads: int) -> None:
    """OMP_NUM_THREADS says it already, but an import may have changed it; torch is asked if it is there."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers, so each one watches it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
