"""A hundred sessions on the memory of ten: all of them come on, whatever the order in which they ask.

The worst order: all ask at once, every lease is a few tokens only, and so every turn wants more while others hold what
it wants. No faults: what must not happen would happen by itself.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest

from phi_cluster.cluster.config import KVConfig, SessionsConfig
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.keeper import NodeSessions
from phi_cluster.cluster.session.kv_leases import KVLeases
from tests.simulation.checks import check
from tests.simulation.client import Conversation
from tests.simulation.loop import Violation
from tests.simulation.parts import Parts
from tests.simulation.world import World

NUM_SESSIONS = 100
NUM_TURNS = 2
# A first prompt and its first lease: at the end of two turns a session holds four times as much.
LONGEST = 12


class CrowdedWorld(World):
    """`is_named`: sessions have names (and may have actors, and hibernate), or none."""

    def __init__(self, seed: int, *, is_named: bool, parts: Parts | None = None):
        self._is_named = is_named
        super().__init__(seed, parts)
        faults = self.faults
        faults.calm, faults.kills, faults.stalls, faults.leave_rate = True, [], [], 0.0
        self.lease_tokens = 3
        self.max_turns = NUM_SESSIONS

    def _start_keeper(self) -> None:
        self.budget = 10 * self.layout.nbytes_used(LONGEST)
        # Whoever is not served by somebody's giving way is not served in time.
        self._kv = KVConfig(reserve_wait=1000.0)
        self._sessions = SessionsConfig(
            max_actors=self.rng.choice((0, 8)), spawn_interval=0.1, turn_wait=60.0, max_ephemeral=NUM_SESSIONS
        )
        super()._start_keeper()

    async def _main(self) -> None:
        rng = Random(self.rng.randrange(1 << 60))
        self._start_replica(0)
        self.loop.start(None, self._control())
        names = [f"s{owner}" if self._is_named else None for owner in range(NUM_SESSIONS)]
        conversations = [Conversation(self, rng, owner, "one", name, False) for owner, name in enumerate(names)]
        for _ in range(NUM_TURNS):
            # All at once.
            asked = await asyncio.gather(*(self.loop.start(None, c.turn()) for c in conversations))
            outcomes = {one.outcome for one in asked}
            if outcomes != {"finished"}:
                raise Violation(f"not all came on: {outcomes}")
        await self._settle()
        await self._report()
        await self._report()
        check(self)
        self.turns = [self.node_sessions()._roster.is_known(SessionKey("one", name)) for name in names if name]


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_all_come_on(seed: int, is_named: bool) -> None:
    world = CrowdedWorld(seed, is_named=is_named)
    world.run()
    assert all(world.turns)
    assert len(world.watch.asked) == NUM_SESSIONS * NUM_TURNS


class _Stubborn(KVLeases):
    """Nobody ever gives way before the wait is over."""

    def _break_standstill(self) -> None:
        pass


class _StubbornKeeper(NodeSessions):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        custody = self._custody
        custody.leases = _Stubborn(custody.ledger, custody.make_room, 1000.0)


def test_without_giving_way_they_would_stand_still() -> None:
    """In about every second order; which ones it is changes with anything that asks for a random number."""
    stood_still = 0
    for seed in range(8):
        try:
            CrowdedWorld(seed, is_named=False, parts=Parts(keeper=_StubbornKeeper)).run()
        except Violation:
            stood_still += 1
    assert stood_still
