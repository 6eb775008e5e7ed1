"""Where bytes of sessions lie, for tests that look for some: files of the state directory, and sparse memory.

Owns: the files' names, and reading. Knows nothing of what is looked for, and of HTTP.
"""

from __future__ import annotations

import os
from pathlib import Path

from phi_cluster.cluster.messages import SessionKey


def digest_of(session_id: str) -> str:
    """Of a session of whoever sends no key."""
    return SessionKey("default", session_id).digest


def memory_file(state_dir: Path, session_id: str) -> Path:
    """Where its cache lies while it hibernates."""
    digest = digest_of(session_id)
    return state_dir / "sessions" / digest[:2] / f"{digest}.kv"


def files_with(folder: Path, *needles: bytes) -> list[str]:
    """Names of the files in which one of these is."""
    return [path.name for path in folder.rglob("*") if any(map(_read(path).__contains__, needles))]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:
        # A journal's log goes when the journal is closed, which may be just now.
        return b""


def read_data(path: Path) -> bytes:
    """What a sparse file really holds."""
    fd = os.open(path, os.O_RDONLY)
    try:
        data, end, start = [], os.fstat(fd).st_size, 0
        while start < end:
            try:
                start = os.lseek(fd, start, os.SEEK_DATA)
            except OSError:
                break
            stop = os.lseek(fd, start, os.SEEK_HOLE)
            data.append(os.pread(fd, stop - start, start))
            start = stop
        return b"".join(data)
    finally:
        os.close(fd)
