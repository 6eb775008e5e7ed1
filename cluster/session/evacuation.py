"""A node that is given up: its sessions move to others.

Owns: carrying the plan out (moving_policy.py makes it), again for those that are in use, and the count. Knows nothing
of why the node goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError

from phi_cluster.cluster.errors import PhiError
from phi_cluster.cluster.session.custody import Custody
from phi_cluster.cluster.session.hibernation import Hibernation
from phi_cluster.cluster.session.moving import MoveResult
from phi_cluster.cluster.session.moving_policy import Movable, plan_evacuation
from phi_cluster.cluster.session.roster import Entry

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0
# Sessions on their way at the same time.
_AT_ONCE = 2
_ATTEMPTS = 3
# Between two looks at those that are in use.
_ROUND_SECONDS = 0.2


@dataclass(frozen=True)
class Evacuation:
    """How many sessions moved to other nodes, were left to their journals by the plan, and did not move although they
    should have (they were in use to the end, or no other node took them)."""

    moved: int = 0
    left: int = 0
    failed: int = 0


class Evacuations:
    """For one event loop. `peers`: as in moving.py."""

    def __init__(self, custody: Custody, hibernation: Hibernation, peers: Callable[[str], Any], node_id: str):
        self._custody = custody
        self._hibernation = hibernation
        self._peers = peers
        self._node_id = node_id
        # Digests of those that were left, so that none is counted twice.
        self._left: set[str] = set()

    async def evacuate(self, targets: Sequence[str], seconds: float) -> Evacuation:
        """All sessions in memory go to these nodes, or out of memory, in this time. May be asked for again: more may
        have come meanwhile. Never raises for a node that is gone."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        tries: Counter[str] = Counter()
        moved = left = 0
        settled: set[str] = set()
        while True:
            rooms = await self._rooms(targets)
            here = {e.key.digest: e for e in self._custody.roster if e.key.digest not in settled}
            movable = await self._movable(here.values())
            ready = [one for one in movable if tries[one.digest] < _ATTEMPTS]
            plan = plan_evacuation(ready, rooms, self._custody.config.hibernate_after)
            going = []
            for digest, target in plan.items():
                if target is not None:
                    going.append((here[digest], target))
                elif await self._leave(here[digest]):
                    left += 1
                    settled.add(digest)
            turns = asyncio.Semaphore(_AT_ONCE)
            for entry, is_gone in await asyncio.gather(*(self._send(e, t, turns, deadline) for e, t in going)):
                digest = entry.key.digest
                tries[digest] += 1
                if is_gone:
                    moved += 1
                    settled.add(digest)
            rest = [e for e in self._custody.roster if e.key.digest not in settled]
            if all(tries[e.key.digest] >= _ATTEMPTS for e in rest) or loop.time() >= deadline:
                return Evacuation(moved, left, len(rest))
            await asyncio.sleep(_ROUND_SECONDS)

    async def _send(self, entry: Entry, target: str, turns: asyncio.Semaphore, deadline: float) -> tuple[Entry, bool]:
        async with turns:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return entry, False
            try:
                # As long as it makes progress; there it takes the time that it takes.
                call = self._peers(target).move_here.remote(entry.key, self._node_id, True)
                return entry, bool(await asyncio.wait_for(call, left))
            except (ValueError, PhiError, RayError, asyncio.TimeoutError) as error:
                logger.info("a session did not leave: %s", type(error).__name__)
                return entry, False

    async def _leave(self, entry: Entry) -> bool:
        """To the disk, if it is worth it: the node may come back. False if it is in use."""
        if entry.session is not None and entry.session.in_turn:
            return False
        if not entry.key.ephemeral:
            with contextlib.suppress(PhiError, RayError, OSError, asyncio.TimeoutError):
                await self._hibernation.hibernate(entry.key, is_asked=False)
        if entry.key.digest not in self._left:
            self._left.add(entry.key.digest)
            self._custody.metrics.on_move(MoveResult.LEFT.value)
        return True

    async def _rooms(self, targets: Sequence[str]) -> dict[str, int]:
        """Free bytes of those nodes that answer."""
        rooms: dict[str, int] = {}
        for node_id in targets:
            try:
                rooms[node_id] = await asyncio.wait_for(self._peers(node_id).room.remote(), _ANSWER_SECONDS)
            except (ValueError, RayError, asyncio.TimeoutError) as error:
                logger.info("node %s takes no session: %s", node_id, type(error).__name__)
        return rooms

    async def _movable(self, entries: Any) -> list[Movable]:
        """Those between two turns."""
        found = []
        for entry in entries:
            stats = await self._custody.stats(entry)
            if not stats.in_turn and not stats.num_waiting:
                nbytes, idle = stats.kv_cache_bytes, stats.idle_seconds
                found.append(Movable(entry.key.digest, nbytes, idle, entry.key.ephemeral))
        return found
