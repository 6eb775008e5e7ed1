"""A keeper that is to be renewed ends between turns, and what it held is warm with the next one."""

from __future__ import annotations

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.recycler import RecycleReason

HELD, ACTIVE = SessionKey("tenant", "held"), SessionKey("tenant", "active")


async def test_it_ends_only_between_turns_and_puts_to_sleep_what_it_holds(make_node):
    node = make_node()
    for key in (HELD, ACTIVE):
        await node.turn(key, "said ", [1, 2, 3])
    await node.keeper.recycle(ACTIVE, RecycleReason.REQUESTED)
    grant, _ = await node.begin(HELD, "said more")
    assert not await node.keeper.prepare_end()
    assert (await node.keeper.describe(HELD))["state"] == "held"
    await node.keeper.abandon(HELD, grant.epoch)

    # Here computing three tokens is sooner than reading them.
    node.keeper._hibernation.policy.tokens_per_second = 1.0
    assert await node.keeper.prepare_end()
    # What its successor finds: the one on the disk, the other with its actor.
    assert (await node.keeper.describe(HELD))["state"] == "hibernated"
    assert (await node.keeper.describe(ACTIVE))["state"] == "active"
    # A keeper that was not ended after all goes on.
    assert (await node.turn(HELD, "said more", [4])).num_kept_tokens == 3
