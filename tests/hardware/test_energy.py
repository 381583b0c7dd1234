from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlnas_fast.errors import MeterError
from rlnas_fast.hardware.energy import Energy, measure_energy
from rlnas_fast.hardware.nvml import (
    GpuNotFound,
    NvmlBoard,
    NvmlMissing,
    PermissionNeeded,
)
from rlnas_fast.hardware.replay import RecordingBoard, ReplayBoard

IDLE_W = 70.0


def energy_of(gpu: Any, *script: str, call_s: float = 0.001, watts: float = 300.0, **options: Any) -> Energy:
    with gpu.script(*script) as board:
        energy = measure_energy(board, gpu.work(call_s, watts), gpu.synchronize, **options)
    assert gpu.users == 0
    return energy


@pytest.mark.parametrize("tick_s", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("call_s", [0.00005, 0.0031, 0.017, 0.15])
@pytest.mark.parametrize("watts", [90.0, 300.0, 690.0])
def test_energy_is_recovered_within_two_percent(gpu: Any, tick_s: float, call_s: float, watts: float) -> None:
    energy = energy_of(gpu, f"tick_s {tick_s}", call_s=call_s, watts=watts)
    assert energy.reason is None
    assert energy.ticks is not None
    assert energy.ticks >= 50
    assert energy.energy_j == pytest.approx((watts - IDLE_W) * call_s, rel=0.02)
    assert energy.idle_power_w == pytest.approx(IDLE_W, rel=0.01)
    assert energy.caveats == ()


def test_power_is_that_of_the_whole_board(gpu: Any) -> None:
    energy = energy_of(gpu, "query_s 0", watts=250.0)
    assert energy.power_w == pytest.approx(250.0, rel=0.02)


def test_the_interval_holds_the_truth(gpu: Any) -> None:
    energy = energy_of(gpu, call_s=0.0031)
    assert energy.energy_low_j is not None
    assert energy.energy_high_j is not None
    slack = 0.01 * 0.0031 * 230
    assert energy.energy_low_j - slack <= 0.0031 * 230 <= energy.energy_high_j + slack


def test_a_short_window_is_flagged(gpu: Any) -> None:
    energy = energy_of(gpu, "tick_s 0.1", seconds=0.5, most_seconds=1.0)
    assert energy.ticks is not None
    assert energy.ticks < 50
    assert any(f"{energy.ticks} ticks, 50 are needed" in caveat for caveat in energy.caveats)


FAULTS = [
    ("at 1.0 reset", "the energy counter was reset"),
    ("at 1.0 throttle 64", "the clocks are held down: thermal, by hardware"),
    ("at 0.0 throttle 4", "the clocks are held down: power cap"),
    ("at 1.0 process 99", "another process uses the GPU: 99"),
    ("process 99", "another process uses the GPU: 99"),
    ("at 1.0 ecc 2", "uncorrected memory errors: 0, then 2"),
    ("at 1.0 lost 1", "the GPU fell off the bus"),
    ("mig 1", "the GPU is split .MIG."),
    ("tick_s 1000", "the energy counter stood still"),
    ("energy_error 4", "code 4|Insufficient Permissions"),
]


@pytest.mark.parametrize(("line", "reason"), FAULTS)
def test_a_fault_is_named_and_gives_no_number(gpu: Any, line: str, reason: str) -> None:
    import re

    energy = energy_of(gpu, line)
    assert energy.energy_j is None
    assert energy.reason is not None
    assert re.search(reason, energy.reason), energy.reason
    assert "\n" not in energy.reason


def test_a_throttle_that_an_earlier_load_left_is_waited_for(gpu: Any) -> None:
    energy = energy_of(gpu, "at 0.0 throttle 4", "at 0.7 throttle 0")
    assert energy.energy_j == pytest.approx(0.23, rel=0.02)


def test_a_fault_after_the_window_does_not_count(gpu: Any) -> None:
    energy = energy_of(gpu, "at 50 throttle 64", "at 51 reset")
    assert energy.reason is None


def test_work_that_draws_no_power_has_no_energy(gpu: Any) -> None:
    energy = energy_of(gpu, watts=60.0)
    assert energy.energy_j is None
    assert "no more than the idle board" in str(energy.reason)


@pytest.mark.parametrize("instant", [0, 1])
def test_without_a_counter_power_is_integrated_and_it_says_so(gpu: Any, instant: int) -> None:
    energy = energy_of(gpu, "energy 0", f"instant {instant}", "query_s 0.00001")
    assert energy.energy_j == pytest.approx(0.23, rel=0.02)
    assert energy.ticks is None
    assert any("integrated power" in caveat for caveat in energy.caveats)
    assert any("averaged over about a second" in caveat for caveat in energy.caveats) == (not instant)


@pytest.mark.parametrize("faults", [(), ("at 1.0 reset",), ("at 0.5 lost 1",), ("energy 0",)])
def test_a_recording_of_a_board_replays_to_the_same_energy(
    gpu: Any, tmp_path: Path, faults: tuple[str, ...]
) -> None:
    with gpu.script(*faults) as board:
        recorder = RecordingBoard(board, tmp_path / "board.jsonl")
        measured = measure_energy(recorder, gpu.work(0.003, 300.0), gpu.synchronize)
    replayed = measure_energy(ReplayBoard(tmp_path / "board.jsonl"), lambda: None, lambda: None)
    assert replayed == measured


def test_a_recording_answers_only_what_was_asked(tmp_path: Path) -> None:
    (tmp_path / "board.jsonl").write_text('{"question": "now", "answer": 1.0}\n')
    board = ReplayBoard(tmp_path / "board.jsonl")
    assert board.now() == 1.0
    with pytest.raises(MeterError, match="asked for energy_mj where it has its end"):
        board.energy_mj()


def test_the_same_board_by_index_and_by_uuid(gpu: Any) -> None:
    with gpu.script() as by_uuid, gpu.open(0) as by_index:
        assert by_uuid.uuid == by_index.uuid
        assert gpu.users == 2
    assert gpu.users == 0


def test_of_several_boards_the_one_asked_for_is_read(gpu: Any) -> None:
    with gpu.script("boards 2") as first, gpu.open(1) as second:
        assert first.uuid.endswith("444")
        assert second.uuid.endswith("555")
        with gpu.open(second.uuid) as again:
            assert again.uuid == second.uuid
        work = gpu.work(0.001, 300.0)  # on the first
        energy = measure_energy(second, work, gpu.synchronize)
        assert abs(energy.energy_j or 0.0) < 0.002  # of 0.23 J, none was drawn here
        assert measure_energy(first, work, gpu.synchronize).energy_j == pytest.approx(0.23, rel=0.02)
    assert gpu.users == 0


@pytest.mark.parametrize("name", [3, "GPU-no-such"])
def test_a_gpu_that_is_not_there_is_named(gpu: Any, name: str | int) -> None:
    with pytest.raises(GpuNotFound, match=f"there is no GPU {name}: NVML sees 1"):
        gpu.open(name)
    assert gpu.users == 0


@pytest.mark.parametrize(
    ("code", "remedy"), [(9, "driver is not loaded"), (12, "comes with the driver"), (18, "restart")]
)
def test_a_library_that_does_not_start_says_what_to_do(gpu: Any, code: int, remedy: str) -> None:
    with pytest.raises(NvmlMissing, match=remedy):
        gpu.script(f"init {code}")


def test_missing_rights_are_their_own_error(gpu: Any) -> None:
    with gpu.script("energy_error 4") as board, pytest.raises(PermissionNeeded, match="administrator"):
        board.energy_mj()


def test_a_containers_own_process_is_not_foreign(gpu: Any) -> None:
    gpu._script.write_text("process 4711\n")
    with gpu.open() as board:
        assert board.state().foreign == ()
    gpu._script.write_text("process 4711\nprocess 4712\n")
    with gpu.open() as board:
        assert board.state().foreign == (4712,)


def test_a_worker_of_ours_is_not_foreign(gpu: Any) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        with gpu.script(f"process {worker.pid}") as board:
            assert board.state().foreign == ()
        worker.communicate(b"\n")


def test_the_binding_finds_the_library_by_its_name(
    fake_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "from rlnas_fast.hardware.nvml import NvmlBoard; print(NvmlBoard(0).uuid, NvmlBoard(0).energy_mj())"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(fake_library.parent)}
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert output.split() == ["GPU-00000000-1111-2222-3333-444444444444", "0"]


def test_without_a_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    import pynvml

    def missing(name: str) -> Callable[..., Any]:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", missing)
    assert ctypes.CDLL is not missing
    with pytest.raises(NvmlMissing, match="comes with the driver"):
        NvmlBoard(0)
