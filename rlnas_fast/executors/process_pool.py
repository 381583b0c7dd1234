"""Evaluates children side by side in worker processes, any of which may die."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import TracebackType

from ..errors import ConfigError, RlnasError
from ..search.protocols import Evaluator, Request
from ..search.trial import Measurement
from .worker import Done, Raised, Ready, Unusable, serve

TRIES = 2
START_SECONDS = 300.0
POLL_SECONDS = 0.05

Result = tuple[int, Measurement, float]


class ProcessPool:
    """Keeps worker processes, each with a copy of the evaluator, and gives each one request at a time.

    Workers are spawned by the first ``run`` and stay until ``close``; they get the evaluator once, so it
    must not change afterwards.  With an evaluator whose measurement depends on its request alone, the
    measurements are those of ``Serial``.

    A worker that dies (a signal, a crash, the kernel out of memory) is replaced and its request tried
    once more; the second time it is a failed measurement with the reason.  A worker that hangs or holds
    too much memory is ended and replaced, and its request failed at once.  These failures are
    ``transient``: the key of the measurement cache knows nothing of the pool's limits.

    An interrupted ``run`` ends all workers.  Workers also end when this process does, however it ends.

    Args:
        workers: how many.
        devices: worker i uses device number i modulo their count, through ``evaluator.on_device``.
        threads_per_worker: CPU threads of each.
        timeout_seconds: wall-clock limit of one evaluation, or None.
        memory_limit_bytes: limit of the private memory that a whole worker holds, or None.  It is read
            from /proc every 50 ms: a limit on address space would forbid CUDA, which reserves far more
            of it than it uses.
    Raises:
        ConfigError: numbers or devices that make no sense; the message names them.
        RlnasError: (from ``run``) a worker cannot start; one line says why.
    """

    def __init__(
        self,
        workers: int,
        *,
        devices: Sequence[str] = ("cpu",),
        threads_per_worker: int = 1,
        timeout_seconds: float | None = None,
        memory_limit_bytes: int | None = None,
    ) -> None:
        _check(workers >= 1, "workers", workers, "give at least 1")
        _check(threads_per_worker >= 1, "threads per worker", threads_per_worker, "give at least 1")
        for name, limit in (("timeout", timeout_seconds), ("memory limit", memory_limit_bytes)):
            _check(limit is None or limit > 0, name, limit, "give a number above 0, or None for no limit")
        _check(len(devices) >= 1, "devices", list(devices), "name at least one")
        _check(len(set(devices)) == len(devices), "devices", list(devices), "name each one once")
        _check(workers >= len(devices), "workers", workers, f"{len(devices)} devices need as many")
        self._devices = tuple(devices[slot % len(devices)] for slot in range(workers))
        self._threads = threads_per_worker
        self._timeout_seconds = timeout_seconds or math.inf
        self._memory_limit_bytes = memory_limit_bytes or math.inf
        self._workers: dict[int, _Worker] = {}
        self._evaluator: Evaluator | None = None
        self._pickled = b""
        self._lost_starts = 0

    def run(self, evaluator: Evaluator, requests: Sequence[Request]) -> Iterator[Result]:
        """Yields (position in ``requests``, measurement, seconds) for each, as they finish."""
        self._take(evaluator)
        queue = _Queue(requests)
        try:
            self._hand_out(queue)
            while queue.unfinished:
                results = [
                    result for slot, event in self._events() for result in self._react(slot, event, queue)
                ]
                self._hand_out(queue)  # before the caller gets its turn, so that no worker waits for it
                for result in results:
                    yield result
                    if queue.grow():
                        self._hand_out(queue)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends all workers.  A later ``run`` starts new ones."""
        while self._workers:
            self._workers.popitem()[1].kill()

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, evaluator: Evaluator) -> None:
        """Makes ``evaluator`` the one that workers get."""
        if evaluator is self._evaluator:
            return
        self.close()
        if set(self._devices) != {"cpu"} and not hasattr(evaluator, "on_device"):
            raise ConfigError(
                f"devices {sorted(set(self._devices))} were asked for, but the evaluator "
                f"{type(evaluator).__name__} has no on_device(device) to move it there"
            )
        try:
            self._pickled = pickle.dumps(evaluator, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise ConfigError(
                f"the evaluator cannot be sent to worker processes ({error}): "
                "define all its parts at the top of an importable module, or use one worker"
            ) from error
        self._evaluator = evaluator

    def _hand_out(self, queue: _Queue) -> None:
        """Gives waiting requests to idle workers, and starts workers for those that are left."""
        for slot, device in enumerate(self._devices):
            starting = sum(worker.starting for worker in self._workers.values())
            worker = self._workers.get(slot)
            if worker is not None and worker.idle and queue.waiting:
                try:
                    worker.give(queue.waiting[0], queue.requests[queue.waiting[0]], self._timeout_seconds)
                    queue.waiting.popleft()
                except OSError:  # it died while it was idle
                    self._workers.pop(slot).kill()
                    worker = None
            if worker is None and len(queue.waiting) > starting:
                self._workers[slot] = _Worker(self._pickled, device, self._threads)

    def _events(self) -> list[tuple[int, _Event]]:
        """Waits until a worker has something to say, or has used up its time or memory."""
        active = {slot: worker for slot, worker in self._workers.items() if not worker.idle}
        seconds = min(worker.deadline for worker in active.values()) - time.monotonic()
        if self._memory_limit_bytes < math.inf:
            seconds = min(seconds, POLL_SECONDS)
        multiprocessing.connection.wait(
            [source for worker in active.values() for source in worker.sources()],
            None if seconds == math.inf else max(seconds, 0.0),
        )
        events = ((slot, worker.event(self._memory_limit_bytes)) for slot, worker in active.items())
        return [(slot, event) for slot, event in events if event is not None]

    def _react(self, slot: int, event: _Event, queue: _Queue) -> Iterator[Result]:
        """Takes note of what happened to a worker; yields a result if there is one."""
        worker = self._workers[slot]
        match event:
            case Ready():
                self._lost_starts = 0
                worker.starting = False
            case Done(measurement, seconds):
                yield queue.finish(worker.take_position()), measurement, seconds
            case Raised(error):
                raise error
            case Unusable(reason):
                raise RlnasError(f"a worker for {worker.device} could not start: {reason}")
            case _Lost(reason, again):
                del self._workers[slot]
                worker.kill()
                if worker.starting:
                    self._lost_starts += 1
                    if not again or self._lost_starts > TRIES:
                        raise RlnasError(f"a worker for {worker.device} could not start: {reason}")
                    return
                position = worker.take_position()
                if again and queue.try_again(position):
                    return
                failure = f"{reason} ({TRIES} tries)" if again else reason
                seconds = time.monotonic() - worker.since
                yield queue.finish(position), Measurement(failure=failure, transient=True), seconds


@dataclass(frozen=True)
class _Lost:
    """A worker has died or had to be ended; ``again`` if another try may end better."""

    reason: str
    again: bool


_Event = Ready | Done | Raised | Unusable | _Lost


class _Queue:
    """Which requests of one ``run`` wait, and which have no result yet."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.waiting: deque[int] = deque()
        self.unfinished: set[int] = set()
        self._tries: Counter[int] = Counter()
        self._seen = 0
        self.grow()

    def grow(self) -> bool:
        """Takes in what was appended to the requests; says whether anything was."""
        fresh = range(self._seen, len(self.requests))
        self._seen = len(self.requests)
        self.waiting.extend(fresh)
        self.unfinished.update(fresh)
        return len(fresh) > 0

    def finish(self, position: int) -> int:
        self.unfinished.remove(position)
        return position

    def try_again(self, position: int) -> bool:
        self._tries[position] += 1
        if self._tries[position] >= TRIES:
            return False
        self.waiting.appendleft(position)
        return True


class _Worker:
    """One worker process as its parent sees it."""

    def __init__(self, evaluator: bytes, device: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.device = device
        self.starting = True
        self.since = time.monotonic()
        self.deadline = self.since + START_SECONDS
        self._position: int | None = None
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, evaluator, device, threads), name=f"rlnas {device}", daemon=True
        )
        try:
            with _environment(threads), _interrupts_blocked():
                self._process.start()
        except OSError as error:
            raise RlnasError(f"a worker for {device} could not start: {error.strerror or error}") from error
        finally:
            theirs.close()

    @property
    def idle(self) -> bool:
        return not self.starting and self._position is None

    def sources(self) -> tuple[multiprocessing.connection.Connection, int]:
        """What becomes readable when the worker says something or ends."""
        return self._connection, self._process.sentinel

    def give(self, position: int, request: Request, timeout_seconds: float) -> None:
        self._connection.send(request)
        self._position = position
        self.since = time.monotonic()
        self.deadline = self.since + timeout_seconds

    def take_position(self) -> int:
        position, self._position = self._position, None
        assert position is not None, "an idle worker has no request"
        return position

    def event(self, memory_limit_bytes: float) -> _Event | None:
        """What has happened since the last call, or None."""
        try:
            if self._connection.poll():
                event: _Event = self._connection.recv()
                return self._over_memory(memory_limit_bytes) or event if isinstance(event, Ready) else event
        except (EOFError, OSError):
            return _Lost(f"worker died: {self._end()}", again=True)
        if not self._process.is_alive():
            return _Lost(f"worker died: {self._end()}", again=True)
        if time.monotonic() >= self.deadline:
            return _Lost(f"over time: no answer after {self.deadline - self.since:g} s", again=False)
        return None if self.starting else self._over_memory(memory_limit_bytes)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _over_memory(self, limit_bytes: float) -> _Lost | None:
        if limit_bytes == math.inf:
            return None
        held = _private_bytes(self._process.pid or 0)
        if held <= limit_bytes:
            return None
        return _Lost(f"over memory: {held / 2**20:.0f} MiB held, limit {limit_bytes / 2**20:.0f} MiB", False)

    def _end(self) -> str:
        self._process.join(5.0)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"signal {-code} ({signal.Signals(-code).name})"
        if self.starting:
            return f'exit code {code}; a script that starts workers needs `if __name__ == "__main__":`'
        return f"exit code {code}"


def _private_bytes(pid: int) -> int:
    """Memory that is the process's own: resident less shared, proc_pid_statm(5); 0 if it is gone."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Numeric libraries read the number of threads once, when they are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A worker inherits the mask: Ctrl-C reaches the parent alone, which then ends its workers.

    The resource tracker unblocks SIGINT when it starts, so it is started first.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value}: {remedy}")
