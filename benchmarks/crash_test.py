"""Kills a search at random moments, resumes it each time, and compares it with one that was left alone.

SIGKILL leaves no time to save anything.  After every kill the log must be sound and hold a beginning of
the undisturbed run's trials; at the end all of them: the same architectures, measurements, rewards and
order, none lost, none twice.  Exits 1 if that does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlnas_fast.errors import RunError
from rlnas_fast.search import Cost, Measurement, Request, SearchSpace, Trial
from rlnas_fast.storage.sqlite_log import SqliteLog

BATCH_SIZE = 5
TRIALS_A_KILL = 10
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Deterministic:
    """An evaluator whose measurement depends on its request alone, and which takes a moment to give it."""

    space: SearchSpace
    task: Any
    seconds: float = 0.015

    def identity(self) -> Mapping[str, str]:
        return {"evaluator": "deterministic", "space": self.space.name}

    def evaluate(self, request: Request) -> Measurement:
        """Numbers from a hash; one child in eight fails."""
        time.sleep(self.seconds)
        key = self.space.canonical_key(request.architecture)
        digest = hashlib.sha256(f"{key}/{request.seed}".encode()).digest()
        if digest[0] < 32:
            return Measurement(failure="diverged: loss 1e9 in epoch 1")
        return Measurement(
            accuracy=digest[1] / 255,
            parameters=1000 + digest[2],
            cost=Cost(latency_s=1e-3 + digest[3] * 1e-6),
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how many times (default 20)")
    parser.add_argument("--quick", action="store_true", help="5 kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    kills = 5 if options.quick else options.kills
    problems, trials = problems_after(kills, options.seed)
    for problem in problems:
        print(f"WRONG: {problem}")
    if not problems:
        print(f"{kills} kills, {trials} trials: none lost, none twice, the same as undisturbed")
    return 1 if problems else 0


def equal_share(kills: int, seed: int = 0) -> float:
    """1 if a search that is killed ``kills`` times ends as one that is left alone, else less."""
    problems, trials = problems_after(kills, seed, say=lambda text: None)
    return max(0.0, 1.0 - len(problems) / trials)


def problems_after(kills: int, seed: int, say: Callable[[str], None] = print) -> tuple[list[str], int]:
    """(everything that is wrong with a search that is killed ``kills`` times, how many trials it has)."""
    trials = TRIALS_A_KILL * (kills + 1)
    with tempfile.TemporaryDirectory(prefix="rlnas-crash-") as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        started = time.monotonic()
        _run_to_its_end(_search(alone, trials))
        expected = _trials(alone)
        say(f"undisturbed: {len(expected)} trials in {time.monotonic() - started:.1f} s")
        problems, where = _kill_and_resume(killed, trials, kills, random.Random(seed), expected)
        say(f"{kills} kills of a process: {', '.join(f'{n} {moment}' for moment, n in where.items())}")
        problems += _differences(_trials(killed), expected, finished=True)
        if not (killed / "summary.json").is_file():
            problems.append("the resumed run did not finish: it has no summary.json")
    return problems, trials


def _kill_and_resume(
    folder: Path, trials: int, kills: int, moments: random.Random, expected: Sequence[Trial]
) -> tuple[list[str], Counter[str]]:
    problems: list[str] = []
    where: Counter[str] = Counter()
    for kill in range(kills):
        before = len(_trials(folder))
        process = subprocess.Popen(
            _next_command(folder, trials),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parent,
        )
        # One kill in four comes at any time in the first seconds, before the first new trial or after it;
        # the others some trials later, at any moment of the next ones.
        if kill % 4 == 0:
            time.sleep(moments.uniform(0.0, 4.0))
        else:
            _wait_for(folder, before + moments.randrange(1, TRIALS_A_KILL - BATCH_SIZE), process)
            time.sleep(moments.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            problems.append(f"kill {kill + 1} came too late: the run had ended with {process.returncode}")
        now = _trials(folder)
        where["before the first new trial" if len(now) == before else "after it"] += 1
        problems += [f"after kill {kill + 1}: {text}" for text in _differences(now, expected, finished=False)]
    _run_to_its_end(_next_command(folder, trials))
    return problems, where


def _run_to_its_end(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent)


def _next_command(folder: Path, trials: int) -> list[str]:
    if (folder / "config.toml").is_file():
        return [sys.executable, "-m", "rlnas_fast.cli", "resume", str(folder)]
    shutil.rmtree(folder, ignore_errors=True)  # killed before it was a run: there is nothing to resume
    return _search(folder, trials)


def _search(folder: Path, trials: int) -> list[str]:
    return [
        *(sys.executable, "-m", "rlnas_fast.cli", "search", "--out", str(folder)),
        *("--evaluator", "crash_test:Deterministic", "--strategy", "reinforce", "--reward", "soft"),
        *("--trials", str(trials), "--batch-size", str(BATCH_SIZE), "--seed", "1", "--device", "cpu"),
    ]


def _trials(folder: Path) -> list[Trial]:
    """What the log holds, after a check that the file is sound; nothing where there is no log yet."""
    file = folder / "trials.sqlite"
    if not file.exists():
        return []
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
    if verdict != "ok":
        raise RunError(f"{file} is damaged: {verdict}")
    try:
        with SqliteLog.open_readonly(file) as log:
            return log.read()
    except RunError as error:
        if "nothing was ever written" in str(error):
            return []
        raise


def _wait_for(folder: Path, trials: int, process: subprocess.Popen[bytes]) -> None:
    file = folder / "trials.sqlite"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
                if connection.execute("SELECT count(*) FROM trials").fetchone()[0] >= trials:
                    return
        except sqlite3.OperationalError:
            pass  # no file, or no table yet
        time.sleep(0.002)


def _differences(found: Sequence[Trial], expected: Sequence[Trial], *, finished: bool) -> list[str]:
    """What is wrong with ``found``, but for how long a trial took and whether it was measured twice."""
    if finished and len(found) != len(expected):
        return [f"{len(found)} trials instead of {len(expected)}"]
    if len(found) > len(expected):
        return [f"{len(found)} trials, more than the {len(expected)} of the undisturbed run"]
    return [
        f"trial {one.number} is {one}, undisturbed it is {other}"
        for one, other in zip(found, expected, strict=False)
        if replace(one, seconds=0.0, cached=False) != replace(other, seconds=0.0, cached=False)
    ][:3]


if __name__ == "__main__":
    sys.exit(main())
