"""A node's account of KV memory: what is granted, to whom, and whose cache goes when there is not enough.

Owns: the numbers. Pure: granting does not touch memory, and choosing victims does not evict. Knows nothing of
what sessions do, nor of who waits for room.

A lease is granted before pages are touched, for all that a turn may need, and settled to what is really there
when the turn is over: the sum of the leases never falls behind the memory in use.
"""

from __future__ import annotations

from collections.abc import Iterable

from phi_cluster.cluster.session.session import SessionStats


class Ledger:
    """Leases in bytes, by digest (any string: a process's own memory can be leased under a name of its
    own)."""

    def __init__(self, capacity: int):
        if capacity < 0:
            raise ValueError(f"capacity is {capacity}: at least 0 is expected")
        self.capacity = capacity
        self._leases: dict[str, int] = {}
        self._usage = 0

    @property
    def usage(self) -> int:
        """Bytes granted."""
        return self._usage

    @property
    def available(self) -> int:
        """Bytes that can still be granted; never below 0."""
        return max(self.capacity - self._usage, 0)

    def lease(self, digest: str) -> int:
        """Bytes granted to this session."""
        return self._leases.get(digest, 0)

    def leases(self) -> dict[str, int]:
        """Bytes granted, by session."""
        return dict(self._leases)

    def missing(self, digest: str, nbytes: int) -> int:
        """How many bytes others must give back before the session can hold `nbytes` in all."""
        growth = max(nbytes - self.lease(digest), 0)
        return max(self._usage + growth - self.capacity, 0) if growth else 0

    def reserve(self, digest: str, nbytes: int) -> bool:
        """Lease enough for the session to hold `nbytes` in all. False, and nothing changes, if it does not
        fit. A lease that is larger already stays."""
        if self.missing(digest, nbytes):
            return False
        self._set(digest, max(nbytes, self.lease(digest)))
        return True

    def settle(self, digest: str, nbytes: int) -> None:
        """The session's turn is over and this is what it holds. It is entered even beyond the capacity: it is
        so."""
        self._set(digest, nbytes)

    def release(self, digest: str) -> int:
        """The session holds nothing any more. Returns the bytes that were granted."""
        freed = self.lease(digest)
        self._set(digest, 0)
        return freed

    def _set(self, digest: str, nbytes: int) -> None:
        if nbytes < 0:
            raise ValueError(f"nbytes is {nbytes}: at least 0 is expected")
        self._usage += nbytes - self.lease(digest)
        if nbytes:
            self._leases[digest] = nbytes
        else:
            self._leases.pop(digest, None)

    @staticmethod
    def pick_victims(nbytes: int, candidates: Iterable[SessionStats]) -> list[str]:
        """Digests of the sessions whose caches to drop to get `nbytes` back: unnamed conversations first, then
        named ones, each longest idle first; never one in a turn or with somebody waiting for it.

        Empty if all of them together would not do: then none is sacrificed for nothing.
        """
        idle = [s for s in candidates if not s.in_turn and not s.num_waiting and s.kv_cache_bytes > 0]
        idle.sort(key=lambda s: (not s.key.ephemeral, -s.idle_seconds, s.key.digest))
        chosen: list[str] = []
        freed = 0
        for stats in idle:
            if freed >= nbytes:
                break
            chosen.append(stats.key.digest)
            freed += stats.kv_cache_bytes
        return chosen if freed >= nbytes else []
