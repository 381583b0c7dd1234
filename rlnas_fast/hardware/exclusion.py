"""Nothing of ours trains on a device while something is measured there.

Readers and one writer, between processes: any number train, one measures.  The locks are the kernel's
(flock(2)), so the dead hold nothing.  A measurement closes a gate that trainings pass, so it gets its turn
however many of them there are.  They are per user and machine: other users' work shows in a meter's caveats.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import MeterError


@contextmanager
def training(device: str) -> Iterator[Callable[[], None]]:
    """Holds a place among those who train on ``device``.

    Yields:
        A function to call between steps: it lets measurements through that are waiting, so that they
        wait for one step and not for one child.  About 2 us when none is.
    """
    room = _Room(device)
    room.enter_shared()
    held = _held()
    held.setdefault(room.key, []).append(room)
    try:
        yield room.let_through
    finally:
        held[room.key].remove(room)
        try:
            room.leave()
        finally:
            room.close()


@contextmanager
def measuring(device: str) -> Iterator[None]:
    """Holds ``device`` alone.  A training that this thread is in the middle of stands back meanwhile."""
    room = _Room(device)
    own = list(_held().get(room.key, ()))
    for place in own:
        place.leave()
    try:
        room.enter_alone()
        yield
    finally:
        room.close()
        for place in own:
            place.enter_shared()


class _Room:
    """Two lock files of a device: the room itself, and the gate that a waiting measurement closes."""

    def __init__(self, device: str) -> None:
        self.key = lock_key(device)
        self._device = device
        folder = Path(tempfile.gettempdir()) / f"rlnas-fast-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            self._gate = os.open(folder / f"{self.key}.gate", flags, 0o600)
            self._room = os.open(folder / f"{self.key}.room", flags, 0o600)
        except OSError as error:
            raise MeterError(
                f"cannot lock device {device} in {folder}: {error.strerror}; give TMPDIR a folder of yours"
            ) from error

    def enter_shared(self) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_SH)
        fcntl.flock(self._room, fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)

    def enter_alone(self) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX)

    def let_through(self) -> None:
        try:
            fcntl.flock(self._gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self.leave()
            self.enter_shared()
        else:
            fcntl.flock(self._gate, fcntl.LOCK_UN)

    def leave(self) -> None:
        if self._device.partition(":")[0] == "cuda":  # steps that were queued still run
            import torch

            torch.cuda.synchronize(self._device)
        fcntl.flock(self._room, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._room)
        os.close(self._gate)


def lock_key(device: str) -> str:
    """What identifies ``device`` on this machine: a GPU's UUID, whatever CUDA_VISIBLE_DEVICES calls it."""
    if device.partition(":")[0] != "cuda":
        return device
    import torch

    try:
        return f"gpu-{torch.cuda.get_device_properties(device).uuid}"
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise MeterError(f"device {device!r} cannot be used: {reason}; see `rlnas doctor`") from error


_LOCAL = threading.local()


def _held() -> dict[str, list[_Room]]:
    """The places among trainings that this thread holds, by device."""
    if not hasattr(_LOCAL, "held"):
        _LOCAL.held = {}
    held: dict[str, list[_Room]] = _LOCAL.held
    return held
