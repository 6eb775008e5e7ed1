"""Sessions that nobody has used for too long: they are deleted, as a user would delete them.

Owns: finding them, a few at a time. Knows nothing of how a session is deleted or leaves memory.
"""

from __future__ import annotations

import logging

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.administration import Administration
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.glances import Glances
from phi_cluster.cluster.session.hibernation import Hibernation

logger = logging.getLogger(__name__)

# In one sweep; the next one goes on.
_MAX_PER_SWEEP = 100


class Retention:
    """For one event loop. `seconds` None: nothing is ever deleted unasked. `deleted`: how many since it was made."""

    def __init__(
        self,
        custody: Custody,
        administration: Administration,
        hibernation: Hibernation,
        glances: Glances,
        seconds: float | None,
    ):
        self._custody = custody
        self._administration = administration
        self._hibernation = hibernation
        self._seconds = seconds
        self._glances = glances
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
        for key in await self._due(self._seconds):
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

    async def _due(self, seconds: float) -> list[SessionKey]:
        """Stored sessions that nobody has used for so long, the oldest first, as many as one sweep deletes."""
        roster, latest = self._custody.roster, self._custody.settings.clock() - seconds
        keys = {key.digest: key for key in roster.stored_keys() if roster.find(key) is None}
        seen = await self._glances.look_at(keys.values())
        due = sorted((one.last_used, digest) for digest, one in seen.items() if one and one.last_used < latest)
        return [keys[digest] for _, digest in due[:_MAX_PER_SWEEP]]
