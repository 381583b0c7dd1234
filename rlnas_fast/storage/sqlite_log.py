"""The log of a run: every trial, durable before anything else happens with it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from ..errors import ConfigError, RunError
from ..search.space import Architecture
from ..search.trial import Measurement, Trial
from .database import Schema, explained, open_database, open_readonly, transaction
from .writer_lock import WriterLock

SCHEMA = Schema(
    name="trial log",
    application_id=0x524C4E31,  # "RLN1"
    version=1,
    statements=(
        """CREATE TABLE trials (
            number INTEGER PRIMARY KEY,
            batch INTEGER NOT NULL,
            key TEXT NOT NULL,
            space TEXT NOT NULL,
            choices TEXT NOT NULL,
            state TEXT NOT NULL,
            failure TEXT,
            reward REAL NOT NULL,
            accuracy REAL,
            latency_s REAL,
            parameters INTEGER,
            seconds REAL NOT NULL,
            cached INTEGER NOT NULL,
            measurement TEXT NOT NULL,
            created_at TEXT NOT NULL
        ) STRICT""",
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    ),
)


class SqliteLog:
    """Keeps the trials of one run in an SQLite file, table ``trials``.

    What ``append`` has returned from survives SIGKILL; with ``durability="full"`` a loss of power too.
    One process at a time opens a log for writing, any number read it meanwhile.  A log may be used
    from several threads, by one at a time.

    Args:
        path: the file, in a folder that exists; created if it is not there.
        durability: "crash" or "full".
        readonly: see ``open_readonly``.
    Attributes:
        meta: texts by name that belong to the run (versions, configuration), each durable once set.
        notes: what a user should know about how the log is kept here, one line each.
    Raises:
        RunError: the file cannot be used, or another process is writing it; the message says which.
    """

    def __init__(
        self, path: str | Path, *, durability: Literal["crash", "full"] = "crash", readonly: bool = False
    ) -> None:
        if durability not in ("crash", "full"):
            raise ConfigError(f"durability {durability!r}: give 'crash' or 'full'")
        self.path = Path(path)
        self.notes: tuple[str, ...] = ()
        self._readonly = readonly
        with ExitStack() as held:
            if readonly:
                self._connection = open_readonly(self.path, SCHEMA)
            else:
                with explained(self.path, SCHEMA.name):
                    lock = WriterLock(self.path.with_name(self.path.name + ".lock"))
                held.callback(lock.release)
                self._connection, self.notes = open_database(self.path, SCHEMA, full=durability == "full")
                self.notes += (lock.note,) if lock.note else ()
            held.callback(self._connection.close)
            self._held = held.pop_all()
        self.meta: MutableMapping[str, str] = _Meta(self)

    @classmethod
    def open_readonly(cls, path: str | Path) -> SqliteLog:
        """Opens a log that exists to read it, whether or not a search is writing it."""
        return cls(path, readonly=True)

    def read(self) -> list[Trial]:
        """Every trial appended so far, in order."""
        with explained(self.path, SCHEMA.name):
            rows = self._connection.execute(
                "SELECT number, batch, space, choices, key, measurement, reward, seconds, cached "
                "FROM trials ORDER BY number"
            ).fetchall()
        try:
            return [_trial(*row) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"trial log {self.path} holds a trial that cannot be read: {error!r}") from error

    def append(self, trials: Sequence[Trial]) -> None:
        """Adds one batch: all of it or, if the process dies, none of it.

        Raises:
            RunError: the numbers do not follow those in the log, or the file cannot be written.
        """
        created_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows = [_row(trial, created_at) for trial in trials]
        with explained(self.path, SCHEMA.name), transaction(self._writable()):
            (count,) = self._connection.execute("SELECT coalesce(max(number) + 1, 0) FROM trials").fetchone()
            numbers = [trial.number for trial in trials]
            if numbers != list(range(count, count + len(trials))):
                raise RunError(
                    f"trial log {self.path} holds {count} trials; trials {numbers} do not follow them"
                )
            self._connection.executemany(f"INSERT INTO trials VALUES ({', '.join('?' * 15)})", rows)

    def close(self) -> None:
        """Ends the use of the file and lets another process write it."""
        with explained(self.path, SCHEMA.name):
            self._held.close()

    def __enter__(self) -> SqliteLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _writable(self) -> sqlite3.Connection:
        if self._readonly:
            raise RunError(f"trial log {self.path} was opened for reading only")
        return self._connection


class _Meta(MutableMapping[str, str]):
    """The table ``meta`` as a mapping."""

    def __init__(self, log: SqliteLog) -> None:
        self._log = log

    def __getitem__(self, name: str) -> str:
        with explained(self._log.path, SCHEMA.name):
            row = self._log._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise KeyError(name)
        return str(row[0])

    def __setitem__(self, name: str, value: str) -> None:
        with explained(self._log.path, SCHEMA.name):
            self._log._writable().execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def __delitem__(self, name: str) -> None:
        with explained(self._log.path, SCHEMA.name):
            found = self._log._writable().execute("DELETE FROM meta WHERE name = ?", (name,)).rowcount
        if not found:
            raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        with explained(self._log.path, SCHEMA.name):
            rows = self._log._connection.execute("SELECT name FROM meta ORDER BY name").fetchall()
        return (str(name) for (name,) in rows)

    def __len__(self) -> int:
        return len(list(iter(self)))


def _row(trial: Trial, created_at: str) -> tuple[object, ...]:
    measurement = trial.measurement
    return (
        trial.number,
        trial.batch,
        trial.key,
        trial.architecture.space,
        json.dumps(trial.architecture.choices),
        trial.state,
        measurement.failure,
        trial.reward,
        measurement.accuracy,
        measurement.cost.latency_s,
        measurement.parameters,
        trial.seconds,
        trial.cached,
        measurement.to_json(),
        created_at,
    )


def _trial(
    number: int,
    batch: int,
    space: str,
    choices: str,
    key: str,
    measurement: str,
    reward: float,
    seconds: float,
    cached: int,
) -> Trial:
    return Trial(
        number=number,
        batch=batch,
        architecture=Architecture(space, tuple(json.loads(choices))),
        key=key,
        measurement=Measurement.from_json(measurement),
        reward=reward,
        seconds=seconds,
        cached=bool(cached),
    )
