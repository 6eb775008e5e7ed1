"""KV memory leased to a session, within what its tenant may have in all.

Owns: the tenant's bound, and what happens at it: the caches of the tenant's own idle sessions go first, then the turn
waits for the others, then it is refused. Knows nothing of keys, of other tenants' memory, or of who asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from phi_cluster.cluster.errors import LimitReached
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.custody import Custody

_POLL_SECONDS = 0.05
_RETRY_SECONDS = 5.0


class TenantMemory:
    """For one event loop. `limit_of(tenant)` is in bytes; None: no bound of its own."""

    def __init__(self, custody: Custody, limit_of: Callable[[str], int | None], wait_seconds: float):
        self._custody = custody
        self._limit_of = limit_of
        self._wait_seconds = wait_seconds

    async def reserve(self, key: SessionKey, nbytes: int) -> None:
        """Leases memory for the session to hold `nbytes` in all. Raises LimitReached, and Overloaded if not the tenant
        but the node has too little."""
        limit = self._limit_of(key.tenant)
        if limit is not None and nbytes > limit:
            raise _refusal(
                f"this key may use {limit} bytes of KV cache and the turn needs {nbytes}; shorten the conversation"
            )
        await self.come_within(key.tenant, nbytes - self._custody.ledger.lease(key.digest))
        # Nothing is awaited before the lease is entered, so two turns cannot both find the same room.
        await self._custody.leases.reserve(key.digest, nbytes)

    def usage(self, tenant: str) -> int:
        """Bytes leased to the tenant's sessions."""
        lease = self._custody.ledger.lease
        return sum(lease(entry.key.digest) for entry in self._custody.roster if entry.key.tenant == tenant)

    async def come_within(self, tenant: str, growth: int) -> None:
        """Until the tenant may have so many bytes more. Raises LimitReached."""
        limit = self._limit_of(tenant)
        if limit is None or growth <= 0:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_seconds
        while (excess := self.usage(tenant) + growth - limit) > 0:
            if await self._custody.make_room(excess, tenant):
                continue
            if loop.time() >= deadline:
                raise _refusal(
                    f"this key may use {limit} bytes of KV cache, and its other turns hold too much of that; wait until"
                    " one has ended"
                )
            await asyncio.sleep(_POLL_SECONDS)


def _refusal(message: str) -> LimitReached:
    return LimitReached(message, code="kv_limit_reached", retry_after=_RETRY_SECONDS)
