"""A node that is given up: what is on it moves to others, or is left to its journal."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import RayActorError

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.evacuation import Evacuation
from phi_cluster.cluster.session.recycler import RecycleReason

TOKENS = list(range(1, 101))
KEYS = [SessionKey("tenant", f"s{i}") for i in range(4)]


def held(node):
    return {entry.key.session_id for entry in node.keeper._roster if not entry.key.ephemeral}


@pytest.fixture
async def going(make_nodes, clock):
    return await filled(make_nodes, clock, max_ephemeral=8)


async def filled(make_nodes, clock, **options):
    """A node with four sessions, the last one used last."""
    [node] = make_nodes("going", **options)
    for key in KEYS:
        clock.now += 10
        await node.turn(key, f"{key.session_id} ", TOKENS, value=7)
    return node


async def test_all_sessions_move_named_or_not_with_an_actor_or_not(going, make_nodes):
    x, y = make_nodes("x", "y")
    await going.keeper.recycle(KEYS[0], RecycleReason.REQUESTED)
    unnamed = await going.turn_unnamed("hello ", TOKENS)
    assert await going.keeper.evacuate(["x", "y"]) == Evacuation(moved=5)
    assert list(going.keeper._roster) == []
    assert going.leases() == {}
    # Evenly: each went where most room was left.
    assert sorted(len(list(node.keeper._roster)) for node in (x, y)) == [2, 3]
    for key in [*KEYS, unnamed.key]:
        [holder] = [node for node in (x, y) if node.keeper._roster.find(key)]
        if not key.ephemeral:
            assert (await holder.turn(key, f"{key.session_id} more", [500])).num_computed_tokens == 100
    # Nothing is left to do.
    assert await going.keeper.evacuate(["x", "y"]) == Evacuation()


async def test_what_has_no_room_or_was_not_used_for_long_is_left(make_nodes, clock):
    going = await filled(make_nodes, clock, hibernate_after=35.0)
    room = going.layout.nbytes_used(100) * 2 + 100
    [small] = make_nodes("small", budget=room)
    clock.now += 10
    # s0 was used 40 seconds ago; of the others two have room, those that were used last.
    assert await going.keeper.evacuate(["small"]) == Evacuation(moved=2, left=2)
    assert held(small) == {"s2", "s3"}
    assert held(going) == set()
    # On the disk of the node that goes, should it come back.
    assert {(await going.keeper.describe(key))["state"] for key in KEYS[:2]} == {"hibernated"}


async def test_one_in_a_turn_goes_when_it_ends(going, make_nodes):
    make_nodes("there")
    grant, _ = await going.begin(KEYS[0], "s0 more")
    evacuation = asyncio.ensure_future(going.keeper.evacuate(["there"]))
    while held(going) != {"s0"}:
        assert not evacuation.done()
        await asyncio.sleep(0.01)
    await going.keeper.abandon(KEYS[0], grant.epoch)
    assert await evacuation == Evacuation(moved=4)


async def test_one_that_is_in_a_turn_to_the_end_stays(going, make_nodes):
    make_nodes("there")
    grant, _ = await going.begin(KEYS[0], "s0 more")
    evacuation = await going.keeper.evacuate(["there"], 1.5)
    # On a busy machine some others may not make it in time.
    assert evacuation.failed >= 1
    assert evacuation.moved + evacuation.failed == 4
    assert "s0" in held(going)
    await going.keeper.abandon(KEYS[0], grant.epoch)
    assert (await going.turn(KEYS[0], "s0 more", [500])).num_computed_tokens == 100


async def test_nodes_that_are_gone_take_nothing(going, make_nodes, links):
    make_nodes("dead", "there")
    links["dead"].is_dead = True
    assert await going.keeper.evacuate(["dead", "nobody", "there"]) == Evacuation(moved=4)
    [other] = make_nodes("other")
    for key in KEYS:
        await other.turn(key, f"{key.session_id} ", [])
    assert await other.keeper.evacuate(["dead"]) == Evacuation(left=4)


async def test_a_node_that_dies_meanwhile(going, make_nodes, links):
    """The others take what it did not."""
    make_nodes("dying", "there")

    async def die(answer):
        links["dying"].is_dead = True
        raise RayActorError

    links["dying"].between["move_here"] = die
    evacuation = await going.keeper.evacuate(["dying", "there"])
    # One that had moved there, when it died, is gone from here as well.
    assert evacuation.moved + evacuation.failed + evacuation.left <= 4
    assert held(going) == set()


async def test_what_is_left_is_counted(going):
    await going.turn_unnamed("hello ", TOKENS)
    assert await going.keeper.evacuate([]) == Evacuation(left=5)
    # It stays in memory, for whoever comes while the node is there, and is counted once.
    assert await going.keeper.evacuate([]) == Evacuation(left=1)
    families = {name: samples for name, *_, samples in going.keeper._metrics.snapshot()}
    assert ["phi_session_moves_total", [["result", "left"]], 5.0] in [
        [name, [list(pair) for pair in dict(labels).items()], value]
        for name, labels, value in families["phi_session_moves"]
    ]
