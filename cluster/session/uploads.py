"""Sessions that are sent to be imported: what comes is put aside on the disk, so that none takes memory, however long.

Owns: when a file is made for it, how many there may be, and that the disk keeps some room. Knows nothing of HTTP and of
what is in them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from phi_cluster.cluster.errors import Overloaded
from phi_cluster.cluster.session.hibernation_store import StorageFull
from phi_cluster.cluster.session.spool import SpoolFile, SpoolRef

# Shorter ones, which most are, need no file.
_IN_MEMORY_NBYTES = 2**20
_MAX_FILES = 4
# Between two looks at what room the disk has.
_CHECK_NBYTES = 2**26


class Uploads:
    """Of one process; `folder` is on the disk that is to be used."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._num_files = 0

    @contextlib.asynccontextmanager
    async def received(self, data: AsyncIterator[bytes]) -> AsyncIterator[bytes | SpoolRef]:
        """All of it, until this ends. Raises Overloaded if too many come at once, StorageFull, and what `data`
        raises."""
        begun = bytearray()
        async for chunk in data:
            begun += chunk
            if len(begun) > _IN_MEMORY_NBYTES:
                break
        else:
            yield bytes(begun)
            return
        if self._num_files >= _MAX_FILES:
            raise Overloaded(f"{_MAX_FILES} long sessions are being imported already; try again", retry_after=5)
        self._num_files += 1
        try:
            with contextlib.closing(self._make()) as spooled:
                await self._fill(spooled, bytes(begun), data)
                yield spooled.ref
        finally:
            self._num_files -= 1

    def _make(self) -> SpoolFile:
        try:
            return SpoolFile(self._folder)
        except OSError as error:
            raise _full(error) from None

    async def _fill(self, spooled: SpoolFile, begun: bytes, rest: AsyncIterator[bytes]) -> None:
        unchecked = _CHECK_NBYTES

        async def keep(piece: bytes) -> None:
            nonlocal unchecked
            try:
                unchecked += len(piece)
                if unchecked > _CHECK_NBYTES:
                    spooled.check_room(_CHECK_NBYTES)
                    unchecked = 0
                await asyncio.to_thread(spooled.write, piece)
            except OSError as error:
                raise _full(error) from None

        await keep(begun)
        async for piece in rest:
            await keep(piece)


def _full(error: OSError) -> StorageFull:
    return StorageFull(f"the session cannot be put aside while it comes: {error.strerror or error}")
