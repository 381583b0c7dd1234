"""A full disk, a folder that cannot be written, Ctrl-C: one line, an exit code, and a run that resumes."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = [
    "--space=own_parts:TwoLayers", "--task=own_parts:bits", "--evaluator=own_parts:LeastSquares",
    "--reward=own_parts:small_is_good", "--strategy=random", "--batch-size=1",
]  # fmt: skip
SLOW = """
import time
import own_parts
from dataclasses import dataclass

@dataclass(frozen=True)
class Slow(own_parts.LeastSquares):
    def evaluate(self, request):
        time.sleep(0.2)
        return super().evaluate(request)
"""


def rlnas(folder: Path, *arguments: str, **more: object) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(EXAMPLES)])}
    return subprocess.Popen(
        [sys.executable, "-m", "rlnas_fast.cli", *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # type: ignore[call-overload, no-any-return]  # fmt: skip


def small_files_only() -> None:
    """What a full disk looks like to a process: no file may grow beyond 24 KiB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24 << 10, 24 << 10))


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    process = rlnas(tmp_path, "search", *OWN, "--trials=9", "--out=run", preexec_fn=small_files_only)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message.count("\n") == 1
    assert "Traceback" not in message
    resumed = rlnas(tmp_path, "resume", "run", "--json")
    out, message = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, message
    assert json.loads(out)["trials"] == 9


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "slow_parts.py").write_text(SLOW)
    process = rlnas(tmp_path, "search", *OWN, "--evaluator=slow_parts:Slow", "--trials=9", "--out=run")
    log = tmp_path / "run" / "trials.sqlite"
    for _ in range(300):
        time.sleep(0.1)
        if log.exists() and trials_in(log) >= 2:
            break
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message == "rlnas: interrupted; go on with: rlnas resume run\n"
    done = trials_in(log)
    assert 2 <= done < 9
    resumed = rlnas(tmp_path, "resume", "run", "--json")
    out, message = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, message
    summary = json.loads(out)
    assert summary["trials"] == 9
    assert summary["from_cache"] <= 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    process = rlnas(tmp_path, "search", *OWN, "--trials=2", "--out=locked/run")
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "locked/run" in message


def trials_in(log: Path) -> int:
    connection = sqlite3.connect(f"file:{log}?mode=ro", uri=True)
    try:
        return int(connection.execute("SELECT count(*) FROM trials").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        connection.close()
