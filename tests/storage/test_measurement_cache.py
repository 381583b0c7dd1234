from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from rlnas_fast.errors import RunError
from rlnas_fast.search import Measurement, MeasurementCache
from rlnas_fast.storage.measurement_cache import SqliteCache
from rlnas_fast.storage.sqlite_log import SqliteLog


def test_keeps_measurements_between_openings(tmp_path: Path) -> None:
    measurement = Measurement(accuracy=1 / 3, extra={"score": 2.0})
    with SqliteCache(tmp_path / "cache.sqlite") as cache:
        assert isinstance(cache, MeasurementCache)
        assert cache.get("a") is None
        cache.put("a", measurement)
    with SqliteCache(tmp_path / "cache.sqlite") as cache:
        assert cache.get("a") == measurement
        assert cache.get("b") is None
        assert cache.notes == ()


def test_the_first_measurement_stays(tmp_path: Path) -> None:
    with SqliteCache(tmp_path / "cache.sqlite") as cache:
        cache.put("a", Measurement(accuracy=0.5))
        cache.put("a", Measurement(accuracy=0.6))
        assert cache.get("a") == Measurement(accuracy=0.5)


def test_a_passing_failure_is_not_kept(tmp_path: Path) -> None:
    with SqliteCache(tmp_path / "cache.sqlite") as cache:
        cache.put("a", Measurement(failure="worker died: signal 9", transient=True))
        cache.put("b", Measurement(failure="loss is not finite"))
        assert cache.get("a") is None
        assert cache.get("b") == Measurement(failure="loss is not finite")


def test_a_log_is_not_a_cache(tmp_path: Path) -> None:
    SqliteLog(tmp_path / "trials.sqlite").close()
    with pytest.raises(RunError, match="not a measurement cache"):
        SqliteCache(tmp_path / "trials.sqlite")


def _fill(path: Path, writer: int) -> None:
    with SqliteCache(path) as cache:
        for number in range(50):
            cache.put(f"{writer}/{number}", Measurement(accuracy=number / 50))
            cache.put(f"shared/{number}", Measurement(accuracy=number / 50))


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_fill, args=(path, writer)) for writer in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    with SqliteCache(path) as cache:
        for name in ("0", "1", "2", "shared"):
            found = [cache.get(f"{name}/{number}") for number in range(50)]
            assert found == [Measurement(accuracy=number / 50) for number in range(50)]
