"""What was seen of the journals whose sessions only the disk has.

Owns: reading each once, although thousands are asked for again and again, and forgetting what may have changed. Knows
nothing of what it is looked at for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.journal import Glance

# So many journals are read before others get their turn.
_AT_ONCE = 100


class Glances:
    """For one event loop."""

    def __init__(self, custody: Custody):
        self._custody = custody
        # By digest. None: its journal cannot be read.
        self._seen: dict[str, Glance | None] = {}
        # For each reading under way: whose journal has changed since it began.
        self._changed: list[set[str]] = []
        custody.roster.on_change = self._forget

    def __contains__(self, key: SessionKey) -> bool:
        """Whether it is known without reading."""
        return key.digest in self._seen

    async def look_at(self, keys: Iterable[SessionKey]) -> dict[str, Glance | None]:
        """By digest; None: cannot be read. Of sessions that are not in memory: what is seen is known from then on,
        until it changes."""
        found: dict[str, Glance | None] = {}
        unknown: list[SessionKey] = []
        for key in keys:
            if key.digest in self._seen:
                found[key.digest] = self._seen[key.digest]
            else:
                unknown.append(key)
        for first in range(0, len(unknown), _AT_ONCE):
            some = unknown[first : first + _AT_ONCE]
            changed: set[str] = set()
            self._changed.append(changed)
            try:
                seen = await asyncio.to_thread(self._read, some)
            finally:
                self._changed = [one for one in self._changed if one is not changed]
            fresh = {key.digest: one for key, one in zip(some, seen, strict=True)}
            found |= fresh
            self._seen |= {digest: one for digest, one in fresh.items() if digest not in changed}
        return found

    def _read(self, keys: Sequence[SessionKey]) -> list[Glance | None]:
        return [self._custody.journals.glance(key) for key in keys]

    def _forget(self, key: SessionKey) -> None:
        """The session came into memory, or to be, or is gone."""
        self._seen.pop(key.digest, None)
        for changed in self._changed:
            changed.add(key.digest)
