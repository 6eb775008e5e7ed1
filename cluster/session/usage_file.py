"""The tenants' totals on the disk: one small SQLite database in the state directory.

Owns: its schema. Knows nothing of what the numbers mean, and of who is counted.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from phi_cluster.cluster.session.accounts import UsageTotals

_FIELDS = ("tenant", "since", "requests", "refused", "prompt_tokens", "cached_tokens", "completion_tokens")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS totals (
    tenant TEXT PRIMARY KEY, since REAL NOT NULL, requests INTEGER NOT NULL, refused INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
)
"""


class UsageFile:
    """Implements accounts.UsageStore; opened for each use, because it is used every few seconds at most.

    What was counted in the last seconds before a power loss may be missing. Raises OSError if the file cannot be used.
    """

    def __init__(self, path: Path):
        self._path = path

    def load(self) -> list[UsageTotals]:
        """See accounts.UsageStore."""
        if not self._path.exists():
            return []
        with self._connected() as connection:
            return [UsageTotals(*row) for row in connection.execute(f"SELECT {', '.join(_FIELDS)} FROM totals")]

    def save(self, totals: Iterable[UsageTotals]) -> None:
        """See accounts.UsageStore."""
        rows = [tuple(getattr(one, name) for name in _FIELDS) for one in totals]
        marks = ", ".join("?" * len(_FIELDS))
        with self._connected() as connection, connection:
            connection.executemany(f"INSERT OR REPLACE INTO totals ({', '.join(_FIELDS)}) VALUES ({marks})", rows)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        # Before SQLite would make it with the umask's mode.
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        try:
            connection = sqlite3.connect(self._path, timeout=1.0)
            try:
                connection.execute("PRAGMA journal_mode = WAL").fetchall()
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(_SCHEMA)
                yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise OSError(f"the usage file {self._path}: {error}") from None
