"""Exported sessions with their keys and values: the first turn after an import need not compute them again.

Owns: the format, how much of a cache is carried, the file it is in until it is fetched, and believing none that this
server, or one that shares its secret, has not written: a cache is checked by its checksums only, so whoever could make
these could make a session say anything. What is damaged, foreign, or of another model, dtype or layout is left out, and
computed anew. Knows nothing of HTTP; turns are session_export.py's, the cache's own bytes are hibernation_file.py's.

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
from collections.abc import AsyncIterator, Callable, Iterator
from io import BytesIO, FileIO
from pathlib import Path

from phi_cluster.cluster.errors import Overloaded
from phi_cluster.cluster.messages import Moved, SegmentRef, SessionKey
from phi_cluster.cluster.session.custody import Custody, Recorded
from phi_cluster.cluster.session.hibernation_file import BadHibernation, Mark, PieceCipher, read_file, write_file
from phi_cluster.cluster.session.hibernation_file import file_nbytes as cache_file_nbytes
from phi_cluster.cluster.session.segment import Segment, SegmentGone, SegmentMismatch
from phi_cluster.cluster.session.session_export import BadExport
from phi_cluster.cluster.session.spool import SpoolFile, SpoolRef, open_spooled

logger = logging.getLogger(__name__)

MAGIC = b"phiSESkv"
SECRET_NBYTES = 32
_LENGTH = struct.Struct("<Q")
_START_NBYTES = len(MAGIC) + _LENGTH.size
# Files that nobody has fetched yet, and how long they are kept for whoever asked.
_MAX_PACKED = 8
_FETCH_SECONDS = 60.0


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


class ImportFile:
    """An export that is given to be imported, open at its beginning. `turns`: the turns' file; `has_cache`: a cache's
    file stands behind it, and `file` is at its beginning. Raises BadExport, and OSError."""

    def __init__(self, file: BytesIO | FileIO, nbytes: int, max_turns_nbytes: int):
        self.file = file
        self.nbytes = nbytes
        start = self._read(min(_START_NBYTES, nbytes))
        self.has_cache = start[: len(MAGIC)] == MAGIC
        length, rest = nbytes, b""
        if self.has_cache:
            if nbytes < _START_NBYTES:
                raise BadExport("the exported session ends too early")
            (length,) = _LENGTH.unpack_from(start, len(MAGIC))
            if length > nbytes - _START_NBYTES:
                raise BadExport("the exported session ends too early")
        else:
            length, rest = nbytes - len(start), start
        if length + len(rest) > max_turns_nbytes:
            raise BadExport(f"the exported session's turns take more than the {max_turns_nbytes} bytes that they may")
        self.turns = rest + self._read(length)

    def _read(self, nbytes: int) -> bytes:
        parts = []
        while nbytes:
            part = self.file.read(nbytes)
            if not part:
                raise BadExport("the exported session ends too early")
            parts.append(part)
            nbytes -= len(part)
        return b"".join(parts)


@contextlib.contextmanager
def opened(data: bytes | SpoolRef, max_turns_nbytes: int) -> Iterator[ImportFile]:
    """What was given to be imported. Raises BadExport, and OSError."""
    if isinstance(data, bytes):
        yield ImportFile(io.BytesIO(data), len(data), max_turns_nbytes)
    else:
        with open_spooled(data) as file:
            yield ImportFile(file, data.nbytes, max_turns_nbytes)


class CacheExports:
    """For one event loop."""

    def __init__(self, custody: Custody, secret: Callable[[], bytes], folder: Path):
        """Files lie on the disk of `folder` until they are fetched."""
        self._custody = custody
        self._secret = secret
        self._folder = folder
        self._packing = asyncio.Lock()
        # Until they are fetched, by token.
        self._packed: dict[bytes, SpoolFile] = {}

    async def pack(self, key: SessionKey, turns_file: Callable[[Recorded], bytes], max_nbytes: int) -> SpoolRef | None:
        """The session, if it is in memory, with as much of its cache as fits into `max_nbytes`, in a file that is there
        until `fetched` is told of it. None: there is nothing of a cache that could be carried. Raises SessionBusy if
        the turn under way does not end in time, Overloaded, StorageFull, OSError, and the journal's errors."""
        if len(self._packed) >= _MAX_PACKED:
            raise Overloaded("other exports have not been fetched yet; try again", retry_after=5)
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

    def fetched(self, token: bytes) -> None:
        """Whoever asked for the file of this token has it open, or is not going to."""
        if (spooled := self._packed.pop(token, None)) is not None:
            spooled.close()

    async def _pack(
        self, ref: SegmentRef, recorded: Recorded, turns: bytes, secret: bytes, max_nbytes: int
    ) -> SpoolRef | None:
        settings = self._custody.settings
        segment = settings.segments.open(ref, settings.layout, settings.fingerprint)
        try:
            num_tokens = min(segment.count_matching(recorded.token_ids), segment.num_computed_tokens)
            num_computed = _most_that_fit(segment, num_tokens, max_nbytes - _START_NBYTES - len(turns))
            if not num_computed:
                return None
            cipher, mark = PieceCipher(None, secret), Mark(0, len(recorded.turns))

            def fill() -> SpoolFile:
                spooled = SpoolFile(self._folder)
                try:
                    spooled.check_room(cache_file_nbytes(segment, num_tokens, num_computed) + len(turns))
                    spooled.write(MAGIC + _LENGTH.pack(len(turns)) + turns)
                    write_file(
                        spooled.file,
                        segment,
                        num_tokens,
                        _digest(turns),
                        mark,
                        cipher,
                        num_computed_tokens=num_computed,
                    )
                except BaseException:
                    spooled.close()
                    raise
                return spooled

            spooled = await asyncio.to_thread(fill)
            packed = spooled.ref
            self._packed[packed.token] = spooled
            asyncio.get_running_loop().call_later(_FETCH_SECONDS, self.fetched, packed.token)
            return packed
        finally:
            segment.close()

    @contextlib.asynccontextmanager
    async def unpacked(self, given: ImportFile, num_turns: int, token_ids: array[int]) -> AsyncIterator[Segment | None]:
        """The cache as new memory with a lease of its own until this ends; None if it is not to be believed or there is
        no room for it. Whoever takes the memory over must have settled a lease for it by then. `token_ids`: what it
        should hold."""
        settings, lease = self._custody.settings, f"import {uuid.uuid4().hex}"
        num_tokens = len(token_ids)
        segment = None
        try:
            nbytes = settings.layout.nbytes_used(num_tokens) if num_tokens <= settings.layout.max_model_len else 0
            if given.has_cache and num_tokens and nbytes and await self._custody.leases.take(lease, nbytes):
                segment = settings.segments.create(settings.layout, settings.fingerprint)
                try:
                    await asyncio.to_thread(self._fill, segment, given, num_turns, token_ids)
                except (BadHibernation, OSError) as error:
                    logger.warning("an imported cache is computed anew: %s", error)
                    segment.close()
                    segment = None
            yield segment
        finally:
            self._custody.leases.release(lease)

    def _fill(self, segment: Segment, given: ImportFile, num_turns: int, token_ids: array[int]) -> None:
        read_file(given.file, segment, _digest(given.turns), Mark(0, num_turns), PieceCipher(None, self._secret()))
        if segment.count_matching(token_ids) != segment.num_tokens:
            raise BadHibernation("it holds other tokens")


def _digest(turns: bytes) -> str:
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
