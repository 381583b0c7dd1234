from __future__ import annotations

from pathlib import Path

import pytest

from rlnas_fast.hardware.energy import measure_energy
from rlnas_fast.hardware.nvml import NotSupported
from rlnas_fast.hardware.rapl import RaplBoard

LIMIT_UJ = 262_143_328_850


class Packages:
    """Two packages whose counters tick every millisecond of a time that work and waiting move on."""

    def __init__(self, powercap: Path, start_uj: int = 0) -> None:
        self.now_s = 0.0
        self.watts = 20.0
        self._exact_uj = float(start_uj)
        self._zones = [powercap / name for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0")]
        for zone in self._zones:
            zone.mkdir(parents=True)
            (zone / "max_energy_range_uj").write_text(f"{LIMIT_UJ}\n")
        self._counters = [(zone / "energy_uj").open("w") for zone in self._zones]
        self._write()

    def close(self) -> None:
        for counter in self._counters:
            counter.close()

    def pass_time(self, seconds: float, watts: float | None = None) -> None:
        before = int(self.now_s * 1000)
        self._exact_uj += (watts or self.watts) / 2 * seconds * 1e6
        self.now_s += seconds
        if int(self.now_s * 1000) > before:
            self._write()

    def _write(self) -> None:
        for (
            counter
        ) in self._counters:  # in place: truncating a file makes some file systems wait for the disk
            counter.seek(0)
            counter.write(f"{int(self._exact_uj) % LIMIT_UJ:20}\n")
            counter.flush()


@pytest.mark.parametrize("start_uj", [0, LIMIT_UJ - 9_000_000])
def test_energy_of_a_cpu_also_when_its_counter_starts_again(tmp_path: Path, start_uj: int) -> None:
    packages = Packages(tmp_path, start_uj)
    board = RaplBoard(powercap=tmp_path, clock=lambda: packages.now_s, sleep=packages.pass_time)
    energy = measure_energy(board, lambda: packages.pass_time(0.004, 60.0), lambda: None, seconds=0.6)
    packages.close()
    assert energy.reason is None
    assert energy.energy_j == pytest.approx(0.004 * 40.0, rel=0.02)
    assert energy.idle_power_w == pytest.approx(20.0, rel=0.02)


def test_no_counter_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotSupported, match="exposes no energy counter"):
        RaplBoard(powercap=tmp_path / "none")
