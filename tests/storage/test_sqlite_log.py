from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlnas_fast.errors import ConfigError, RunError
from rlnas_fast.search import Trial, TrialLog
from rlnas_fast.storage import database
from rlnas_fast.storage.sqlite_log import SqliteLog

MakeTrials = Callable[..., list[Trial]]


def on_a_network(path: Path, monkeypatch: pytest.MonkeyPatch) -> SqliteLog:
    monkeypatch.setattr(database, "is_network", lambda path: True)
    return SqliteLog(path)


OPENERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "crash": lambda path, _: SqliteLog(path),
    "full": lambda path, _: SqliteLog(path, durability="full"),
    "network": on_a_network,
}


class TestTrialLogContract:
    """What every trial log does."""

    @pytest.fixture(params=OPENERS)
    def reopen(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Callable[[], Any]]:
        opened: list[Any] = []

        def reopen() -> Any:
            for log in opened:
                log.close()
            opened.append(OPENERS[request.param](tmp_path / "trials.sqlite", monkeypatch))
            return opened[-1]

        yield reopen
        for log in opened:
            log.close()

    def test_is_a_trial_log(self, reopen: Callable[[], Any]) -> None:
        assert isinstance(reopen(), TrialLog)

    def test_a_new_log_is_empty(self, reopen: Callable[[], Any]) -> None:
        assert reopen().read() == []

    def test_reads_back_exactly_what_was_appended(
        self, reopen: Callable[[], Any], make_trials: MakeTrials
    ) -> None:
        log = reopen()
        log.append(make_trials(4))
        log.append(make_trials(4, first=4))
        assert log.read() == make_trials(8)
        assert reopen().read() == make_trials(8)

    def test_appending_nothing_changes_nothing(self, reopen: Callable[[], Any]) -> None:
        log = reopen()
        log.append([])
        assert log.read() == []

    @pytest.mark.parametrize("first", [0, 3, 5])
    def test_trials_come_once_and_in_order(
        self, reopen: Callable[[], Any], make_trials: MakeTrials, first: int
    ) -> None:
        log = reopen()
        log.append(make_trials(4))
        with pytest.raises(RunError, match="do not follow"):
            log.append(make_trials(4, first=first))
        assert log.read() == make_trials(4)

    def test_meta_is_durable(self, reopen: Callable[[], Any]) -> None:
        log = reopen()
        log.meta["space"] = "chain"
        log.meta["versions"] = '{"torch": "2"}'
        log.meta["space"] = "cell"
        assert dict(reopen().meta) == {"space": "cell", "versions": '{"torch": "2"}'}
        del log
        assert reopen().meta.get("absent") is None


def test_the_table_can_be_queried_by_anyone(tmp_path: Path, make_trials: MakeTrials) -> None:
    with SqliteLog(tmp_path / "trials.sqlite") as log:
        log.append(make_trials(4))
    with sqlite3.connect(tmp_path / "trials.sqlite") as connection:
        rows = connection.execute(
            "SELECT number, space, choices, state, failure, latency_s FROM trials"
        ).fetchall()
    connection.close()
    assert rows[1] == (1, "chain", "[1, 0, 7]", "complete", None, 1e-3 / 7)
    assert rows[3] == (3, "chain", "[3, 0, 7]", "failed", "out of memory: 3 GiB wanted", None)


def test_a_closed_log_is_one_file(tmp_path: Path, make_trials: MakeTrials) -> None:
    with SqliteLog(tmp_path / "trials.sqlite") as log:
        log.append(make_trials(3))
        log.close()
    assert [file.name for file in tmp_path.iterdir()] == ["trials.sqlite"]


def test_a_reader_sees_a_log_while_it_is_written(tmp_path: Path, make_trials: MakeTrials) -> None:
    with SqliteLog(tmp_path / "trials.sqlite") as log:
        log.append(make_trials(2))
        with SqliteLog.open_readonly(tmp_path / "trials.sqlite") as reader:
            assert len(reader.read()) == 2
            log.append(make_trials(2, first=2))
            assert reader.read() == make_trials(4)
            with pytest.raises(RunError, match="reading only"):
                reader.append(make_trials(1, first=4))
            with pytest.raises(RunError, match="reading only"):
                reader.meta["a"] = "b"


def test_one_process_writes(tmp_path: Path) -> None:
    holder = rf"being written by process {os.getpid()} on "
    with SqliteLog(tmp_path / "trials.sqlite"), pytest.raises(RunError, match=holder):
        SqliteLog(tmp_path / "trials.sqlite")
    SqliteLog(tmp_path / "trials.sqlite").close()


WRITE_UNTIL_KILLED = """
    import sys, os
    sys.path.insert(0, os.path.dirname(sys.argv[2]))
    from conftest import _trials
    from rlnas_fast.storage.sqlite_log import SqliteLog
    log = SqliteLog(sys.argv[1])
    done = len(log.read())
    while True:
        log.append(_trials(4, first=done))
        done += 4
        print(done, flush=True)
"""


def test_sigkill_loses_nothing_that_was_appended(tmp_path: Path, make_trials: MakeTrials) -> None:
    file = tmp_path / "trials.sqlite"
    script = textwrap.dedent(WRITE_UNTIL_KILLED)
    command = [sys.executable, "-c", script, str(file), str(Path(__file__).with_name("conftest.py"))]
    said = 0
    for lines in (1, 7, 23):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(lines):
                said = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            said = max([said, *(int(line) for line in process.stdout if line.endswith("\n"))])
        with SqliteLog.open_readonly(file) as log:
            trials = log.read()
        assert len(trials) >= said
        assert len(trials) % 4 == 0
        assert trials == make_trials(len(trials))


def test_says_what_a_file_is_if_it_is_not_a_log(tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, but long enough to be taken for the header of one" * 20)
    with pytest.raises(RunError, match="another kind of file"):
        SqliteLog(text)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    for opener in (SqliteLog, SqliteLog.open_readonly):
        with pytest.raises(RunError, match="something else"):
            opener(foreign)
    newer = tmp_path / "newer.sqlite"
    SqliteLog(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(RunError, match="format 99 from a newer rlnas_fast"):
        SqliteLog(newer)
    assert not list(tmp_path.glob("*.lock"))


def test_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no trial log at"):
        SqliteLog.open_readonly(tmp_path / "none.sqlite")
    with pytest.raises(RunError, match="No such file or directory"):
        SqliteLog(tmp_path / "no folder" / "trials.sqlite")
    with pytest.raises(ConfigError, match="'crash' or 'full'"):
        SqliteLog(tmp_path / "trials.sqlite", durability="none")  # type: ignore[arg-type]


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, make_trials: MakeTrials) -> None:
    with SqliteLog(tmp_path / "trials.sqlite") as log:
        log.append(make_trials(4))
        log._connection.execute("PRAGMA max_page_count = 5")
        with pytest.raises(RunError, match="disk or quota is full"):
            log.append(make_trials(400, first=4))
        assert log.read() == make_trials(4)


READ_ONLY = """
    import os, sys
    from rlnas_fast.errors import RunError
    from rlnas_fast.storage.sqlite_log import SqliteLog
    if os.geteuid() == 0:
        os.setuid(65534)
    print(len(SqliteLog.open_readonly(sys.argv[1]).read()))
    try:
        SqliteLog(sys.argv[1])
    except RunError as error:
        print(error)
"""


def test_a_read_only_folder_can_be_read(make_trials: MakeTrials) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with SqliteLog(folder / "trials.sqlite") as log:
            log.append(make_trials(3))
        folder.chmod(0o555)
        command = [sys.executable, "-c", textwrap.dedent(READ_ONLY), str(folder / "trials.sqlite")]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        folder.chmod(0o755)
    assert output[0] == "3"
    assert "Permission denied" in output[1]
    assert len(output) == 2


def test_a_network_file_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_a_network(tmp_path / "trials.sqlite", monkeypatch) as log:
        (note,) = log.notes
    assert "truncate journal" in note


def test_importing_the_storage_does_not_import_torch() -> None:
    script = "import rlnas_fast.storage.sqlite_log, rlnas_fast.storage.measurement_cache, sys"
    script += "; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert output == "False\n"
