"""A journal's SQLite file: making it privately, opening it, its versions, and what its errors mean.

Owns: file modes, durability settings, the schema (with checksums, of which SQLite has none for its pages: a bit that
flips on the disk would be another token) and its migrations. Knows nothing of what is stored when.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from phi_cluster.cluster.session.journal import (
    JournalCorrupt,
    JournalFull,
    JournalTooNew,
    JournalUnavailable,
)
from phi_cluster.cluster.session.journal_rows import checksum

# Marks the file as ours ("phiJ").
APPLICATION_ID = 0x7068694A

# Step i brings a database from version i to i + 1. Steps that were released are never changed.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE session (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        tenant TEXT NOT NULL, session_id TEXT NOT NULL, ephemeral INTEGER NOT NULL,
        fingerprint TEXT NOT NULL, created_at REAL NOT NULL,
        epoch INTEGER NOT NULL, turns INTEGER NOT NULL,
        activation INTEGER NOT NULL, recycles INTEGER NOT NULL
    );
    CREATE TABLE turns (
        epoch INTEGER PRIMARY KEY, request_id TEXT NOT NULL,
        num_kept_tokens INTEGER NOT NULL, num_kept_chars INTEGER NOT NULL,
        token_ids BLOB NOT NULL, text BLOB NOT NULL, boundaries BLOB NOT NULL,
        num_prompt_tokens INTEGER NOT NULL, num_cached_tokens INTEGER NOT NULL,
        num_completion_tokens INTEGER NOT NULL,
        finish_reason TEXT NOT NULL, sampling BLOB NOT NULL, committed_at REAL NOT NULL
    );
    """,
    # `turns_checksum` is the sum of all turns' checksums, so that a turn that is missing shows as well.
    """
    ALTER TABLE session ADD COLUMN turns_checksum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE session ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
    UPDATE session SET turns_checksum = (SELECT coalesce(sum(checksum(
        epoch, request_id, num_kept_tokens, num_kept_chars, token_ids, text, boundaries, num_prompt_tokens,
        num_cached_tokens, num_completion_tokens, finish_reason, sampling, committed_at
    )), 0) FROM turns);
    UPDATE session SET checksum = checksum(
        tenant, session_id, ephemeral, fingerprint, created_at, epoch, turns, activation, recycles, turns_checksum
    );
    """,
)


def create_file(path: Path) -> None:
    """An empty file of ours, before SQLite would make one with the umask's mode."""
    try:
        # A folder's own entry must survive power loss, or synced files in it would not. Also of one that was there:
        # whoever made it may have died, or failed, before it was synced.
        if not path.exists():
            for folder in (path.parent.parent, path.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _sync_dir(folder.parent)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _full(path) from None
        raise JournalUnavailable(f"cannot open the journal {path}: {error.strerror}") from None


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def connect(
    path: Path, busy_seconds: float, application_id: int = APPLICATION_ID, page_nbytes: int = 4096
) -> sqlite3.Connection:
    """Open a journal's file, or one that is marked otherwise, in autocommit mode; a new one gets pages of this size.
    Raises the journal's errors."""
    with translated(path):
        # One thread at a time, but not always the one that opened it: hosts construct in one and serve in
        # another.
        connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
        try:
            found = connection.execute("PRAGMA application_id").fetchone()[0]
            if found != application_id and (found != 0 or version(connection) != 0):
                raise corrupt(path, "it is another program's database")
            connection.create_function("checksum", -1, checksum, deterministic=True)
            connection.execute(f"PRAGMA page_size = {page_nbytes}")
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON").fetchall()
        except BaseException:
            connection.close()
            raise
        return connection


def version(connection: sqlite3.Connection) -> int:
    """The schema's version; 0 for an empty file."""
    return connection.execute("PRAGMA user_version").fetchone()[0]


def inode(path: Path) -> int:
    """What tells this file from another of the same name; -1 if there is none."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1


def migrate(
    connection: sqlite3.Connection,
    path: Path,
    migrations: Sequence[str],
    on_create: Callable[[sqlite3.Connection], None],
    application_id: int = APPLICATION_ID,
) -> None:
    """Bring the schema to version `len(migrations)`, all or nothing; `on_create` fills a new one.

    Raises JournalTooNew if it is beyond that, JournalCorrupt if the file holds something else.
    """
    if version(connection) == len(migrations):
        return
    with transaction(connection, write=True):
        # Read again: another process may have done it while we waited for the lock.
        found = version(connection)
        if found > len(migrations):
            raise JournalTooNew(
                f"the journal {path} has version {found} and this program knows {len(migrations)}: a later"
                " version wrote it; use that one, or move the file away to start the conversation anew"
            )
        if found == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
            raise corrupt(path, "it is another program's database")
        for step in migrations[found:]:
            for statement in step.split(";"):
                connection.execute(statement)
        if found == 0:
            connection.execute(f"PRAGMA application_id = {application_id}")
            on_create(connection)
        connection.execute(f"PRAGMA user_version = {len(migrations)}")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, *, write: bool) -> Iterator[None]:
    """Commits at the end, rolls back on any exception. `write` takes the lock at the beginning."""
    connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as the journal's."""
    try:
        yield
    except sqlite3.Error as error:
        _raise_typed(path, error)
    except UnicodeDecodeError as error:
        # Text that was damaged, or SQLite's message about it.
        raise corrupt(path, str(error)) from None


def _raise_typed(path: Path, error: sqlite3.Error) -> NoReturn:
    if type(error) not in (sqlite3.DatabaseError, sqlite3.OperationalError):
        raise error  # a mistake of ours, not of the file
    # By message: error codes came to Python's module with 3.11, and SQLite's messages are fixed.
    message = str(error)
    # A log that cannot grow on a full disk is an input/output error to SQLite, or a file that cannot be opened.
    if "is full" in message or (("disk I/O" in message or "unable to open" in message) and _has_no_room(path)):
        raise _full(path) from None
    unavailable = ("locked", "busy", "disk I/O", "unable to open", "readonly", "out of memory", "permission")
    if isinstance(error, sqlite3.OperationalError) and any(word in message for word in unavailable):
        raise JournalUnavailable(f"the journal {path}: {message}", retry_after=1.0) from None
    raise corrupt(path, message) from None


def _full(path: Path) -> JournalFull:
    return JournalFull(f"the disk is full: nothing was written to the journal {path}", retry_after=5.0)


def _has_no_room(path: Path) -> bool:
    """Not a block is left on the journal's disk."""
    with contextlib.suppress(OSError):
        return os.statvfs(path.parent).f_bavail == 0
    return False


def corrupt(path: Path, reason: str) -> JournalCorrupt:
    """The error for a file that is not what it should be."""
    return JournalCorrupt(
        f"the journal {path} cannot be read ({reason}): restore it from a backup, or move it away to start"
        " the conversation anew"
    )
