"""Measurements that outlive a run, under the one key of all that they depend on."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from ..errors import RunError
from ..search.trial import Measurement
from .database import Schema, explained, open_database

SCHEMA = Schema(
    name="measurement cache",
    application_id=0x524C4E32,  # "RLN2"
    version=1,
    statements=(
        """CREATE TABLE measurements (
            key TEXT PRIMARY KEY,
            measurement TEXT NOT NULL,
            created_at TEXT NOT NULL
        ) STRICT, WITHOUT ROWID""",
    ),
)


class SqliteCache:
    """Keeps measurements in an SQLite file that several processes may read and write at once.

    What ``put`` has returned from survives SIGKILL.  The first measurement under a key stays.

    Args:
        path: the file, in a folder that exists; created if it is not there.
    Attributes:
        notes: what a user should know about how the cache is kept here, one line each.
    Raises:
        RunError: the file cannot be used; the message says why.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._connection, self.notes = open_database(self.path, SCHEMA, full=False)

    def get(self, key: str) -> Measurement | None:
        """What was measured under ``key`` (``rlnas_fast.search.measurement_key``), or None."""
        with explained(self.path, SCHEMA.name):
            row = self._connection.execute(
                "SELECT measurement FROM measurements WHERE key = ?", (key,)
            ).fetchone()
        if row is None:
            return None
        try:
            return Measurement.from_json(row[0])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"measurement cache {self.path} cannot be read at {key}: {error!r}") from error

    def put(self, key: str, measurement: Measurement) -> None:
        """Keeps ``measurement``, unless it is the passing failure of a machine or the key is taken."""
        if measurement.transient:
            return
        created_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        with explained(self.path, SCHEMA.name):
            self._connection.execute(
                "INSERT OR IGNORE INTO measurements VALUES (?, ?, ?)",
                (key, measurement.to_json(), created_at),
            )

    def close(self) -> None:
        """Ends the use of the file."""
        with explained(self.path, SCHEMA.name):
            self._connection.close()

    def __enter__(self) -> SqliteCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
