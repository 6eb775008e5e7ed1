"""The end of an incarnation: handing over, giving up, deleting, and who is told what."""

import asyncio
import dataclasses

import pytest

from phi_cluster.cluster.errors import SessionBusy
from phi_cluster.cluster.messages import BeginTurn, Moved
from phi_cluster.cluster.session.segment import Segment, SegmentGone, SegmentMismatch
from phi_cluster.cluster.session.session import Session


@pytest.fixture
def session(make_journal, key, settings):
    return Session.create(make_journal(key), settings)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def hand_over(session, journal, settings, **options):
    ref = await session.begin_hand_over()
    successor = Session.take_over(ref, journal, settings, **options)
    session.complete_hand_over()
    return successor


async def test_the_successor_has_the_same_memory_still_warm(session, make_journal, key, settings, turns, clock):
    await turns.run(session, "x", range(100), value=7)
    before = session.describe()
    clock.now += 9
    successor = await hand_over(session, make_journal(key), settings)
    stats = successor.describe()
    assert stats.kv_cache_bytes == before.kv_cache_bytes
    assert (stats.activation, stats.recycles, stats.turns, stats.age_seconds) == (2, 1, 1, 9)
    assert (stats.activation_turns, stats.activation_age_seconds) == (0, 0)
    grant = await turns.begin(successor, "xy")
    assert (grant.num_tokens, grant.num_computed_tokens, grant.num_kept_tokens) == (100, 100, 100)
    segment = Segment.open(grant.segment, settings.layout, settings.fingerprint)
    assert segment.kv_buffer[0] == 7
    segment.close()


async def test_many_hand_overs_lose_nothing_and_leak_nothing(session, make_journal, key, settings, turns, kit):
    text, stored = "", []
    before = None
    for turn in range(20):
        text += f"turn {turn} "
        grant = await turns.begin(session, text)
        assert turns.write(grant, [turn]) == len(stored)
        session.commit(turns.message(grant, text, [turn]))
        stored.append(turn)
        session = await hand_over(session, make_journal(key), settings)
        session.rest()
        before = before or kit.descriptors()
    assert kit.descriptors() == before
    assert session.describe().recycles == 20
    grant = await turns.begin(session, text)
    assert (grant.num_kept_tokens, grant.num_computed_tokens) == (20, 20)


async def test_taking_a_new_session_from_its_keeper_is_no_recycle(make_journal, key, settings, turns):
    held = Session.create(make_journal(key), settings, activate=False)
    await turns.run(held, "x", [1])
    assert held.describe().activation == 0
    actor = await hand_over(held, make_journal(key), settings, recycled=False)
    assert (actor.describe().activation, actor.describe().recycles) == (1, 0)


async def test_a_hand_over_waits_for_the_turn_and_goes_before_the_next(session, turns, make_journal, key, settings):
    grant = await turns.begin(session, "x")
    waiting = [asyncio.create_task(session.begin_turn(BeginTurn(key, f"w{i}", "x"))) for i in range(3)]
    await settle()
    with pytest.raises(SessionBusy):
        await session.begin_hand_over(wait_seconds=0.003)
    handing = asyncio.create_task(session.begin_hand_over())
    await settle()
    turns.write(grant, [1])
    session.commit(turns.message(grant, "x", [1]))
    ref = await handing
    late = asyncio.create_task(session.begin_turn(BeginTurn(key, "late", "x")))
    await settle()
    assert not any(task.done() for task in (*waiting, late))
    assert session.describe().state == "handing_over"
    assert session.in_turn
    assert session.drop_cache() == 0
    successor = Session.take_over(ref, make_journal(key), settings)
    session.complete_hand_over()
    assert [await task for task in (*waiting, late)] == [Moved(key)] * 4
    assert (await turns.begin(successor, "xy")).num_computed_tokens == 1


async def test_a_cancelled_hand_over_goes_on_as_before(session, turns, key):
    await turns.run(session, "x", [1])
    await session.begin_hand_over()
    waiting = asyncio.create_task(turns.begin(session, "xy"))
    await settle()
    session.cancel_hand_over()
    grant = await waiting
    assert (grant.epoch, grant.num_computed_tokens) == (2, 1)
    session.abandon(grant.epoch)
    assert session.describe().state == "active"
    for end in (session.cancel_hand_over, session.complete_hand_over):
        with pytest.raises(ValueError, match="no hand-over"):
            end()


async def test_after_the_hand_over_everything_is_elsewhere(session, turns, make_journal, key, settings):
    grant = await turns.begin(session, "x")
    turns.write(grant, [1])
    message = turns.message(grant, "x", [1])
    session.commit(message)
    successor = await hand_over(session, make_journal(key), settings)
    assert await session.begin_turn(BeginTurn(key, "r", "x")) == Moved(key)
    assert session.commit(message) == Moved(key)
    assert await session.clear() == Moved(key)
    assert await session.begin_hand_over() == Moved(key)
    assert not session.abandon(grant.epoch)
    assert session.drop_cache() == 0
    stats = session.describe()
    assert (stats.state, stats.kv_cache_bytes, stats.num_computed_tokens) == ("moved", 0, 0)
    await session.delete()
    await session.deactivate()
    # The repeated commit of a lost answer finds its turn at the successor.
    assert successor.commit(message).turns == 1


async def test_a_predecessor_that_died_is_no_predecessor(session, turns, make_journal, key, settings):
    await turns.run(session, "x", [1])
    ref = await session.begin_hand_over()
    session.complete_hand_over()
    journal = make_journal(key)
    with pytest.raises((SegmentGone, SegmentMismatch)):
        Session.take_over(ref, journal, settings)
    assert journal.info().activation == 1
    assert (await turns.begin(Session.restore(journal, settings), "xy")).num_kept_tokens == 1


async def test_a_take_over_checks_the_nonce(session, turns, make_journal, key, settings):
    await turns.run(session, "x", [1])
    ref = await session.begin_hand_over()
    with pytest.raises(SegmentMismatch):
        Session.take_over(dataclasses.replace(ref, nonce=bytes(16)), make_journal(key), settings)


async def test_a_take_over_keeps_of_the_memory_what_the_journal_says(session, turns, make_journal, key, settings):
    await turns.run(session, "x", range(10))
    grant = await turns.begin(session, "y")
    turns.write(grant, [0, 1, 2, 77, 78])
    session.abandon(grant.epoch)
    successor = await hand_over(session, make_journal(key), settings)
    assert (successor.describe().num_tokens, successor.describe().num_computed_tokens) == (10, 3)


async def test_a_failed_take_over_leaks_nothing(session, turns, make_journal, key, settings, kit):
    await turns.run(session, "x", [1])
    ref = await session.begin_hand_over()
    make_journal(key).close()
    broken = make_journal(key, busy_seconds=0.0)
    broken.path.write_bytes(b"broken " * 1000)
    before = kit.descriptors()
    with pytest.raises(Exception, match="cannot be read"):
        Session.take_over(ref, broken, settings)
    assert kit.descriptors() == before


async def test_deactivating_keeps_the_journal_only(session, turns, make_journal, key, settings, kit):
    await turns.run(session, "x", range(100))
    grant = await turns.begin(session, "xy")
    with pytest.raises(SessionBusy):
        await session.deactivate()
    session.abandon(grant.epoch)
    before = kit.descriptors()
    await session.deactivate()
    assert kit.descriptors() < before
    with pytest.raises((SegmentGone, SegmentMismatch)):
        Segment.open(grant.segment, settings.layout, settings.fingerprint)
    restored = Session.restore(make_journal(key), settings)
    assert (await turns.begin(restored, "xy")).num_kept_tokens == 100


async def test_deleting_leaves_nothing_even_to_an_engine_that_still_maps_it(
    session, turns, make_journal, key, settings
):
    await turns.run(session, "x", range(100))
    grant = await turns.begin(session, "xy")
    mapped = Segment.open(grant.segment, settings.layout, settings.fingerprint)
    waiting = asyncio.create_task(session.begin_turn(BeginTurn(key, "w", "x")))
    deleting = asyncio.create_task(session.delete())
    await settle()
    assert not deleting.done()
    session.abandon(grant.epoch)
    await deleting
    assert await waiting == Moved(key)
    assert mapped.nbytes_resident == 4096
    mapped.close()
    journal = make_journal(key)
    assert not journal.exists
    assert list(journal.path.parent.iterdir()) == []
    assert Session.create(journal, settings).describe().turns == 0
