"""What goes with a deleted response, conversation or item: the sessions that remember it.

Owns: that they go, at once or, where a turn is running, later. Knows nothing of why something was deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from phi_cluster.cluster.errors import NotFound, PhiError
from phi_cluster.cluster.responses.store import ResponseStore, SessionKeeping
from phi_cluster.cluster.responses.store_thread import StoreThread

logger = logging.getLogger(__name__)


class Forgetter:
    """The store knows which sessions are doomed, so that they go also if this process dies before."""

    def __init__(self, store: ResponseStore, sessions: SessionKeeping, thread: StoreThread):
        self._store = store
        self._sessions = sessions
        self._thread = thread

    async def forget(self, tenant: str | None = None) -> None:
        """Ends the doomed sessions (of one tenant, or of all) and leaves no byte of what was deleted. Raises the
        store's errors."""
        doomed = await self._thread.call(self._store.doomed_sessions)
        await asyncio.gather(*(self._end(*one) for one in doomed if tenant in (None, one[0])))
        await self._thread.call(self._store.clean)

    async def _end(self, tenant: str, session_id: str) -> None:
        try:
            with contextlib.suppress(NotFound):
                await self._sessions.delete(tenant, session_id)
        except PhiError as error:
            logger.info("a session whose response was deleted stays for now: %s", type(error).__name__)
        else:
            await self._thread.call(self._store.spare, tenant, session_id)
