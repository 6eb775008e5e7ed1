"""Who gets KV memory, in which order, and how long one waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from phi_cluster.cluster.errors import GaveWay, Overloaded
from phi_cluster.cluster.session.kv_leases import KVLeases
from phi_cluster.cluster.session.ledger import Ledger

# Only a hang ends in it.
PATIENCE = 5.0


class Node:
    """100 bytes, and idle sessions whose memory can be had, one for each time that room is asked for."""

    def __init__(self, wait_seconds: float = PATIENCE) -> None:
        self.ledger = Ledger(100)
        self.idle: list[str] = []
        self.asked_for: list[int] = []
        self.before_room: Callable[[], Awaitable[None]] | None = None
        self.error: Exception | None = None
        self.leases = KVLeases(self.ledger, self._make_room, wait_seconds)

    async def _make_room(self, nbytes: int) -> bool:
        self.asked_for.append(nbytes)
        if self.before_room is not None:
            await self.before_room()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if not self.idle:
            return False
        self.leases.release(self.idle.pop(0))
        return True

    def ask(self, digest: str, nbytes: int) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.leases.reserve(digest, nbytes))


async def settle_down() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def done(task: asyncio.Task[None]) -> None:
    await asyncio.wait_for(task, PATIENCE)


async def test_what_fits_is_granted_at_once() -> None:
    node = Node()
    await node.leases.reserve("a", 60)
    await node.leases.reserve("b", 40)
    assert node.ledger.usage == 100
    assert node.asked_for == []
    assert node.leases.num_waiting == 0
    # Less than before: the lease stays.
    await node.leases.reserve("a", 10)
    assert node.ledger.lease("a") == 60


async def test_more_than_there_is_in_all_is_refused_at_once() -> None:
    node = Node()
    with pytest.raises(Overloaded, match="101 bytes") as caught:
        await node.leases.reserve("a", 101)
    assert caught.value.retry_after == 60
    assert node.asked_for == []
    assert node.ledger.usage == 0


async def test_idle_sessions_memory_is_taken_as_far_as_needed() -> None:
    node = Node()
    for digest in ("x", "y", "z"):
        await node.leases.reserve(digest, 30)
    node.idle = ["x", "y", "z"]
    await node.leases.reserve("a", 50)
    assert node.asked_for == [40, 10]
    assert node.idle == ["z"]
    assert node.ledger.usage == 80


async def test_those_who_wait_are_served_in_order() -> None:
    node = Node()
    await node.leases.reserve("x", 100)
    waiting = {name: node.ask(name, nbytes) for name, nbytes in (("a", 60), ("b", 10), ("c", 30))}
    await settle_down()
    assert node.leases.num_waiting == 3
    # Enough for b, but a is first.
    node.leases.settle("x", 80)
    await settle_down()
    assert not any(task.done() for task in waiting.values())
    node.leases.settle("x", 30)
    await done(waiting["a"])
    await done(waiting["b"])
    assert not waiting["c"].done()
    node.leases.release("x")
    await done(waiting["c"])
    assert node.ledger.usage == 100


async def test_waiting_ends_in_time() -> None:
    node = Node(wait_seconds=0.005)
    await node.leases.reserve("x", 100)
    with pytest.raises(Overloaded, match="no KV memory became free") as caught:
        await asyncio.wait_for(node.leases.reserve("a", 1), PATIENCE)
    assert caught.value.retry_after == 5
    assert node.leases.num_waiting == 0
    assert node.ledger.lease("a") == 0
    node.leases.release("x")
    assert node.ledger.usage == 0


async def test_waiting_ends_in_time_although_room_is_being_made_for_ever() -> None:
    node = Node(wait_seconds=0.005)
    never = asyncio.Event()

    async def hang() -> None:
        await never.wait()

    node.before_room = hang
    await node.leases.reserve("x", 100)
    with pytest.raises(Overloaded):
        await asyncio.wait_for(node.leases.reserve("a", 1), PATIENCE)
    never.set()
    await settle_down()


async def test_who_gives_up_lets_the_next_one_in() -> None:
    node = Node()
    await node.leases.reserve("x", 60)
    big, small = node.ask("big", 90), node.ask("small", 40)
    await settle_down()
    assert not small.done()
    big.cancel()
    await done(small)
    with pytest.raises(asyncio.CancelledError):
        await big
    assert node.ledger.lease("big") == 0
    assert node.leases.num_waiting == 0


async def test_a_session_that_became_idle_makes_room_for_those_who_wait() -> None:
    """Its turn is over and its cache stays: nothing came free, but now something can be taken."""
    node = Node()
    await node.leases.reserve("x", 100)
    waiting = node.ask("a", 50)
    await settle_down()
    assert node.asked_for == [50]
    node.idle = ["x"]
    node.leases.settle("x", 100)
    await done(waiting)
    assert node.ledger.lease("x") == 0


async def test_a_turn_that_ends_while_room_is_looked_for_is_not_overlooked() -> None:
    node = Node()
    looked, may_end = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        if not looked.is_set():
            looked.set()
            await may_end.wait()

    node.before_room = slow
    await node.leases.reserve("x", 100)
    waiting = node.ask("a", 50)
    await looked.wait()
    # Too late for the search under way, which saw x in its turn.
    found, node.idle = node.idle, []
    node.leases.settle("x", 90)
    may_end.set()
    await settle_down()
    assert not waiting.done()
    node.idle = [*found, "x"]
    node.leases.settle("x", 90)
    await done(waiting)
    assert len(node.asked_for) >= 3


async def test_room_is_made_once_for_one_who_waits() -> None:
    node = Node()
    for digest in ("x", "y", "z"):
        await node.leases.reserve(digest, 30)
    node.idle = ["x", "y", "z"]
    tasks = [node.ask("a", 40), node.ask("b", 10)]
    for task in tasks:
        await done(task)
    # 30 + 30 + 30 + 40 + 10 = 140: two had to go, not three.
    assert node.idle == ["z"]


async def test_a_growing_reply_does_not_stand_behind_a_newcomer() -> None:
    """The newcomer waits for memory that the running turn gives back at its end, and it ends only if it can grow."""
    node = Node()
    await node.leases.reserve("running", 60)
    await node.leases.reserve("other", 30)
    newcomer = node.ask("new", 80)
    await settle_down()
    await asyncio.wait_for(node.leases.reserve("running", 70), PATIENCE)
    assert not newcomer.done()
    # Also one that must wait: it gets what comes free first.
    growing = node.ask("running", 90)
    await settle_down()
    assert not growing.done()
    node.leases.release("other")
    await done(growing)
    assert not newcomer.done()
    node.leases.release("running")
    await done(newcomer)


async def test_growing_replies_are_served_in_order() -> None:
    node = Node()
    for digest in ("a", "b", "x"):
        await node.leases.reserve(digest, 30)
    first, second = node.ask("a", 60), node.ask("b", 50)
    await settle_down()
    node.leases.settle("x", 10)
    await done(first)
    assert not second.done()
    node.leases.release("x")
    node.leases.release("a")
    await done(second)


async def test_an_error_while_room_is_made_is_told_to_who_waits() -> None:
    node = Node()
    await node.leases.reserve("x", 100)
    node.error = RuntimeError("the keeper lost its mind")
    with pytest.raises(RuntimeError, match="lost its mind"):
        await asyncio.wait_for(node.leases.reserve("a", 50), PATIENCE)
    assert node.leases.num_waiting == 0
    node.error, node.idle = None, ["x"]
    await done(node.ask("b", 50))


async def test_failing_to_free_anything_does_not_spin() -> None:
    node = Node(wait_seconds=0.01)
    await node.leases.reserve("x", 100)

    async def settles_in_vain() -> None:
        # As the keeper does with what an actor says that it holds.
        node.leases.settle("x", 95)

    node.before_room = settles_in_vain
    with pytest.raises(Overloaded):
        await node.leases.reserve("a", 50)
    assert len(node.asked_for) <= 4


async def test_what_can_do_without_takes_what_is_free() -> None:
    node = Node()
    assert await node.leases.take("a", 60)
    assert not await node.leases.take("b", 50)
    assert not await node.leases.take("c", 101)
    assert node.ledger.usage == 60


async def test_what_can_do_without_may_have_idle_sessions_memory() -> None:
    node = Node()
    await node.leases.reserve("idle", 80)
    node.idle = ["idle"]
    assert await node.leases.take("a", 60)
    assert node.ledger.usage == 60


async def test_what_can_do_without_never_stands_before_who_waits() -> None:
    node = Node()
    await node.leases.reserve("a", 80)
    waiting = node.ask("b", 50)
    await settle_down()
    assert not await node.leases.take("c", 10)
    node.leases.release("a")
    await done(waiting)
    assert await node.leases.take("c", 10)


async def test_who_came_while_room_was_made_is_served_first() -> None:
    node = Node()
    await node.leases.reserve("idle", 80)
    node.idle = ["idle"]
    asked: list[asyncio.Task[None]] = []

    async def another_comes() -> None:
        if not asked:
            asked.append(node.ask("b", 70))
            await settle_down()

    node.before_room = another_comes
    assert not await node.leases.take("c", 60)
    await done(asked[0])
    assert node.ledger.lease("b") == 70


async def test_where_all_wait_for_each_other_the_last_gives_way() -> None:
    node = Node()
    for digest in ("a", "b", "c"):
        await node.leases.reserve(digest, 30)
    asked = [node.ask(digest, 50) for digest in ("a", "b")]
    await settle_down()
    # One still runs, and will end.
    assert not any(task.done() for task in asked)
    asked.append(node.ask("c", 50))
    await settle_down()
    with pytest.raises(GaveWay):
        await asked[2]
    assert not any(task.done() for task in asked[:2])
    # Its turn is ended, and what it held is given back.
    node.leases.settle("c", 2)
    await done(asked[0])
    again = node.ask("c", 50)
    await settle_down()
    assert not asked[1].done()
    node.leases.settle("a", 5)
    await done(asked[1])
    node.leases.settle("b", 5)
    await done(again)


async def test_who_gave_way_before_is_not_asked_for_the_little_it_holds() -> None:
    node = Node()
    await node.leases.reserve("a", 45)
    await node.leases.reserve("b", 45)
    await node.leases.reserve("c", 2)
    first, second, small = (node.ask(digest, 60) for digest in ("a", "b", "c"))
    await settle_down()
    with pytest.raises(GaveWay):
        await second
    assert not small.done()
    node.leases.settle("b", 2)
    await done(first)
    node.leases.settle("a", 2)
    await done(small)


async def test_who_holds_memory_and_waits_too_long_gives_way() -> None:
    node = Node(wait_seconds=0.01)
    await node.leases.reserve("a", 60)
    await node.leases.reserve("b", 40)
    with pytest.raises(GaveWay):
        await node.leases.reserve("b", 50)
    with pytest.raises(Overloaded) as refused:
        await node.leases.reserve("c", 50)
    assert not isinstance(refused.value, GaveWay)


async def test_what_a_turn_that_is_over_still_waits_for_stands_in_nobodys_way() -> None:
    node = Node()
    await node.leases.reserve("a", 30)
    await node.leases.reserve("b", 30)
    growing = node.ask("a", 90)
    other = node.ask("c", 60)
    await settle_down()
    assert node.leases.num_waiting == 2
    node.leases.release("a")
    with pytest.raises(GaveWay):
        await done(growing)
    await done(other)
    assert node.ledger.usage == 90
