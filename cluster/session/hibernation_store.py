"""The hibernated memories of a node's sessions, as files beside their journals.

Owns: files `<state_dir>/sessions/<digest[:2]>/<digest>.kv` (0600), made all or nothing, and how much disk they take.
Knows nothing of what is in them (hibernation_file.py), of sessions, or of who sleeps when.

All methods block and may be called in threads, for one session by one at a time.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from phi_cluster.cluster.errors import PhiError, StartError
from phi_cluster.cluster.secret_file import read_secret
from phi_cluster.cluster.session.hibernated_payload import HibernatedPayload
from phi_cluster.cluster.session.hibernation_file import (
    BadHibernation,
    Mark,
    PieceCipher,
    file_nbytes,
    read_file,
    read_header,
    write_file,
)
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.segment_layout import SegmentLayout

logger = logging.getLogger(__name__)

# Left to the journals, whose turns are worth more than any cache.
_RESERVE_NBYTES = 256 * 2**20


class StorageFull(PhiError):
    """There is no room on the disk for what was asked to be stored there."""

    status = 507
    code = "storage_full"


@dataclass(frozen=True)
class Hibernated:
    """A file: its length, and when it was written (wall clock, seconds)."""

    nbytes: int
    at: float


class HibernationStore(Protocol):
    def scan(self) -> dict[str, Hibernated]:
        """What there is, by digest; what was left half-written goes."""
        ...

    def write(
        self,
        digest: str,
        segment: Segment,
        num_tokens: int,
        mark: Mark,
        on_drop: Callable[[str], None] = lambda digest: None,
    ) -> Hibernated:
        """Keep the segment's first tokens, durably, in the place of what was kept of this session. `on_drop` is told
        whose files went for want of room, whatever comes of this one. Raises StorageFull and OSError, and what was
        kept before is gone then."""
        ...

    def take(self, digest: str, segment: Segment, mark: Mark) -> None:
        """Fill a new segment with what was kept; whatever comes of it, it is not kept any more. Raises BadHibernation
        and OSError: the segment must be thrown away then."""
        ...

    def open(self, digest: str, layout: SegmentLayout, fingerprint: str, mark: Mark) -> HibernatedPayload:
        """What was kept, to be read while it stays where it is. Raises BadHibernation and OSError."""
        ...

    def delete(self, digest: str) -> None:
        """Idempotent. Raises OSError."""
        ...


class FileHibernationStore:
    """`quota_nbytes` is what all files may take; the oldest ones make room. `key`: 32 bytes to encrypt with."""

    def __init__(
        self, state_dir: Path, quota_nbytes: int, key: bytes | None = None, reserve_nbytes: int = _RESERVE_NBYTES
    ):
        self._folder = state_dir / "sessions"
        self._quota = quota_nbytes
        self._reserve = reserve_nbytes
        self._cipher = PieceCipher(key)
        # What there is, looked up once: nobody else writes here, and there may be thousands.
        self._files: dict[str, Hibernated] | None = None

    def scan(self) -> dict[str, Hibernated]:
        for path in self._folder.glob("??/*.kv.tmp"):
            path.unlink(missing_ok=True)
        found: dict[str, Hibernated] = {}
        for path in self._folder.glob("??/*.kv"):
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    header, _ = read_header(io.FileIO(fd, closefd=False))
                    status = os.fstat(fd)
                except BadHibernation as error:
                    logger.warning("a hibernated cache is dropped: %s", error)
                    path.unlink()
                    continue
                finally:
                    os.close(fd)
                if header.digest == path.stem:
                    found[header.digest] = Hibernated(status.st_size, status.st_mtime)
                else:
                    path.unlink()
        self._files = dict(found)
        return found

    def write(
        self,
        digest: str,
        segment: Segment,
        num_tokens: int,
        mark: Mark,
        on_drop: Callable[[str], None] = lambda digest: None,
    ) -> Hibernated:
        path = self._path(digest)
        self.delete(digest)
        # There is a journal, so there is its folder; but not if it was deleted by hand.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._make_room(file_nbytes(segment, num_tokens), on_drop)
        temporary = path.with_suffix(".kv.tmp")
        fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                nbytes = write_file(io.FileIO(fd, "w", closefd=False), segment, num_tokens, digest, mark, self._cipher)
                os.fsync(fd)
                # It left memory: not to lie there as the file's pages.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        kept = Hibernated(nbytes, time.time())
        self._known()[digest] = kept
        _sync_dir(path.parent)
        return kept

    def take(self, digest: str, segment: Segment, mark: Mark) -> None:
        path = self._path(digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                read_file(io.FileIO(fd, closefd=False), segment, digest, mark, self._cipher)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        finally:
            self.delete(digest)

    def open(self, digest: str, layout: SegmentLayout, fingerprint: str, mark: Mark) -> HibernatedPayload:
        fd = os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return HibernatedPayload(fd, layout, fingerprint, digest, mark, self._cipher)
        except BaseException:
            os.close(fd)
            raise

    def delete(self, digest: str) -> None:
        self._path(digest).unlink(missing_ok=True)
        self._known().pop(digest, None)

    def _make_room(self, nbytes: int, on_drop: Callable[[str], None]) -> None:
        """Deletes the oldest files until so many bytes fit. Raises StorageFull, with none deleted for nothing."""
        files = dict(self._known())
        disk = os.statvfs(self._folder)
        used = sum(kept.nbytes for kept in files.values())
        missing = max(used + nbytes - self._quota, nbytes + self._reserve - disk.f_bavail * disk.f_frsize)
        if missing > used:
            raise StorageFull(
                f"no room on the disk for {nbytes} bytes of KV cache: free some, or raise kv.hibernate_quota"
            )
        if missing <= 0:
            return
        for digest, kept in sorted(files.items(), key=lambda one: one[1].at):
            if missing <= 0:
                return
            logger.info("the oldest hibernated cache is dropped for want of room: %d bytes", kept.nbytes)
            self.delete(digest)
            on_drop(digest)
            missing -= kept.nbytes

    def _known(self) -> dict[str, Hibernated]:
        if self._files is None:
            found = {}
            for path in self._folder.glob("??/*.kv"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found[path.stem] = Hibernated(status.st_size, status.st_mtime)
            self._files = found
        return self._files

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / f"{digest}.kv"


def read_key(path: Path) -> bytes:
    """The key that files are encrypted with. Raises StartError."""
    return read_secret(path, "kv.hibernate_key_file")


def check_key(path: Path) -> None:
    """What would keep a keeper from starting. Raises StartError."""
    try:
        PieceCipher(read_key(path))
    except ImportError:
        raise StartError(
            "kv.hibernate_key_file wants the package cryptography: pip install 'phi-cluster[encryption]'"
        ) from None


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
