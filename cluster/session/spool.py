"""Nameless files by which long exports pass between the processes of a node, a piece at a time.

Owns: making them on the disk of the state directory, where nobody finds them and nothing of them outlives who has them
open, and opening another process's. Knows nothing of what is in them. Linux only.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from phi_cluster.cluster.session.hibernation_store import StorageFull

_TOKEN_NBYTES = 16
# Left to the journals, whose turns are worth more than any cache.
_RESERVE_NBYTES = 256 * 2**20


@dataclass(frozen=True)
class SpoolRef:
    """How another process of this user opens the file for as long as its maker has it open. `nbytes` of content;
    `token`: random bytes at the file's beginning, since pids and descriptors are used again."""

    pid: int
    fd: int
    token: bytes
    nbytes: int


class SpoolFile:
    """Content that is written once, from its beginning. `folder` is on the disk that is to be used. Raises OSError.

    Attributes: `file`, unbuffered; whoever has read in it must `rewind` before it is written or read from the start."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._token = os.urandom(_TOKEN_NBYTES)
        self.file = io.FileIO(_nameless(folder), "r+")
        self.file.write(self._token)

    @property
    def ref(self) -> SpoolRef:
        nbytes = os.fstat(self.file.fileno()).st_size - _TOKEN_NBYTES
        return SpoolRef(os.getpid(), self.file.fileno(), self._token, nbytes)

    def write(self, data: bytes) -> None:
        """Raises OSError."""
        view = memoryview(data)
        while len(view):
            view = view[self.file.write(view) or 0 :]

    def check_room(self, nbytes: int) -> None:
        """Raises StorageFull unless the disk has so many bytes, and what is left to others."""
        disk = os.statvfs(self._folder)
        if nbytes + _RESERVE_NBYTES > disk.f_bavail * disk.f_frsize:
            raise StorageFull(f"no room on the disk for {nbytes} bytes of a session with its cache: free some")

    def close(self) -> None:
        """It is gone with the last who has it open."""
        self.file.close()


def open_spooled(ref: SpoolRef) -> io.FileIO:
    """At the beginning of its content. Raises OSError: it is not there any more."""
    fd = os.open(f"/proc/{ref.pid}/fd/{ref.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    file = io.FileIO(fd, "r")
    try:
        if not hmac.compare_digest(file.read(_TOKEN_NBYTES) or b"", ref.token):
            raise OSError("another file is there by now")
    except BaseException:
        file.close()
        raise
    return file


def _nameless(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    # A filesystem that has no such files.
    fd, path = tempfile.mkstemp(dir=folder, prefix=".spool-")
    os.unlink(path)
    return fd
