"""Exported sessions with their keys and values: the first turn after an import need not compute them again.

Owns: the format, how much of a cache is carried, and believing none that this server, or one that shares its secret,
has not written: a cache is checked by its checksums only, so whoever could make these could make a session say
anything. What is damaged, foreign, or of another model, dtype or layout is left out, and computed anew. Knows nothing
of HTTP; turns are session_export.py's, the cache's own bytes are hibernation_file.py's.

Format: 8 bytes magic, length of the turns' file (uint64, little-endian), that file, then the cache's file, whose
checksums are keyed with the secret, and whose session is the BLAKE2b of the turns' file: it fits no other turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import logging
import os
import struct
import uuid
from array import array
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from phi_cluster.cluster.messages import Moved, SegmentRef, SessionKey
from phi_cluster.cluster.session.custody import Custody, Recorded
from phi_cluster.cluster.session.hibernation_file import BadHibernation, Mark, PieceCipher, read_file, write_file
from phi_cluster.cluster.session.hibernation_file import file_nbytes as cache_file_nbytes
from phi_cluster.cluster.session.segment import Segment, SegmentGone, SegmentMismatch
from phi_cluster.cluster.session.session_export import BadExport

logger = logging.getLogger(__name__)

MAGIC = b"phiSESkv"
SECRET_NBYTES = 32
_LENGTH = struct.Struct("<Q")
_START_NBYTES = len(MAGIC) + _LENGTH.size


class ExportSecret:
    """The secret in a file of the state directory (0600), made when it is first wanted. Servers with the same file take
    each other's caches. Raises OSError."""

    def __init__(self, path: Path):
        self._path = path

    def __call__(self) -> bytes:
        if not self._path.exists():
            self._make()
        secret = self._path.read_bytes()
        if len(secret) != SECRET_NBYTES:
            raise OSError(f"{self._path} should hold {SECRET_NBYTES} bytes: delete it, and another one is made")
        return secret

    def _make(self) -> None:
        # All or nothing: half a secret would be one for ever.
        aside = self._path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            fd = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.write(fd, os.urandom(SECRET_NBYTES))
                os.fsync(fd)
            finally:
                os.close(fd)
            # Whoever was quicker has made it.
            with contextlib.suppress(FileExistsError):
                os.link(aside, self._path)
        finally:
            aside.unlink(missing_ok=True)


def split(data: bytes) -> tuple[memoryview, int | None]:
    """The turns' file, and where the cache's begins (None: there is none). Raises BadExport."""
    view = memoryview(data)
    if data[: len(MAGIC)] != MAGIC:
        return view, None
    if len(data) < _START_NBYTES:
        raise BadExport("the exported session ends too early")
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    if length > len(data) - _START_NBYTES:
        raise BadExport("the exported session ends too early")
    return view[_START_NBYTES : _START_NBYTES + length], _START_NBYTES + length


class CacheExports:
    """For one event loop."""

    def __init__(self, custody: Custody, secret: Callable[[], bytes]):
        self._custody = custody
        self._secret = secret
        # Of all that are packed at the same time one is in memory.
        self._packing = asyncio.Lock()

    async def pack(self, key: SessionKey, turns_file: Callable[[Recorded], bytes], max_nbytes: int) -> bytes | None:
        """The session, if it is in memory, with as much of its cache as fits into `max_nbytes`. None: there is nothing
        of a cache that could be carried. Raises SessionBusy if the turn under way does
        not end in time, OSError, and the journal's errors."""
        custody = self._custody
        async with self._packing:
            secret = await asyncio.to_thread(self._secret)
            while (entry := custody.roster.find(key)) is not None:
                async with entry.moving:
                    if custody.roster.find(key) is not entry:
                        continue
                    async with custody.hands.lent(entry, custody.config.turn_wait) as ref:
                        if not isinstance(ref, Moved):
                            recorded = custody.recorded(key)
                            with contextlib.suppress(SegmentGone, SegmentMismatch):
                                return await self._pack(ref, recorded, turns_file(recorded), secret, max_nbytes)
                            return None
                # It changed hands meanwhile.
                await asyncio.sleep(0)
        return None

    async def _pack(
        self, ref: SegmentRef, recorded: Recorded, turns: bytes, secret: bytes, max_nbytes: int
    ) -> bytes | None:
        settings = self._custody.settings
        segment = settings.segments.open(ref, settings.layout, settings.fingerprint)
        try:
            num_tokens = min(segment.count_matching(recorded.token_ids), segment.num_computed_tokens)
            num_computed = _most_that_fit(segment, num_tokens, max_nbytes - _START_NBYTES - len(turns))
            if not num_computed:
                return None
            file = io.BytesIO()
            file.write(MAGIC + _LENGTH.pack(len(turns)))
            file.write(turns)
            cipher, mark = PieceCipher(None, secret), Mark(0, len(recorded.turns))
            await asyncio.to_thread(
                write_file, file, segment, num_tokens, _digest(turns), mark, cipher, num_computed_tokens=num_computed
            )
            return file.getvalue()
        finally:
            segment.close()

    @contextlib.asynccontextmanager
    async def unpacked(
        self, data: bytes, turns: memoryview, start: int | None, num_turns: int, token_ids: array[int]
    ) -> AsyncIterator[Segment | None]:
        """The cache as new memory with a lease of its own until this ends; None if it is not to be believed or there is
        no room for it. Whoever takes the memory over must have settled a lease for it by then. `token_ids`: what it
        should hold; `start`: see `split`."""
        settings, lease = self._custody.settings, f"import {uuid.uuid4().hex}"
        num_tokens = len(token_ids)
        segment = None
        try:
            nbytes = settings.layout.nbytes_used(num_tokens) if num_tokens <= settings.layout.max_model_len else 0
            if start is not None and num_tokens and nbytes and await self._custody.leases.take(lease, nbytes):
                segment = settings.segments.create(settings.layout, settings.fingerprint)
                try:
                    await asyncio.to_thread(self._fill, segment, data, turns, start, num_turns, token_ids)
                except (BadHibernation, OSError) as error:
                    logger.warning("an imported cache is computed anew: %s", error)
                    segment.close()
                    segment = None
            yield segment
        finally:
            self._custody.leases.release(lease)

    def _fill(
        self, segment: Segment, data: bytes, turns: memoryview, start: int, num_turns: int, token_ids: array[int]
    ) -> None:
        file = io.BytesIO(data)
        file.seek(start)
        read_file(file, segment, _digest(turns), Mark(0, num_turns), PieceCipher(None, self._secret()))
        if segment.count_matching(token_ids) != segment.num_tokens:
            raise BadHibernation("it holds other tokens")


def _digest(turns: bytes | memoryview) -> str:
    return hashlib.blake2b(turns, digest_size=16).hexdigest()


def _most_that_fit(segment: Segment, num_tokens: int, nbytes: int) -> int:
    """Of how many tokens the keys and values may be carried so that a file with all ids takes no more than `nbytes`."""
    low, high = 0, num_tokens
    while low < high:
        middle = (low + high + 1) // 2
        if cache_file_nbytes(segment, num_tokens, middle) <= nbytes:
            low = middle
        else:
            high = middle - 1
    return low
