"""The durable journal: one SQLite database per session, so sessions never wait for each other's disk writes.

Owns: files `<state_dir>/sessions/<digest[:2]>/<digest>.sqlite` (folders 0700, files 0600) and what is stored
in them when. Knows nothing of segments, actors or transcripts; the files' making and versions are
`sqlite_file.py`.

WAL and `synchronous=FULL`: once `commit` or `take_epoch` returns, it is on the disk. `secure_delete`: dropped
turns are overwritten in the database, and `clear` empties the write-ahead log too. Closed while idle; the
next use reopens. What the disk damaged is noticed by checksums: nothing is read that was not written.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgpack

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.messages import CommitTurn, SessionKey
from phi_cluster.cluster.session import sqlite_file
from phi_cluster.cluster.session.journal import (
    Glance,
    JournalInfo,
    JournalUnavailable,
    filled,
    first_epoch,
    stale_epoch,
)
from phi_cluster.cluster.session.journal_rows import checksum, row_to_turn, turn_to_row
from phi_cluster.cluster.session.sqlite_file import MIGRATIONS, corrupt, translated

_TURN_COLUMNS = (
    "epoch, request_id, num_kept_tokens, num_kept_chars, token_ids, text, boundaries, num_prompt_tokens,"
    " num_cached_tokens, num_completion_tokens, finish_reason, sampling, committed_at"
)
_INSERT_TURN = f"INSERT INTO turns ({_TURN_COLUMNS}) VALUES ({', '.join('?' * (_TURN_COLUMNS.count(',') + 1))})"
_SESSION_COLUMNS = (
    "tenant, session_id, ephemeral, fingerprint, created_at, epoch, turns, activation, recycles, turns_checksum"
)
_SUFFIXES = ("", "-wal", "-shm")


def journal_path(state_dir: Path, key: SessionKey) -> Path:
    """Where the session's journal lies. Only the digest of its name shows."""
    return state_dir / "sessions" / key.digest[:2] / f"{key.digest}.sqlite"


# The last turn says how long the conversation is; the ids themselves are not read.
_GLANCE = """
    SELECT coalesce(num_kept_tokens + length(token_ids) / 4, 0), turns, activation, recycles, created_at,
           max(created_at, coalesce(committed_at, 0))
    FROM session LEFT JOIN (SELECT * FROM turns ORDER BY epoch DESC LIMIT 1)
"""


def glance(state_dir: Path, key: SessionKey) -> Glance | None:
    """What can be told of a session without reading its turns; None: there is no journal that could be read. Makes
    none, and does not look at checksums."""
    try:
        location = f"{journal_path(state_dir, key).absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(location, uri=True, timeout=1.0)) as connection:
            return Glance(*connection.execute(_GLANCE).fetchone())
    except (sqlite3.Error, TypeError):
        return None


def list_sessions(state_dir: Path, on_error: Callable[[Path, PhiError], None] | None = None) -> Iterator[SessionKey]:
    """The keys of all stored sessions, in no particular order; reads one row of each. Damaged files are told
    to `on_error` and left out."""
    for path in (state_dir / "sessions").glob("??/*.sqlite"):
        try:
            row = _read_names(path)
        except PhiError as error:
            if on_error is not None:
                on_error(path, error)
            continue
        if row is not None:
            yield SessionKey(row[0], row[1], bool(row[2]))


def journals_nbytes(state_dir: Path) -> int:
    """Disk that all stored sessions' journals and their logs take."""
    total = 0
    # No `Path` for each of them, again and again: see processes.py.
    for folder, _, names in os.walk(state_dir / "sessions"):
        for name in names:
            if ".sqlite" in name:
                with contextlib.suppress(OSError):
                    total += os.stat(os.path.join(folder, name)).st_blocks * 512
    return total


def _read_names(path: Path) -> tuple[str, str, int] | None:
    with translated(path), contextlib.closing(sqlite_file.connect(path, busy_seconds=1.0)) as connection:
        # Version 0 is a file that its creator has not finished.
        query = "SELECT tenant, session_id, ephemeral FROM session"
        return connection.execute(query).fetchone() if sqlite_file.version(connection) else None


class SQLiteJournal:
    """See `Journal`. Nothing is touched on disk before the first use.

    `busy_seconds`: how long a call may wait for another process that writes to the same journal.
    """

    def __init__(
        self,
        state_dir: Path,
        key: SessionKey,
        fingerprint: str,
        clock: Callable[[], float],
        *,
        busy_seconds: float = 2.0,
        migrations: Sequence[str] = MIGRATIONS,
    ):
        self.key = key
        self.path = journal_path(state_dir, key)
        self._fingerprint = fingerprint
        self._clock = clock
        self._busy_seconds = busy_seconds
        self._migrations = migrations
        self._connection: sqlite3.Connection | None = None
        self._inode = -1

    @property
    def exists(self) -> bool:
        """Whether the session has a journal on disk."""
        return self.path.exists()

    def info(self) -> JournalInfo:
        with self._transaction(write=False) as connection:
            return self._read(connection)[0]

    def activate(self, *, recycled: bool) -> JournalInfo:
        with self._transaction() as connection:
            info, turns_checksum = self._read(connection)
            info = replace(info, activation=info.activation + 1, recycles=info.recycles + recycled)
            return self._write(connection, info, turns_checksum)

    def take_epoch(self) -> JournalInfo:
        with self._transaction() as connection:
            info, turns_checksum = self._read(connection)
            return self._write(connection, replace(info, epoch=info.epoch + 1), turns_checksum)

    def commit(self, turn: CommitTurn) -> bool:
        with self._transaction() as connection:
            row = connection.execute("SELECT request_id FROM turns WHERE epoch = ?", (turn.epoch,)).fetchone()
            if row is not None and row[0] == turn.request_id:
                return False
            info, turns_checksum = self._read(connection)
            if row is not None or turn.epoch != info.epoch:
                raise stale_epoch(turn, info.epoch)
            # As `supersedes` in journal.py.
            superseded = "FROM turns WHERE num_kept_chars >= ? AND num_kept_tokens >= ?"
            kept = (turn.num_kept_chars, turn.num_kept_tokens)
            dropped = connection.execute(f"SELECT {_TURN_COLUMNS} {superseded}", kept).fetchall()
            connection.execute(f"DELETE {superseded}", kept)
            values = turn_to_row(turn)
            connection.execute(_INSERT_TURN, values)
            turns_checksum += checksum(*values) - sum(checksum(*old) for old in dropped)
            self._write(connection, replace(info, turns=info.turns + 1, fingerprint=self._fingerprint), turns_checksum)
            return True

    def fill(self, turns: Sequence[CommitTurn], fingerprint: str) -> None:
        self.close()
        is_new = not self.exists
        info = filled(turns, fingerprint, float(self._clock()))
        rows = [turn_to_row(turn) for turn in turns]
        done = False

        def write(connection: sqlite3.Connection) -> None:
            nonlocal done
            connection.executemany(_INSERT_TURN, rows)
            self._write(connection, info, sum(checksum(*row) for row in rows))
            done = True

        try:
            with translated(self.path):
                # In the transaction that makes the file: whoever finds it finds all of it.
                self._open(write)
        except BaseException:
            if is_new:
                self.delete()
            raise
        if not done:
            raise ValueError("there is a journal of this session")

    def load(self) -> list[CommitTurn]:
        with self._transaction(write=False) as connection:
            _, turns_checksum = self._read(connection)
            rows = connection.execute(f"SELECT {_TURN_COLUMNS} FROM turns ORDER BY epoch").fetchall()
        if sum(checksum(*row) for row in rows) != turns_checksum:
            raise corrupt(self.path, "the turns' checksum is wrong")
        try:
            return [row_to_turn(self.key, row) for row in rows]
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise corrupt(self.path, str(error)) from None

    def clear(self) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM turns")
            self._write(connection, replace(self._read(connection)[0], turns=0), 0)
        with translated(self.path):
            # The log still holds the text: write it back (as zeros) and empty it.
            self._open().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def delete(self) -> None:
        self.close()
        for suffix in _SUFFIXES:
            try:
                os.unlink(f"{self.path}{suffix}")
            except FileNotFoundError:
                pass
            except OSError as error:
                raise JournalUnavailable(f"cannot delete the journal {self.path}: {error.strerror}") from None

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with translated(self.path):
                connection.close()

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        with translated(self.path):
            connection = self._open()
            with sqlite_file.transaction(connection, write=write):
                yield connection

    def _open(self, on_create: Callable[[sqlite3.Connection], None] | None = None) -> sqlite3.Connection:
        # Deleted, or deleted and created anew, by another process: what we have open is nobody's any more.
        if self._connection is not None and sqlite_file.inode(self.path) != self._inode:
            self.close()
        if self._connection is None:
            sqlite_file.create_file(self.path)
            connection = sqlite_file.connect(self.path, self._busy_seconds)
            try:
                sqlite_file.migrate(connection, self.path, self._migrations, on_create or self._write_new)
                names = connection.execute("SELECT tenant, session_id, ephemeral FROM session").fetchone()
                if names != self._names:
                    raise corrupt(self.path, "it belongs to another session")
            except BaseException:
                connection.close()
                raise
            self._connection, self._inode = connection, sqlite_file.inode(self.path)
        return self._connection

    @property
    def _names(self) -> tuple[str, str, int]:
        return self.key.tenant, self.key.session_id, int(self.key.ephemeral)

    def _read(self, connection: sqlite3.Connection) -> tuple[JournalInfo, int]:
        """What the journal knows, and the sum of its turns' checksums. Raises JournalCorrupt."""
        row = connection.execute(f"SELECT {_SESSION_COLUMNS}, checksum FROM session").fetchone()
        if row is None or checksum(*row[:-1]) != row[-1]:
            raise corrupt(self.path, "the session's checksum is wrong")
        fingerprint, created_at, epoch, turns, activation, recycles, turns_checksum = row[3:-1]
        return JournalInfo(epoch, turns, activation, recycles, fingerprint, created_at), turns_checksum

    def _write(self, connection: sqlite3.Connection, info: JournalInfo, turns_checksum: int) -> JournalInfo:
        counts = (info.epoch, info.turns, info.activation, info.recycles, turns_checksum)
        values = (*self._names, info.fingerprint, info.created_at, *counts)
        marks = ", ".join("?" * (len(values) + 2))
        connection.execute(
            f"REPLACE INTO session (one, {_SESSION_COLUMNS}, checksum) VALUES ({marks})",
            (1, *values, checksum(*values)),
        )
        return info

    def _write_new(self, connection: sqlite3.Connection) -> None:
        now = float(self._clock())
        self._write(connection, JournalInfo(first_epoch(now), 0, 0, 0, self._fingerprint, now), 0)
