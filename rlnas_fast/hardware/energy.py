"""Joules a call: the board's counter between two of its ticks, less what the board draws when idle."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import MeterError
from .nvml import Board, BoardState, NotSupported

LEAST_TICKS = 50
STILL_SECONDS = 3.0
STATE_SECONDS = 0.05
SETTLE_SECONDS = 2.0


@dataclass(frozen=True)
class Energy:
    """What calls cost in energy.  Unknown is None, with its ``reason``.

    Attributes:
        energy_j: joules a call above idle.
        energy_low_j, energy_high_j: 95 % interval, from parts of the window.
        power_w: mean power of the board while the calls ran.
        idle_power_w: power of the board just before, with nothing running.
        window_s: seconds between the ticks at both ends.
        ticks: of the energy counter within the window; None where power was integrated.
        calls: made within the window.
        reason: why ``energy_j`` is None.
        caveats: what makes the figure less than it seems.
    """

    energy_j: float | None = None
    energy_low_j: float | None = None
    energy_high_j: float | None = None
    power_w: float | None = None
    idle_power_w: float | None = None
    window_s: float | None = None
    ticks: int | None = None
    calls: int = 0
    reason: str | None = None
    caveats: tuple[str, ...] = ()


def measure_energy(
    board: Board,
    call: Callable[[], Any],
    synchronize: Callable[[], Any],
    *,
    seconds: float = 2.0,
    most_seconds: float = 30.0,
) -> Energy:
    """Repeats ``call`` over a window of the board's energy counter.

    The counter stands still between ticks, so the window starts and ends on a tick, and holds at least
    50 of them.  A window that cannot is flagged.  Where the counter is missing, momentary power is
    integrated, which the caveats say.  A counter reset, MIG, another process on the GPU, a throttle
    event, a memory error or a lost GPU leaves the energy unknown, with the reason.

    Args:
        board: the GPU that ``call`` runs on.
        call: the work; may return before it is done.
        synchronize: returns when all calls are done.
        seconds: least length of the window.
        most_seconds: longest window, whatever the ticks.
    Source: "Part-time Power Measurements", Yang et al. (2023), on what the counters of boards do.
    """
    try:
        watch = _Watch(board)
        try:
            counter = _Counter(board)
            idle = counter.idle_window()
        except NotSupported:
            return _integrated(board, watch, call, synchronize, seconds)
        work = _Work(board, call, synchronize, idle.tick_s / 5)
        return _counted(board, watch, counter, idle, work, seconds, most_seconds)
    except MeterError as error:
        return Energy(reason=str(error))


def readable(board: Board) -> None:
    """Raises MeterError, with the reason, if ``board`` tells nothing of the energy of our work."""
    shared = board.shared()
    if shared:
        raise Spoiled(shared)
    try:
        board.energy_mj()
    except NotSupported:
        board.power_mw()


class Spoiled(MeterError):
    """Something happened within the window that no figure survives."""


class _Work:
    """The calls, in batches that take about ``batch_s``: a board is asked in between."""

    def __init__(
        self, board: Board, call: Callable[[], Any], synchronize: Callable[[], Any], batch_s: float
    ) -> None:
        self._board = board
        self._call = call
        self._synchronize = synchronize
        self.size = 1
        self.calls = 0
        self.busy_s = 0.0
        while (took_s := self.run()) < batch_s / 2:
            self.size *= 2
        fitting = max(1, round(self.size * batch_s / took_s))
        self.batch_s = took_s * fitting / self.size
        self.size = fitting

    def start(self) -> None:
        """Makes the calls of one batch; they may go on after it returns."""
        for _ in range(self.size):
            self._call()

    def run(self) -> float:
        """Makes the calls of one batch, waits for them, and returns the seconds that took."""
        began = self._board.now()
        self.start()
        return self.finish(began)

    def finish(self, began: float) -> float:
        """Waits for the calls that were started at ``began``."""
        self._synchronize()
        took_s = self._board.now() - began
        self.calls += self.size
        self.busy_s += took_s
        return took_s


@dataclass(frozen=True)
class _Mark:
    """The energy until some moment, and the work done until then."""

    time_s: float
    energy_j: float
    calls: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class _Idle:
    power_w: float
    tick_s: float


class _Counter:
    """The energy counter, read until it ticks."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._last_mj = board.energy_mj()

    def ticked(self, work: _Work | None = None) -> _Mark | None:
        """A mark if the counter has ticked since it was read last."""
        energy_mj = self._board.energy_mj()
        if energy_mj < self._last_mj:
            raise Spoiled(f"the energy counter was reset: {self._last_mj} mJ, then {energy_mj} mJ")
        if energy_mj == self._last_mj:
            return None
        self._last_mj = energy_mj
        calls, busy_s = (work.calls, work.busy_s) if work else (0, 0.0)
        return _Mark(self._board.now(), energy_mj / 1e3, calls, busy_s)

    def next_tick(self, work: _Work | None = None) -> _Mark:
        """Waits for the counter to tick."""
        self.ticked()  # what it has done until now is of no use: when was that?
        started = self._board.now()
        while self._board.now() - started < STILL_SECONDS:
            mark = self.ticked(work)
            if mark is not None:
                return mark
            self._board.wait(0.0005)
        raise Spoiled(f"the energy counter stood still for {STILL_SECONDS:g} s")

    def idle_window(self, seconds: float = 0.3, ticks: int = 5) -> _Idle:
        """Power of an idle board, and seconds between two ticks."""
        first = last = self.next_tick()
        seen = 0
        while seen < ticks or last.time_s - first.time_s < seconds:
            last = self.next_tick()
            seen += 1
        elapsed_s = last.time_s - first.time_s
        return _Idle((last.energy_j - first.energy_j) / elapsed_s, elapsed_s / seen)


class _Watch:
    """Looks for what spoils a figure, from its start on."""

    def __init__(self, board: Board) -> None:
        self._board = board
        shared = board.shared()
        if shared:
            raise Spoiled(shared)
        self._settle()
        self._first = self._look()
        self._clocks = [self._first.clock_mhz or 0]
        self._looked_at = board.now()

    def look(self) -> None:
        """Raises Spoiled if something has happened; asks the board every 50 ms at most."""
        if self._board.now() - self._looked_at < STATE_SECONDS:
            return
        self._clocks.append(self._look().clock_mhz or 0)
        self._looked_at = self._board.now()

    def started(self) -> None:
        """The calls run: clocks from here on count."""
        self._clocks = []

    def caveats(self) -> tuple[str, ...]:
        self._clocks.append(self._look().clock_mhz or 0)
        low, high = min(self._clocks), max(self._clocks)
        return (f"the clock moved between {low} and {high} MHz",) if low < 0.95 * high else ()

    def _settle(self) -> None:
        """Clocks that an earlier load held down come back when it is over."""
        started = self._board.now()
        while self._board.now() - started < SETTLE_SECONDS and self._board.state().throttled:
            self._board.wait(STATE_SECONDS)

    def _look(self) -> BoardState:
        state = self._board.state()
        if state.throttled:
            raise Spoiled(f"the clocks are held down: {', '.join(state.throttled)}")
        if state.foreign:
            raise Spoiled(f"another process uses the GPU: {', '.join(map(str, state.foreign))}")
        first = getattr(self, "_first", state)
        if state.ecc_errors != first.ecc_errors:
            raise Spoiled(f"uncorrected memory errors: {first.ecc_errors}, then {state.ecc_errors}")
        return state


def _counted(
    board: Board,
    watch: _Watch,
    counter: _Counter,
    idle: _Idle,
    work: _Work,
    seconds: float,
    most_seconds: float,
) -> Energy:
    wanted_s = max(seconds, (LEAST_TICKS + 1) * idle.tick_s)
    # A tick is seen at the end of a batch.  Where one call is too long for that, the board waits for it.
    waits = work.batch_s > idle.tick_s / 2
    marks: list[_Mark] = []
    started = board.now()
    while not marks or marks[-1].time_s - marks[0].time_s < wanted_s:
        work.run()
        watch.look()
        mark = None if waits else counter.ticked(work)
        elapsed_s = board.now() - started
        if elapsed_s > most_seconds + 3 * idle.tick_s:
            break
        if elapsed_s < min(0.2, seconds / 4):  # the board's power rises first
            continue
        if waits and (not marks or board.now() - marks[-1].time_s >= wanted_s / 5):
            mark = counter.next_tick(work)
        if mark is not None:
            marks.append(mark)
        if len(marks) == 1:
            watch.started()
    if len(marks) < 2:
        raise Spoiled(f"the energy counter did not tick within {most_seconds:g} s")
    caveats = watch.caveats()
    ticks = round((marks[-1].time_s - marks[0].time_s) / idle.tick_s)
    if ticks < LEAST_TICKS:
        caveats += (
            f"energy window of {ticks} ticks, {LEAST_TICKS} are needed: off by up to {1 / ticks:.0%}",
        )
    return _energy(marks, idle.power_w, ticks, caveats)


def _integrated(
    board: Board, watch: _Watch, call: Callable[[], Any], synchronize: Callable[[], Any], seconds: float
) -> Energy:
    """Without a counter: power, read often, over time."""
    idle: list[float] = []
    started = board.now()
    while board.now() - started < 0.5:
        idle.append(board.power_mw() / 1e3)
        board.wait(0.005)
    averaged = board.averaged_power()
    caveats: tuple[str, ...] = ("energy from integrated power, for want of a counter",)
    if averaged:
        caveats += ("power is averaged over about a second on this board",)
    work = _Work(board, call, synchronize, 0.005)
    started = board.now()
    while board.now() - started < (1.0 if averaged else 0.2):
        work.run()
    watch.started()
    joules, power_w = 0.0, board.power_mw() / 1e3
    marks = [_Mark(board.now(), 0.0, work.calls, work.busy_s)]
    while marks[-1].time_s - marks[0].time_s < seconds:
        before_w, began = power_w, board.now()
        work.start()
        power_w = board.power_mw() / 1e3  # while the calls run: after them the board is idle already
        work.finish(began)
        watch.look()
        now = board.now()
        joules += (before_w + power_w) / 2 * (now - marks[-1].time_s)
        marks.append(_Mark(now, joules, work.calls, work.busy_s))
    return _energy(marks, statistics.fmean(idle), None, caveats + watch.caveats())


def _energy(marks: list[_Mark], idle_w: float, ticks: int | None, caveats: tuple[str, ...]) -> Energy:
    """What the work between the first and the last mark took, and the same for parts of it."""
    first, last = marks[0], marks[-1]
    calls = last.calls - first.calls
    energy_j = _joules_a_call(first, last, idle_w)
    found = Energy(
        power_w=idle_w + energy_j * calls / (last.busy_s - first.busy_s),
        idle_power_w=idle_w,
        window_s=last.time_s - first.time_s,
        ticks=ticks,
        calls=calls,
        caveats=caveats,
    )
    if energy_j <= 0:
        return replace(found, reason=f"the calls draw no more than the idle board: {found.power_w:.1f} W")
    parts = [_joules_a_call(a, b, idle_w) for a, b in _parts(marks)]
    if len(parts) < 2:
        return replace(found, energy_j=energy_j)
    half_j = 2 * statistics.stdev(parts) / math.sqrt(len(parts))
    return replace(found, energy_j=energy_j, energy_low_j=energy_j - half_j, energy_high_j=energy_j + half_j)


def _joules_a_call(first: _Mark, last: _Mark, idle_w: float) -> float:
    joules = last.energy_j - first.energy_j - idle_w * (last.time_s - first.time_s)
    return joules / (last.calls - first.calls)


def _parts(marks: list[_Mark], most: int = 10) -> list[tuple[_Mark, _Mark]]:
    """The window in up to ten parts of equal numbers of marks."""
    count = min(most, len(marks) - 1)
    bounds = [marks[round(i * (len(marks) - 1) / count)] for i in range(count + 1)]
    return [(a, b) for a, b in itertools.pairwise(bounds) if b.calls > a.calls]
