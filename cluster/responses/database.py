"""The SQLite file of a node's responses and conversations.

Owns: `<state_dir>/responses/responses.sqlite` (folder 0700, file 0600), its schema, its transactions, and that what
was deleted is really gone. Knows nothing of what is stored when. For one thread at a time; several processes share the
file.

WAL and `synchronous=FULL`, as a journal's: what was stored is on the disk. `secure_delete` overwrites what is deleted
in the file; `clean` empties the log, which has it still. But SQLite also leaves copies of a row's beginning where rows
have moved between pages, and never overwrites those. So what users say stands behind a gap that is as long as the part
of a row which moves (`pack`): it lies on overflow pages, which stay where they are until they are overwritten
(https://www.sqlite.org/fileformat2.html#b_tree_pages). With small pages the gap is short.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack

from phi_cluster.cluster.session import sqlite_file

# Marks the file as ours ("phiR").
APPLICATION_ID = 0x70686952
_PAGE_NBYTES = 512
# The most that a row may have on a table's leaf is 35 bytes less than a page.
_GAP = bytes(_PAGE_NBYTES - 32)
# Another replica's transactions are short.
_BUSY_SECONDS = 10.0

# Step i brings a database from version i to i + 1. Steps that were released are never changed.
#
# responses: `asked` and `outcome` are packed (sqlite_responses.py). `context_id` is the response whose context this one
# has with what was said there; `context_end` the last item of its conversation then. Of a response that is not over:
# who makes it. items: `holder` is a response (its input) or a conversation.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE responses (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        tenant TEXT NOT NULL, id TEXT NOT NULL, created_at REAL NOT NULL,
        session_id TEXT NOT NULL, context_id TEXT, conversation_id TEXT, context_end INTEGER NOT NULL,
        status TEXT NOT NULL, ended_at REAL, cancel_wished INTEGER NOT NULL,
        owner_pid INTEGER NOT NULL, owner_ticks INTEGER NOT NULL, claim TEXT NOT NULL,
        asked BLOB NOT NULL, outcome BLOB NOT NULL,
        UNIQUE (tenant, id)
    );
    CREATE INDEX responses_by_context ON responses (tenant, context_id);
    CREATE INDEX responses_by_session ON responses (tenant, session_id);
    CREATE INDEX responses_by_age ON responses (created_at);
    CREATE INDEX responses_open ON responses (status) WHERE status IN ('queued', 'in_progress');
    CREATE TABLE progress (
        response INTEGER NOT NULL, first INTEGER NOT NULL, pieces BLOB NOT NULL,
        PRIMARY KEY (response, first)
    );
    CREATE TABLE items (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        tenant TEXT NOT NULL, holder TEXT NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
        UNIQUE (tenant, holder, id)
    );
    CREATE INDEX items_by_id ON items (tenant, id);
    CREATE INDEX items_in_order ON items (tenant, holder, number);
    CREATE TABLE conversations (
        tenant TEXT NOT NULL, id TEXT NOT NULL, created_at REAL NOT NULL, used_at REAL NOT NULL, metadata BLOB NOT NULL,
        PRIMARY KEY (tenant, id)
    );
    CREATE TABLE doomed_sessions (tenant TEXT NOT NULL, session_id TEXT NOT NULL, PRIMARY KEY (tenant, session_id));
    """,
)


class ResponseDatabase:
    """Nothing is touched on disk before the first use. Raises the errors of session/journal.py."""

    def __init__(self, state_dir: Path):
        self.path = state_dir / "responses" / "responses.sqlite"
        self._connection: sqlite3.Connection | None = None
        # What an earlier process has deleted may be in the log still.
        self._is_clean = False

    @contextlib.contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing."""
        with sqlite_file.translated(self.path):
            connection = self._open()
            with sqlite_file.transaction(connection, write=write):
                yield connection

    def soil(self) -> None:
        """Something has been deleted."""
        self._is_clean = False

    def clean(self) -> None:
        """Empties the log if something was deleted. Where another process reads just now, the next call does it."""
        if not self._is_clean:
            with sqlite_file.translated(self.path):
                busy, _, _ = self._open().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self._is_clean = not busy

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with sqlite_file.translated(self.path):
                connection.close()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            sqlite_file.create_file(self.path)
            connection = sqlite_file.connect(self.path, _BUSY_SECONDS, APPLICATION_ID, _PAGE_NBYTES)
            try:
                sqlite_file.migrate(connection, self.path, MIGRATIONS, lambda new: None, APPLICATION_ID)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection


def pack(value: Any) -> bytes:
    """For a column that holds what users say. Text may hold anything Python's strings can, lone surrogates included."""
    packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return _GAP + packed


def unpack(packed: bytes) -> Any:
    """What `pack` was given, with lists for tuples."""
    return msgpack.unpackb(packed[len(_GAP) :], unicode_errors="surrogatepass", strict_map_key=False)
