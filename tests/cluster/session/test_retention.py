"""Sessions that nobody has used for too long are deleted, and no others."""

from __future__ import annotations

import pytest

from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.sqlite_journal import glance

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
    assert [one["id"] for one in await node.listed("tenant")] == ["young"]
    assert not list(tmp_path.rglob(f"{OLD.digest}*"))
    assert set(node.leases()) == {YOUNG.digest}
    report = await node.keeper.report()
    assert report.counts["deletions"] == 1
    assert report.journal_nbytes > 0


async def test_what_is_in_a_turn_or_was_used_lately_stays(node, tmp_path, clock):
    clock.now += 29 * DAY
    grant, _ = await node.begin(YOUNG, "said more")
    assert await node.keeper.delete_unused() == 0
    assert len(await node.listed("tenant")) == 2
    clock.now += 29 * DAY
    # One of them is in a turn.
    assert await node.keeper.delete_unused() == 1
    assert [one["id"] for one in await node.listed("tenant")] == ["young"]
    await node.keeper.abandon(YOUNG, grant.epoch)


async def test_without_a_limit_nothing_is_ever_deleted(make_node, tmp_path, clock):
    node = make_node()
    await node.turn(OLD, "said ", [1])
    clock.now += 1000 * DAY
    assert await node.keeper.delete_unused() == 0


async def test_handing_over_and_reading_are_no_use_and_a_fork_is_new(node, tmp_path, clock):
    used = glance(tmp_path, OLD).last_used
    clock.now += 31 * DAY
    await node.keeper.recycle(OLD, RecycleReason.REQUESTED)
    await node.keeper.export(OLD)
    await node.keeper.hibernate(OLD)
    assert glance(tmp_path, OLD).last_used == used
    fork = SessionKey("tenant", "fork")
    await node.keeper.fork(OLD, fork, None)
    assert await node.keeper.delete_unused() == 2
    assert [one["id"] for one in await node.listed("tenant")] == ["fork"]
    assert glance(tmp_path, SessionKey("tenant", "nobody")) is None
    assert not list(tmp_path.rglob(f"{SessionKey('tenant', 'nobody').digest}*"))


async def test_a_journal_is_opened_again_only_when_it_may_be_due(make_node, tmp_path, clock):
    node = make_node(retention=30 * DAY)
    keys = [SessionKey("tenant", f"stored-{number}") for number in range(5)]
    for key in keys:
        await node.turn(key, "said ", [1])
        await node.keeper.hibernate(key)
    for day in range(29):
        clock.now += DAY
        assert await node.keeper.delete_unused() == 0
        if day == 0:
            assert sorted(key.session_id for key in node.journals.looked_at) == [key.session_id for key in keys]
    assert len(node.journals.looked_at) == len(keys)
    # One has been used meanwhile: what is known of it is too early, and it is looked at before anything is done.
    await node.turn(keys[0], "said more", [2])
    await node.keeper.hibernate(keys[0])
    clock.now += 2 * DAY
    assert await node.keeper.delete_unused() == 4
    assert [one["id"] for one in await node.listed("tenant")] == ["stored-0"]
    clock.now += 30 * DAY
    assert await node.keeper.delete_unused() == 1
