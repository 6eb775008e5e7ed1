"""Sessions that nobody has used for too long are deleted, and no others."""

from __future__ import annotations

import pytest

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.sqlite_journal import last_used

OLD, YOUNG = SessionKey("tenant", "old"), SessionKey("tenant", "young")
DAY = 86400.0


@pytest.fixture
async def node(make_node):
    node = make_node(retention=30 * DAY)
    for key in (OLD, YOUNG):
        await node.turn(key, "said ", [1, 2, 3])
    return node


@pytest.mark.parametrize("place", ["stored", "hibernated", "keeper", "actor"])
async def test_what_is_unused_for_too_long_goes_wherever_it_is(node, tmp_path, clock, place):
    if place == "actor":
        await node.keeper.recycle(OLD, RecycleReason.REQUESTED)
    elif place == "hibernated":
        await node.keeper.hibernate(OLD)
    elif place == "stored":
        node.keeper._hibernation.policy.tokens_per_second = 1e9
        await node.keeper.put_to_sleep(OLD)
    clock.now += 31 * DAY
    await node.turn(YOUNG, "said more", [4])
    assert await node.keeper.delete_unused() == 1
    assert [one["id"] for one in await node.keeper.list("tenant", 10, None)] == ["young"]
    assert not list(tmp_path.rglob(f"{OLD.digest}*"))
    assert set(node.leases()) == {YOUNG.digest}
    report = await node.keeper.report()
    assert report.counts["deletions"] == 1
    assert report.journal_nbytes > 0


async def test_what_is_in_a_turn_or_was_used_lately_stays(node, tmp_path, clock):
    clock.now += 29 * DAY
    grant, _ = await node.begin(YOUNG, "said more")
    assert await node.keeper.delete_unused() == 0
    assert len(await node.keeper.list("tenant", 10, None)) == 2
    clock.now += 29 * DAY
    # One of them is in a turn.
    assert await node.keeper.delete_unused() == 1
    assert [one["id"] for one in await node.keeper.list("tenant", 10, None)] == ["young"]
    await node.keeper.abandon(YOUNG, grant.epoch)


async def test_without_a_limit_nothing_is_ever_deleted(make_node, tmp_path, clock):
    node = make_node()
    await node.turn(OLD, "said ", [1])
    clock.now += 1000 * DAY
    assert await node.keeper.delete_unused() == 0


async def test_handing_over_and_reading_are_no_use_and_a_fork_is_new(node, tmp_path, clock):
    used = last_used(tmp_path, OLD)
    clock.now += 31 * DAY
    await node.keeper.recycle(OLD, RecycleReason.REQUESTED)
    await node.keeper.export(OLD)
    await node.keeper.hibernate(OLD)
    assert last_used(tmp_path, OLD) == used
    fork = SessionKey("tenant", "fork")
    await node.keeper.fork(OLD, fork, None)
    assert await node.keeper.delete_unused() == 2
    assert [one["id"] for one in await node.keeper.list("tenant", 10, None)] == ["fork"]
    assert last_used(tmp_path, SessionKey("tenant", "nobody")) is None
    assert not list(tmp_path.rglob(f"{SessionKey('tenant', 'nobody').digest}*"))
