"""Energy of CPU packages, through the counters that Linux exposes (RAPL, powercap)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from .nvml import BoardState, NotSupported, PermissionNeeded

POWERCAP = Path("/sys/class/powercap")


class RaplBoard:
    """The CPU packages of this machine as ``energy.measure_energy`` sees a board.

    The counters are in microjoules, tick about every millisecond, and start again from 0 at a limit
    that is added back here.  They cover whole packages: other processes' work is counted too.

    Args:
        powercap: the kernel's folder; a test gives its own.
        clock, sleep: time in seconds.
    Raises:
        NotSupported: the kernel exposes no counter.
        PermissionNeeded: it does, but not to this user.
    """

    def __init__(
        self,
        *,
        powercap: Path = POWERCAP,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.now = clock
        self.wait = sleep
        self._zones = sorted(zone for zone in powercap.glob("*-rapl:*") if zone.name.count(":") == 1)
        if not self._zones:
            raise NotSupported(
                f"this kernel exposes no energy counter of the CPU ({powercap} has no RAPL zone)"
            )
        self._last_uj = [_number(zone / "energy_uj") for zone in self._zones]
        self._wrapped_uj = [0] * len(self._zones)

    def shared(self) -> str | None:
        """Nothing: what else runs shows in a wall-clock meter's caveats."""
        return None

    def energy_mj(self) -> int:
        for index, zone in enumerate(self._zones):
            energy_uj = _number(zone / "energy_uj")
            if energy_uj < self._last_uj[index]:
                self._wrapped_uj[index] += _number(zone / "max_energy_range_uj")
            self._last_uj[index] = energy_uj
        return (sum(self._last_uj) + sum(self._wrapped_uj)) // 1000

    def power_mw(self) -> int:
        raise NotSupported("RAPL counts energy, not power")

    def averaged_power(self) -> bool:
        return True

    def state(self) -> BoardState:
        """No more than that the packages run."""
        return BoardState()


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except PermissionError as error:
        raise PermissionNeeded(
            f"{file} is not yours to read: have an administrator allow it, or run without CPU energy"
        ) from error
    except (OSError, ValueError) as error:
        raise NotSupported(f"{file} cannot be read: {error}") from error
