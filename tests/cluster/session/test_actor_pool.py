"""Session actors come and go with few names, each time in a process of its own, and none is taken for another."""

from __future__ import annotations

import asyncio

import pytest

from phi_cluster.cluster.messages import BeginTurn, SessionKey
from phi_cluster.cluster.session.actor_pool import ActorPool
from phi_cluster.cluster.session.kept_turns import HeldBy
from phi_cluster.cluster.session.recycler import RecycleReason

KEY = SessionKey("tenant", "demo")


async def settled(pool):
    while pool._returning:
        await asyncio.wait(pool._returning)


def pool_of(node):
    return node.keeper._custody.hands._pool


def actors_of(node):
    return {id(actor) for _, actor in node.actors.made}


async def test_a_hundred_recycles_take_two_actors_and_a_hundred_processes(make_node):
    node = make_node()
    await node.turn(KEY, "said ", [1, 2, 3], value=7)
    for _ in range(100):
        assert (await node.keeper.recycle(KEY, RecycleReason.REQUESTED))["state"] == "active"
    assert len(actors_of(node)) == 2
    assert len(node.actors.made) >= 100
    grant = await node.turn(KEY, "said more", [4])
    assert (grant.num_kept_tokens, grant.num_computed_tokens) == (3, 3)
    await settled(pool_of(node))


async def test_sessions_that_come_and_go_use_the_same_actors(make_node):
    node = make_node()
    for number in range(20):
        key = SessionKey("tenant", f"session-{number}")
        await node.turn(key, "said ", [1, 2, 3])
        await node.keeper.recycle(key, RecycleReason.REQUESTED)
        await (node.keeper.delete(key) if number % 2 else node.keeper.recycle(key, RecycleReason.IDLE))
        await settled(pool_of(node))
    assert len(actors_of(node)) == 1


async def test_of_many_that_are_done_only_some_are_kept(make_node, processes):
    node = make_node()
    pool = ActorPool(node.actors, 1, processes.is_alive)
    taken = [await pool.spawn() for _ in range(20)]
    for actor in taken:
        pool.end(actor)
    await settled(pool)
    assert pool.num_warm == pool.num_waiting == 5
    assert sum(not actor.is_dead for actor in {id(actor): actor for _, actor in node.actors.made}.values()) == 5
    pool.end_all()
    assert all(actor.is_dead for _, actor in node.actors.made)


async def test_whoever_comes_while_an_actor_is_restarted_waits_for_it(make_node, processes):
    node = make_node()
    pool = ActorPool(node.actors, 0, processes.is_alive)
    actor = await pool.spawn()
    pool.end(actor)
    again = await pool.take()
    assert again.handle is actor.handle
    assert again.process != actor.process
    assert not processes.is_alive(actor.process)


async def test_one_that_cannot_be_restarted_is_given_up(make_node, processes, caplog):
    node = make_node()
    pool = ActorPool(node.actors, 0, processes.is_alive)

    async def never(handle, process):
        raise TimeoutError

    node.actors.restart = never
    actor = await pool.spawn()
    pool.end(actor)
    await settled(pool)
    assert pool.num_waiting == 0
    assert actor.handle.is_dead
    assert "not restarted" in caplog.text
    assert (await pool.take()).handle is not actor.handle


@pytest.mark.parametrize("who", ["a turn", "a report", "a clear"])
async def test_a_session_whose_actor_was_restarted_without_it_goes_on_in_its_memory(make_node, who):
    """Ray restarts an actor that died: it answers, and has nothing."""
    node = make_node()
    await node.turn(KEY, "said ", [1, 2, 3], value=7)
    await node.keeper.recycle(KEY, RecycleReason.REQUESTED)
    process, actor = node.actors.made[-1]
    holder = await node.keeper.begin_turn(BeginTurn(KEY, "elsewhere", "said more"))
    assert isinstance(holder, HeldBy)
    await node.actors.restart(actor, process)

    if who == "a report":
        await node.keeper.report()
    elif who == "a clear":
        with pytest.raises(Exception, match="actor"):
            await node.keeper.clear(KEY)
    grant = await node.turn(KEY, "said more", [4])
    assert (grant.num_kept_tokens, grant.num_computed_tokens) == (3, 3)


async def test_a_session_is_never_given_to_an_actor_that_was_restarted_on_the_way(make_node):
    """It would have it, and nobody would know."""
    node = make_node()
    await node.turn(KEY, "said ", [1, 2, 3], value=7)
    pool = pool_of(node)
    taken = await pool.spawn()
    await node.actors.restart(taken.handle, taken.process)

    async def take():
        return taken

    pool.take = take
    with pytest.raises(Exception, match="restarted"):
        await node.keeper.recycle(KEY, RecycleReason.REQUESTED)
    assert (await taken.handle.held.remote()).key is None
    assert (await node.keeper.describe(KEY))["state"] == "held"
    assert (await node.turn(KEY, "said more", [4])).num_computed_tokens == 3


async def test_who_comes_just_when_an_actor_is_there_does_not_stand_before_who_waits(make_node, processes):
    node = make_node()
    pool = ActorPool(node.actors, 0, processes.is_alive)
    actor = await pool.spawn()
    pool.end(actor)
    [returning] = pool._returning
    late = []
    returning.add_done_callback(lambda _: late.append(asyncio.ensure_future(pool.take())))
    first = await pool.take()
    assert first.handle is actor.handle
    [second] = late
    assert (await second).handle is not actor.handle


async def test_a_new_session_stands_in_line_with_those_that_are_renewed(make_node):
    """While they go on, no actor is ever spare."""
    node = make_node()
    other = SessionKey("tenant", "other")
    await node.turn(other, "said ", [1, 2, 3])
    await node.keeper.recycle(other, RecycleReason.REQUESTED)
    restart, may_restart = node.actors.restart, asyncio.Event()

    async def late(handle, process):
        await may_restart.wait()
        return await restart(handle, process)

    node.actors.restart = late
    await node.keeper.recycle(other, RecycleReason.REQUESTED)
    await node.turn(KEY, "said ", [1, 2, 3])
    hands = node.keeper._custody.hands
    # One that comes next, and ever again.
    tending = asyncio.ensure_future(hands._tend_once())
    await asyncio.sleep(0.01)
    renewing = asyncio.ensure_future(node.keeper.recycle(other, RecycleReason.REQUESTED))
    await asyncio.sleep(0.01)
    may_restart.set()
    await asyncio.gather(tending, renewing)
    assert (await node.keeper.describe(KEY))["actor_pid"] is not None
