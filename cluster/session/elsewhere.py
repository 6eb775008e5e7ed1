"""What other servers did to the sessions, where journals are shared: some were made there, some deleted.

Owns: looking for it, and letting go of what is gone: its memory and its hibernated cache here. Knows nothing of who did
it, and of sessions that went on there: these are found out by their epoch, at their next turn.
"""

from __future__ import annotations

import asyncio
import logging

from ray.exceptions import RayError

from phi_cluster.cluster.errors import NotFound, PhiError, SessionBusy
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.administration import Administration
from phi_cluster.cluster.session.custody import Custody

logger = logging.getLogger(__name__)


class Elsewhere:
    """For one event loop."""

    def __init__(self, custody: Custody, administration: Administration):
        self._custody = custody
        self._administration = administration

    async def look(self) -> None:
        """Raises JournalUnavailable."""
        journals, roster = self._custody.journals, self._custody.roster
        before = set(roster.stored_keys())
        stored = set(await asyncio.to_thread(lambda: list(journals.keys())))
        for key in stored:
            roster.add_stored(key)
        for key in before - stored:
            await self.check(key)

    async def check(self, key: SessionKey) -> None:
        """Lets go of the session if it has been deleted. Raises JournalUnavailable."""
        # It may have been made anew since it was missed. A turn that begins from here on makes the journal before it
        # gets anything, and keeps the session: it is not waited for.
        if self._custody.journals.glance(key) is not None:
            return
        try:
            await self._administration.delete(key, wait=0.0)
        except (SessionBusy, NotFound):
            return
        except (PhiError, RayError, OSError) as error:
            logger.warning("a session that was deleted elsewhere is still here: %s", error)
