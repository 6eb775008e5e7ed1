"""Sessions that nobody has used for too long: they are deleted, as a user would delete them.

Owns: finding them, a few at a time. Knows nothing of how a session is deleted or leaves memory.
"""

from __future__ import annotations

import asyncio
import logging

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.administration import Administration
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.hibernation import Hibernation

logger = logging.getLogger(__name__)

# In one sweep; the next one goes on.
_MAX_PER_SWEEP = 100


class Retention:
    """For one event loop. `seconds` None: nothing is ever deleted unasked. `deleted`: how many since it was made."""

    def __init__(
        self, custody: Custody, administration: Administration, hibernation: Hibernation, seconds: float | None
    ):
        self._custody = custody
        self._administration = administration
        self._hibernation = hibernation
        self._seconds = seconds
        # By digest: when each was used last, as far as is known. It may have been used since, so that what is not due
        # by this is not due: only of the others the journal is opened.
        self._last_used: dict[str, float] = {}
        self.deleted = 0

    async def sweep(self) -> int:
        """Deletes what is due, and returns how many sessions that were."""
        if self._seconds is None:
            return 0
        custody, before = self._custody, self.deleted
        for entry in custody.roster:
            # First it leaves memory: whoever comes while that goes on keeps it.
            if not entry.key.ephemeral and (await custody.stats(entry)).idle_seconds > self._seconds:
                await self._hibernation.make_room(entry)
        for key in await self._due():
            # Looked at again: a turn may have come, and from here to the deletion nothing can.
            seen_now = custody.journals.glance(key)
            if seen_now is None or custody.settings.clock() - seen_now.last_used <= self._seconds:
                continue
            if custody.roster.find(key) is None and custody.roster.is_known(key):
                try:
                    await self._administration.delete(key)
                    self.deleted += 1
                except (PhiError, OSError) as error:
                    logger.warning("a session that nobody uses could not be deleted: %s", error)
        return self.deleted - before

    async def _due(self) -> list[SessionKey]:
        """Stored sessions that seem to be unused for too long, the oldest first, as many as one sweep deletes."""
        custody, seconds = self._custody, self._seconds
        assert seconds is not None
        keys = {key.digest: key for key in custody.roster.stored_keys()}
        latest = custody.settings.clock() - seconds
        known = {digest: at for digest, at in self._last_used.items() if digest in keys and at >= latest}
        unknown = [key for digest, key in keys.items() if digest not in known and custody.roster.find(key) is None]
        seen = await asyncio.to_thread(lambda: [(custody.journals.glance(key), key) for key in unknown])
        used = [(one.last_used, key.digest, key) for one, key in seen if one is not None]
        self._last_used = known | {digest: at for at, digest, _ in used}
        return [key for at, _, key in sorted(used) if at < latest][:_MAX_PER_SWEEP]
