from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlnas_fast.errors import ConfigError, DataError, RlnasError
from rlnas_fast.executors.process_pool import ProcessPool
from rlnas_fast.executors.serial import Serial
from rlnas_fast.search import Architecture, Budget, Executor, Measurement, Request

sys.path.insert(0, str(Path(__file__).parent))  # spawned workers find the evaluators by this path
import worker_evaluators as evaluators
from worker_evaluators import Deterministic, Dying, Placed

EXECUTORS: dict[str, Callable[[], Any]] = {
    "serial": Serial,
    "one worker": lambda: ProcessPool(1),
    "three workers": lambda: ProcessPool(3),
}


def requests(count: int) -> list[Request]:
    return [Request(Architecture("chain", (seed, 2)), Budget(1), seed) for seed in range(count)]


def in_order(results: Iterator[tuple[int, Measurement, float]]) -> list[Measurement]:
    return [measurement for _, measurement, _ in sorted(results, key=lambda result: result[0])]


def expected(count: int) -> list[Measurement]:
    return [Deterministic().evaluate(request) for request in requests(count)]


@pytest.fixture(params=EXECUTORS, scope="module")
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    executor = EXECUTORS[request.param]()
    yield executor
    getattr(executor, "close", lambda: None)()


class TestExecutorContract:
    """What every executor does."""

    def test_is_an_executor(self, executor: Any) -> None:
        assert isinstance(executor, Executor)

    def test_evaluates_each_request_once(self, executor: Any) -> None:
        results = list(executor.run(Deterministic(), requests(7)))
        assert sorted(position for position, _, _ in results) == list(range(7))
        assert in_order(iter(results)) == expected(7)
        assert all(seconds >= 0 for _, _, seconds in results)

    def test_nothing_asked_nothing_done(self, executor: Any) -> None:
        assert list(executor.run(Deterministic(), [])) == []

    def test_can_be_used_again_with_another_evaluator(self, executor: Any) -> None:
        evaluator = Deterministic(0.001)
        for count in (2, 5):
            assert in_order(executor.run(evaluator, requests(count))) == expected(count)

    def test_what_an_evaluator_raises_goes_on(self, executor: Any) -> None:
        with pytest.raises(DataError, match="the data set is gone"):
            list(executor.run(evaluators.Raising(), requests(3)))
        assert in_order(executor.run(Deterministic(), requests(2))) == expected(2)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_always_dies_is_a_failed_trial(kind: signal.Signals) -> None:
    with ProcessPool(2) as pool:
        results = in_order(pool.run(Dying(at=1, signal=kind), requests(4)))
    assert results[1].failure == f"worker died: signal {kind.value} ({kind.name}) (2 tries)"
    assert results[1].transient
    assert [results[0], *results[2:]] == [expected(4)[0], *expected(4)[2:]]


def test_a_worker_that_dies_once_changes_no_result(tmp_path: Path) -> None:
    with ProcessPool(2) as pool:
        assert in_order(pool.run(Dying(at=2, marker=tmp_path / "died"), requests(5))) == expected(5)


def test_a_worker_that_dies_between_runs_is_replaced() -> None:
    evaluator = Placed()
    with ProcessPool(1) as pool:
        (first,) = in_order(pool.run(evaluator, requests(1)))
        os.kill(int(first.extra["process"]), signal.SIGKILL)
        time.sleep(0.05)
        (second,) = in_order(pool.run(evaluator, requests(1)))
    assert first.extra["process"] != second.extra["process"]


def test_a_worker_that_hangs_is_a_failed_trial() -> None:
    with ProcessPool(1, timeout_seconds=1.5) as pool:
        results = in_order(pool.run(evaluators.Hanging(), requests(3)))
    assert results[1] == Measurement(failure="over time: no answer after 1.5 s", transient=True)
    assert [results[0], results[2]] == [expected(3)[0], expected(3)[2]]


def test_a_worker_that_holds_too_much_memory_is_a_failed_trial() -> None:
    with ProcessPool(1, memory_limit_bytes=300 * 2**20) as pool:
        results = in_order(pool.run(evaluators.Greedy(), requests(3)))
    assert str(results[1].failure).startswith("over memory: ")
    assert str(results[1].failure).endswith("limit 300 MiB")
    assert [results[0], results[2]] == [expected(3)[0], expected(3)[2]]


def test_workers_keep_to_their_devices_and_threads() -> None:
    with ProcessPool(2, devices=("a:0", "a:1"), threads_per_worker=3) as pool:
        results = in_order(pool.run(Placed(), requests(8)))
        places = {(int(r.extra["process"]), name) for r in results for name in r.extra if name[1] == ":"}
        assert sorted(name for _, name in places) == ["a:0", "a:1"]
        assert {r.extra["threads"] for r in results} == {3.0}
    assert os.environ.get("OMP_NUM_THREADS") != "3"


@pytest.mark.parametrize(
    ("evaluator", "error", "message"),
    [
        (evaluators.Unpicklable(), ConfigError, "cannot be sent to worker processes .cannot pickle this"),
        (
            evaluators.FailsToLoad(),
            RlnasError,
            "worker for cpu could not start: DataError: no data set in the",
        ),
        (evaluators.KillsItsStart(), RlnasError, "could not start: worker died: signal 9 .SIGKILL"),
    ],
)
def test_a_worker_that_cannot_start_is_one_line(
    evaluator: Deterministic, error: type[Exception], message: str
) -> None:
    with ProcessPool(1) as pool, pytest.raises(error, match=message) as caught:
        list(pool.run(evaluator, requests(2)))
    assert "\n" not in str(caught.value)


def test_a_limit_below_an_idle_worker_is_named() -> None:
    with ProcessPool(1, memory_limit_bytes=2**20) as pool, pytest.raises(RlnasError, match="limit 1 MiB"):
        list(pool.run(Deterministic(), requests(1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers = 0"),
        ({"workers": 2, "devices": ("cuda:0", "cuda:0")}, "name each one once"),
        ({"workers": 2, "devices": ()}, "name at least one"),
        ({"workers": 1, "devices": ("cuda:0", "cuda:1")}, "2 devices need as many"),
        ({"workers": 1, "threads_per_worker": 0}, "threads per worker = 0"),
        ({"workers": 1, "timeout_seconds": -1.0}, "timeout = -1.0"),
        ({"workers": 1, "memory_limit_bytes": 0}, "memory limit = 0"),
    ],
)
def test_senseless_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProcessPool(**arguments)


def test_an_evaluator_that_cannot_move_is_named() -> None:
    with pytest.raises(ConfigError, match="Deterministic has no on_device"):
        list(ProcessPool(1, devices=("cuda:0",)).run(Deterministic(), requests(1)))


LONG_RUN = """
    import sys
    if __name__ == "__main__":
        from worker_evaluators import Placed
        from test_executors import requests
        from rlnas_fast.executors.process_pool import ProcessPool
        pool = ProcessPool(2)
        try:
            while True:
                for _, measurement, _ in pool.run(Placed(), requests(4)):
                    print(int(measurement.extra["process"]), flush=True)
        except KeyboardInterrupt:
            print("interrupted")
            sys.exit(130)
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_run(tmp_path: Path, kind: signal.Signals) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(LONG_RUN))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        workers = {int(process.stdout.readline()) for _ in range(4)}
        os.killpg(process.pid, kind) if kind == signal.SIGINT else process.send_signal(kind)
        rest = process.stdout.read()
        complaints = process.stderr.read()
    assert process.returncode == (130 if kind == signal.SIGINT else -kind)
    assert "Traceback" not in complaints
    assert rest.endswith("interrupted\n") == (kind == signal.SIGINT)
    deadline = time.monotonic() + 10
    while any(_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(worker) for worker in workers)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_importing_executors_does_not_import_torch() -> None:
    script = "import rlnas_fast.executors.process_pool, rlnas_fast.executors.serial, sys"
    script += "; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output == "False\n"
