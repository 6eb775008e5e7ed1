"""Turns that end without a word: what is left of them for a request that reads on, and for a session's successor."""

import asyncio

import pytest

from phi_cluster.cluster.errors import ReplyGone, SessionBusy
from phi_cluster.cluster.messages import ProcessId
from phi_cluster.cluster.session.held_memory import HeldMemory
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.session import Session

REPLICA, ENGINE, OTHER = ProcessId(11, 1), ProcessId(12, 1), ProcessId(13, 1)


@pytest.fixture
def session(make_journal, key, settings):
    return Session.create(make_journal(key), settings)


def resumed(grant):
    return None if grant.resumed_ids is None else memoryview(grant.resumed_ids).cast("i").tolist()


def stored(grant, settings):
    segment = Segment.open(grant.segment, settings.layout, settings.fingerprint)
    try:
        return segment.token_ids(), segment.num_computed_tokens
    finally:
        segment.close()


async def test_what_nobody_recorded_is_left_in_the_memory(session, turns, processes, settings):
    await turns.run(session, "x", [1, 2])
    first = await turns.begin(session, "xy", "torn", writers=(REPLICA, ENGINE))
    turns.write(first, [3, 4, 5, 6])
    processes.dead |= {REPLICA, ENGINE}
    again = await turns.begin(session, "xy", "torn", writers=(OTHER,), resume=True, claim="again")
    assert (again.epoch, again.num_kept_tokens, resumed(again)) == (first.epoch + 1, 2, [3, 4, 5, 6])
    # With its keys and values.
    assert stored(again, settings) == ([1, 2, 3, 4, 5, 6], 6)
    assert session.commit(turns.message(again, "xyz", [3, 4, 5, 6, 7], "torn")).num_tokens == 7


async def test_what_was_recorded_of_a_reply_is_told_too(session, turns, kit):
    await turns.run(session, "x", [1, 2])
    first = await turns.begin(session, "xy", "left", writers=(REPLICA,))
    turns.write(first, [3, 4, 5])
    # The prompt ends at "xy" with token 3; the rest is the reply.
    session.commit(
        kit.turn(session.key, first.epoch, "yza", [3, 4, 5], kept=(1, 2), boundaries=((2, 3),), request_id="left")
    )
    for _ in range(2):
        again = await turns.begin(session, "xy", "left", writers=(REPLICA,), resume=True, claim="again")
        assert (again.num_kept_tokens, again.num_kept_chars, resumed(again)) == (3, 2, [4, 5])
        session.abandon(again.epoch)


async def test_only_the_request_itself_is_told(session, turns, processes):
    first = await turns.begin(session, "x", "torn", writers=(REPLICA,))
    turns.write(first, [1, 2, 3])
    processes.dead.add(REPLICA)
    other = await turns.begin(session, "x", "other", writers=(OTHER,), resume=True, claim="again")
    assert (resumed(other), other.num_tokens) == (None, 0)
    session.abandon(other.epoch)
    # The other one's turn has dropped it.
    again = await turns.begin(session, "x", "torn", writers=(OTHER,), resume=True, claim="again")
    assert resumed(again) is None


async def test_what_was_given_up_is_not_there_any_more(session, turns):
    first = await turns.begin(session, "x", "torn", writers=(REPLICA,))
    turns.write(first, [1, 2, 3])
    session.abandon(first.epoch)
    again = await turns.begin(session, "x", "torn", writers=(OTHER,), resume=True, claim="again")
    assert (resumed(again), again.num_tokens) == (None, 0)


async def test_nothing_is_read_on_once_the_conversation_has_gone_on(session, turns, make_journal, settings, key):
    for number, text in enumerate(("x", "xy", "xyz")):
        grant = await turns.begin(session, text, f"r{number}", writers=(REPLICA,))
        turns.write(grant, [number])
        session.commit(turns.message(grant, text, [number], f"r{number}"))
    restored = Session.restore(make_journal(key), settings)
    for one in (session, restored):
        with pytest.raises(ReplyGone, match="gone on"):
            await turns.begin(one, "x", "r1", resume=True, claim="again")
        # Nobody waits for it.
        one.abandon((await turns.begin(one, "xyz", "new", wait_seconds=0.0)).epoch)


async def test_a_successor_finds_the_turn_that_is_under_way(session, turns, make_journal, key, settings, processes):
    """The session's process dies in the middle of a turn; the memory is held elsewhere."""
    await turns.run(session, "x", [1, 2])
    grant = await turns.begin(session, "xy", "live", writers=(REPLICA, ENGINE))
    turns.write(grant, [3, 4])
    held = HeldMemory(session.memory)
    successor = Session.take_over(held.ref, make_journal(key), settings, recycled=False)
    assert successor.in_turn
    with pytest.raises(SessionBusy):
        await turns.begin(successor, "xz", "other", writers=(OTHER,), wait_seconds=0.003)
    # Its writers go on writing where they wrote.
    assert stored(grant, settings) == ([1, 2, 3, 4], 4)
    assert successor.commit(turns.message(grant, "xyz", [3, 4, 5], "live")).num_tokens == 5
    assert not successor.in_turn
    held.close()


async def test_a_successor_ends_a_turn_whose_writers_are_dead(session, turns, make_journal, key, settings, processes):
    grant = await turns.begin(session, "x", "torn", writers=(REPLICA, ENGINE))
    turns.write(grant, [1, 2, 3])
    segment = Segment.open(grant.segment, settings.layout, settings.fingerprint)
    segment.writer = ENGINE
    held = HeldMemory(session.memory)
    successor = Session.take_over(held.ref, make_journal(key), settings, recycled=False)
    processes.dead.add(REPLICA)
    with pytest.raises(SessionBusy):
        await turns.begin(successor, "x", "torn", writers=(OTHER,), resume=True, claim="again", wait_seconds=0.003)
    processes.dead.add(ENGINE)
    again = await turns.begin(successor, "x", "torn", writers=(OTHER,), resume=True, claim="again")
    assert resumed(again) == [1, 2, 3]
    segment.close()
    held.close()


async def test_a_request_whose_answer_was_lost_does_not_wait_for_itself(session, turns, make_journal, key, settings):
    grant = await turns.begin(session, "x", "asked", writers=(REPLICA, ENGINE))
    held = HeldMemory(session.memory)
    successor = Session.take_over(held.ref, make_journal(key), settings, recycled=False)
    again = await turns.begin(successor, "x", "asked", writers=(REPLICA, ENGINE), wait_seconds=0.0)
    assert again.epoch == grant.epoch + 1
    held.close()


async def test_a_request_that_reads_on_waits_for_its_own_first_connection(session, turns):
    first = await turns.begin(session, "x", "same", writers=(REPLICA,))
    again = {"writers": (REPLICA,), "resume": True, "claim": "second"}
    waiting = asyncio.create_task(turns.begin(session, "x", "same", **again))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    # If it leaves, only itself.
    assert session.withdraw("second")
    with pytest.raises(SessionBusy, match="withdrawn"):
        await waiting
    assert session.in_turn
    assert session.abandon(first.epoch)
