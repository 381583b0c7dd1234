"""Opens our SQLite files: recognises them, chooses a journal that works there, and explains what fails."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError
from .file_system import file_system_type, is_network

BUSY_SECONDS = 30.0


@dataclass(frozen=True)
class Schema:
    """What one kind of our files looks like.

    Attributes:
        name: what the file is, for messages: "trial log".
        application_id: SQLite's mark in the header, by which a foreign file is told from ours.
        version: grows with every change of ``statements``.
        statements: create the tables of an empty file.
    """

    name: str
    application_id: int
    version: int
    statements: tuple[str, ...]


def open_database(path: Path, schema: Schema, *, full: bool) -> tuple[sqlite3.Connection, tuple[str, ...]]:
    """Opens ``path`` for writing and creates what is missing.

    What is committed survives the death of the process: the journal is a write-ahead log, so that
    readers never wait.  It needs memory that is shared between processes; on a network file system
    a rollback journal takes its place.

    Args:
        full: every commit also survives a loss of power, at the price of one fsync each.
    Returns:
        A connection in autocommit mode, and what a user should know about how the file is kept.
    Raises:
        RunError: the file is not ours, is from a newer version, or cannot be written.
    """
    with explained(path, schema.name):
        connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _recognise(connection, path, schema)
            wanted = "truncate" if is_network(path) else "wal"
            mode = _journal(connection, wanted)
            connection.execute(f"PRAGMA synchronous = {'FULL' if full or mode != 'wal' else 'NORMAL'}")
            with transaction(connection):
                if _recognise(connection, path, schema):
                    for statement in schema.statements:
                        connection.execute(statement)
                    connection.execute(f"PRAGMA application_id = {schema.application_id}")
                    connection.execute(f"PRAGMA user_version = {schema.version}")
        except BaseException:
            connection.close()
            raise
    if mode == "wal":
        return connection, ()
    where = file_system_type(path)
    return connection, (
        f"{path} is on a {where} file system: kept with a {mode} journal instead of a write-ahead log",
    )


def open_readonly(path: Path, schema: Schema) -> sqlite3.Connection:
    """Opens ``path`` for reading, also while another process writes it or where nothing can be written."""
    with explained(path, schema.name):
        if not path.is_file():
            raise RunError(f"there is no {schema.name} at {path}")
        log = path.with_name(path.name + "-wal")
        try:
            return _connect_readonly(path, schema, "mode=ro")
        except sqlite3.OperationalError:
            # Reading a write-ahead log wants to write its index; with no log there is nothing to index.
            if log.exists() and log.stat().st_size:
                raise
            return _connect_readonly(path, schema, "mode=ro&immutable=1")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of the block is committed or, if it raises or the process dies, none of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def explained(path: Path, name: str) -> Iterator[None]:
    """Turns what SQLite and the file system report into one line that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "") or ""
        remedy = next((text for start, text in _REMEDIES if code.startswith(start)), "see the cause")
        raise RunError(f"{name} {path}: {error} ({remedy})") from error
    except OSError as error:
        raise RunError(f"{name} {path}: {error.strerror or error}") from error


_REMEDIES = (
    ("SQLITE_FULL", "the disk or quota is full: free some space, then resume"),
    ("SQLITE_READONLY", "the file or its folder cannot be written: check permissions and mount options"),
    ("SQLITE_CANTOPEN", "check that the folder exists and that you may read and write in it"),
    ("SQLITE_PERM", "check the permissions"),
    ("SQLITE_NOTADB", "this is another kind of file: choose another path"),
    ("SQLITE_CORRUPT", "the file is damaged: restore a copy, or start a new run"),
    ("SQLITE_BUSY", f"another process kept it locked for {BUSY_SECONDS:.0f} s: try again"),
    ("SQLITE_IOERR", "the disk reports an error or is full: check it, then resume"),
)


def _connect_readonly(path: Path, schema: Schema, options: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{options}"
    connection = sqlite3.connect(
        uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        if _recognise(connection, path, schema):
            raise RunError(f"{schema.name} {path} is empty: nothing was ever written to it")
    except BaseException:
        connection.close()
        raise
    return connection


def _recognise(connection: sqlite3.Connection, path: Path, schema: Schema) -> bool:
    """Whether the file is new and empty.  Raises RunError unless it is that, or ours."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (mark,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not tables and mark == 0:
        return True
    if mark != schema.application_id:
        raise RunError(
            f"{path} is an SQLite file of something else, not a {schema.name}: choose another path"
        )
    if version != schema.version:
        age = "a newer" if version > schema.version else "an older"
        raise RunError(
            f"{schema.name} {path} has format {version} from {age} rlnas_fast, this one reads format "
            f"{schema.version}: use the version that wrote it"
        )
    return False


def _journal(connection: sqlite3.Connection, wanted: str) -> str:
    """Sets the journal mode and returns the one in force.

    Several processes may do so at once, and SQLite's own waiting does not cover this statement.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            (mode,) = connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
        except sqlite3.OperationalError as error:
            if not str(error.sqlite_errorname).startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        if mode != wanted == "wal":  # no shared memory here, whatever the file system is called
            wanted = "truncate"
            continue
        return str(mode)
