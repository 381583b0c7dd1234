from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlnas_fast.errors import MeterError
from rlnas_fast.hardware.cuda_events import CudaEventMeter
from rlnas_fast.hardware.replay import ReplayMeter, record
from rlnas_fast.hardware.wall_clock import WallClockMeter
from rlnas_fast.search import Cost, Meter


def replayed(path: Path) -> ReplayMeter:
    recorder = record(WallClockMeter(), path)
    for _ in range(2):
        recorder.measure(lambda: sum(range(1000)))
    return ReplayMeter(path)


METERS = [
    pytest.param(lambda path: WallClockMeter(), id="wall clock"),
    pytest.param(lambda path: record(WallClockMeter(), path), id="recording"),
    pytest.param(replayed, id="replay"),
    pytest.param(lambda path: CudaEventMeter("cuda:0"), id="cuda events", marks=pytest.mark.gpu),
    pytest.param(lambda path: CudaEventMeter("cuda:0", graph=True), id="cuda graph", marks=pytest.mark.gpu),
]


class TestMeterContract:
    """What every meter does."""

    @pytest.fixture(params=METERS)
    def meter(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        return request.param(tmp_path / "recording.jsonl")

    @pytest.fixture
    def call(self, meter: Any) -> Callable[[], object]:
        import torch

        device = "cuda:0" if isinstance(meter, CudaEventMeter) else "cpu"
        x = torch.ones(64, 64, device=device)
        return lambda: x @ x

    def test_is_a_meter(self, meter: Any) -> None:
        assert isinstance(meter, Meter)

    def test_costs_are_positive_and_ordered(self, meter: Any, call: Callable[[], object]) -> None:
        cost = meter.measure(call)
        assert isinstance(cost, Cost)
        assert 0 < cost.latency_low_s <= cost.latency_s <= cost.latency_high_s < 1
        assert all(isinstance(caveat, str) and "\n" not in caveat for caveat in cost.caveats)

    def test_measures_more_than_once(self, meter: Any, call: Callable[[], object]) -> None:
        assert meter.measure(call).latency_s > 0
        assert meter.measure(call).latency_s > 0

    def test_travels_to_a_worker(self, meter: Any, call: Callable[[], object]) -> None:
        assert pickle.loads(pickle.dumps(meter)).measure(call).latency_s > 0


def test_a_recording_gives_back_what_was_measured(tmp_path: Path) -> None:
    recorder = record(WallClockMeter(), tmp_path / "costs.jsonl")
    measured = [recorder.measure(lambda n=n: sum(range(n))) for n in (10, 100_000)]  # type: ignore[misc]
    meter = ReplayMeter(tmp_path / "costs.jsonl")
    assert [meter.measure(lambda: None) for _ in range(2)] == measured
    with pytest.raises(MeterError, match="holds 2 costs and all have been given"):
        meter.measure(lambda: None)


def test_a_recording_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match="cannot be read: No such file"):
        ReplayMeter(tmp_path / "none")
    (tmp_path / "broken").write_text('{"latency_s": 1.0, "caveats": []}\n{"latency')
    with pytest.raises(MeterError, match="line 2 is not JSON"):
        ReplayMeter(tmp_path / "broken")
    (tmp_path / "other").write_text('{"watts": 1.0, "caveats": []}\n')
    with pytest.raises(MeterError, match="other fields"):
        ReplayMeter(tmp_path / "other")


@pytest.mark.gpu
def test_a_graph_is_no_slower_than_its_launches() -> None:
    import torch

    x = torch.ones(64, 64, device="cuda:0")

    def call() -> None:
        y = x
        for _ in range(30):
            y = y @ x

    eager = CudaEventMeter("cuda:0").measure(call)
    replayed = CudaEventMeter("cuda:0", graph=True).measure(call)
    assert replayed.latency_s is not None
    assert eager.latency_s is not None
    assert replayed.latency_s < eager.latency_s
    assert eager.peak_memory_bytes is not None


@pytest.mark.gpu
def test_a_call_that_cannot_be_captured_says_so() -> None:
    import torch

    x = torch.ones(8, device="cuda:0")
    cost = CudaEventMeter("cuda:0", graph=True).measure(lambda: x.sum().item())
    assert cost.latency_s is not None
    assert any("not captured as a CUDA graph" in caveat for caveat in cost.caveats)
    assert float(x.sum()) == 8  # the device still works


@pytest.mark.gpu
def test_energy_on_a_real_board_is_a_number_or_a_reason() -> None:
    import torch

    x = torch.ones(2048, 2048, device="cuda:0")
    cost = CudaEventMeter("cuda:0", energy_seconds=1.0).measure(lambda: x @ x)
    if cost.energy_j is None:
        assert any("energy unknown" in caveat for caveat in cost.caveats)
    else:
        assert cost.energy_j > 0
        assert cost.power_w is not None
