"""One conversation through its turns: warm, aborted, taken over, edited, cleared."""

import asyncio
import dataclasses
import os

import pytest

from phi_cluster.cluster.errors import SessionBusy, StaleEpoch
from phi_cluster.cluster.messages import BeginTurn, Moved, ProcessId, SessionKey, Stretch
from phi_cluster.cluster.session.journal import JournalCorrupt, JournalUnavailable, MemoryJournal
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.session import Session

PAGE = 4096


@pytest.fixture
def journal(key, clock, kit):
    return MemoryJournal(key, kit.fingerprint, clock)


@pytest.fixture
def session(journal, settings):
    return Session.create(journal, settings)


def stored_ids(grant, settings):
    segment = Segment.open(grant.segment, settings.layout, settings.fingerprint)
    try:
        return segment.token_ids()
    finally:
        segment.close()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


# Turns.


async def test_the_first_turn_starts_from_nothing(session, turns, key):
    grant = await turns.begin(session, "Hello")
    assert (grant.key, grant.epoch, grant.turns, grant.holder_pid) == (key, 1, 0, os.getpid())
    assert (grant.num_kept_tokens, grant.num_kept_chars, grant.last_kept_id) == (0, 0, None)
    assert (grant.num_tokens, grant.num_computed_tokens) == (0, 0)


async def test_a_later_turn_finds_everything_computed(session, turns, settings):
    await turns.run(session, "Hello", [1, 2, 3])
    grant = await turns.begin(session, "Hello, and")
    assert (grant.epoch, grant.turns) == (2, 1)
    assert (grant.num_kept_tokens, grant.num_kept_chars, grant.last_kept_id) == (3, 5, 3)
    assert (grant.num_tokens, grant.num_computed_tokens) == (3, 3)
    assert turns.write(grant, [4, 5]) == 3
    session.commit(turns.message(grant, "Hello, and", [4, 5]))
    assert stored_ids(await turns.begin(session, "Hello, and"), settings) == [1, 2, 3, 4, 5]


async def test_an_edited_history_keeps_the_common_part_and_lays_out_the_rest(session, turns, settings):
    await turns.run(session, "one", [1, 2])
    await turns.run(session, "one two", [3, 4])
    grant = await turns.begin(session, "one three")
    assert (grant.num_kept_tokens, grant.num_kept_chars, grant.last_kept_id) == (2, 3, 2)
    assert (grant.num_tokens, grant.num_computed_tokens) == (4, 4)
    # Not trimmed yet: the borrower finds out how much of the rest still agrees.
    assert stored_ids(grant, settings) == [1, 2, 3, 4]


async def test_a_commit_is_told_with_the_exact_memory(session, turns, settings, clock):
    grant = await turns.begin(session, "x")
    turns.write(grant, range(100))
    clock.now += 3
    stats = session.commit(turns.message(grant, "x", range(100)))
    assert stats.kv_cache_bytes == settings.layout.nbytes_used(100)
    assert (stats.num_tokens, stats.num_computed_tokens, stats.turns, stats.in_turn) == (100, 100, 1, False)


async def test_a_repeated_commit_is_stored_once(session, turns, journal, clock):
    grant = await turns.begin(session, "x")
    turns.write(grant, [1])
    message = turns.message(grant, "x", [1])
    first, second = session.commit(message), session.commit(message)
    assert first == second
    # How long recording took is told where something was recorded.
    assert (first.recorded, second.recorded) == (Stretch("journal.commit", clock.now, 0.0), None)
    later = await turns.begin(session, "x y")
    # Its answer was lost and it comes again, while the next turn runs.
    session.commit(message)
    assert session.in_turn
    assert len(journal.load()) == 1
    session.commit(turns.message(later, "x y", [2]))
    session.commit(message)
    assert [turn.text for turn in journal.load()] == ["x", " y"]


async def test_a_commit_with_impossible_numbers_stores_nothing(session, turns, journal):
    grant = await turns.begin(session, "x")
    bad = dataclasses.replace(turns.message(grant, "x", [1]), num_kept_tokens=5)
    with pytest.raises(ValueError, match="num_kept_tokens"):
        session.commit(bad)
    assert journal.load() == []
    assert session.in_turn
    assert session.commit(turns.message(grant, "x", [1])).turns == 1


async def test_another_sessions_commit_is_refused(session, turns):
    grant = await turns.begin(session, "x")
    with pytest.raises(ValueError, match="another session"):
        session.commit(dataclasses.replace(turns.message(grant, "x", [1]), key=SessionKey("tenant", "other")))


async def test_what_an_aborted_turn_left_goes(session, turns, settings, kit):
    await turns.run(session, "x", range(100))
    grant = await turns.begin(session, "xy")
    turns.write(grant, [7] * 1000)
    assert session.abandon(grant.epoch)
    assert not session.abandon(grant.epoch)
    grant = await turns.begin(session, "xz")
    assert (grant.num_tokens, grant.num_computed_tokens, grant.num_kept_tokens) == (100, 100, 100)
    assert stored_ids(grant, settings) == list(range(100))
    assert session.describe().kv_cache_bytes == settings.layout.nbytes_used(100)


async def test_what_an_aborted_turn_cut_off_is_laid_again(session, turns, settings):
    await turns.run(session, "x", range(100))
    grant = await turns.begin(session, "other")
    assert grant.num_kept_tokens == 0
    turns.write(grant, [0, 1, 2, 99])
    session.abandon(grant.epoch)
    grant = await turns.begin(session, "xz")
    assert (grant.num_tokens, grant.num_computed_tokens, grant.num_kept_tokens) == (100, 3, 100)
    assert stored_ids(grant, settings) == list(range(100))


async def test_trimmed_by_edits_equals_never_longer(session, turns, settings, clock, kit):
    other = Session.create(MemoryJournal(SessionKey("tenant", "b"), kit.fingerprint, clock), settings)
    for conversation in (session, other):
        await turns.run(conversation, "x", range(40), value=3)
    await turns.run(session, "x and much more", [9] * 900, value=9)
    for conversation in (session, other):
        await turns.run(conversation, "x!", [50, 51], value=4)
    first, second = session.describe(), other.describe()
    assert first.kv_cache_bytes == second.kv_cache_bytes
    segments = []
    for conversation in (session, other):
        grant = await turns.begin(conversation, "x!")
        segments.append(Segment.open(grant.segment, settings.layout, settings.fingerprint))
    kv = settings.layout.kv
    for region in range(kv.num_regions):
        rows = slice(region * kv.region_nbytes, region * kv.region_nbytes + 42 * kv.row_nbytes)
        assert segments[0].kv_buffer[rows] == segments[1].kv_buffer[rows]
    assert segments[0].token_ids() == segments[1].token_ids()
    for segment in segments:
        segment.close()


# Whose turn it is.


async def test_a_second_turn_waits_for_the_first(session, turns):
    grant = await turns.begin(session, "one")
    second = asyncio.create_task(turns.begin(session, "one two"))
    third = asyncio.create_task(turns.begin(session, "one two three"))
    await settle()
    assert session.describe().num_waiting == 2
    turns.write(grant, [1])
    session.commit(turns.message(grant, "one", [1]))
    granted = await second
    assert (granted.epoch, granted.num_kept_tokens) == (2, 1)
    assert not third.done()
    session.abandon(granted.epoch)
    assert (await third).epoch == 3


async def test_what_a_beginning_took_is_told(session, turns, clock):
    grant = await turns.begin(session, "one")
    came = clock.now
    second = asyncio.create_task(turns.begin(session, "one two"))
    await settle()
    clock.now += 3
    session.abandon(grant.epoch)
    told = (await second).stretches
    assert told == (Stretch("session.wait", came, 3.0), Stretch("journal.begin", came + 3, 0.0))


async def test_a_turn_that_does_not_end_makes_others_busy(session, turns):
    await turns.begin(session, "one")
    for wait_seconds in (0.0, 0.003):
        with pytest.raises(SessionBusy) as caught:
            await turns.begin(session, "two", wait_seconds=wait_seconds)
        assert caught.value.status == 409


async def test_a_turn_is_taken_over_once_all_its_writers_are_dead(session, turns, processes):
    engine, replica = ProcessId(10, 1), ProcessId(11, 1)
    await turns.run(session, "x", [1, 2])
    first = await turns.begin(session, "xy", writers=(engine, replica))
    turns.write(first, [3, 4, 5])
    waiting = asyncio.create_task(turns.begin(session, "xz", "second", writers=(ProcessId(12, 1),)))
    processes.dead.add(replica)
    await settle()
    with pytest.raises(SessionBusy):
        await turns.begin(session, "xz", wait_seconds=0.003)
    assert not waiting.done()
    processes.dead.add(engine)
    second = await asyncio.wait_for(waiting, 5)
    assert (second.epoch, second.num_tokens, second.num_kept_tokens) == (first.epoch + 1, 2, 2)
    with pytest.raises(StaleEpoch):
        session.commit(turns.message(first, "xy", [3, 4, 5]))
    assert session.in_turn
    assert session.commit(turns.message(second, "xz", [9], "second")).num_tokens == 3


async def test_a_dead_turn_does_not_make_the_next_wait_at_all(session, turns, processes):
    writer = ProcessId(10, 1)
    await turns.begin(session, "x", writers=(writer,))
    processes.dead.add(writer)
    assert (await turns.begin(session, "x", wait_seconds=0.0)).epoch == 2


async def test_a_turn_without_known_writers_is_never_taken_over(session, turns):
    await turns.begin(session, "x")
    with pytest.raises(SessionBusy):
        await turns.begin(session, "x", wait_seconds=0.003)


async def test_a_caller_that_gave_up_can_withdraw(session, turns):
    await turns.begin(session, "x", "first")
    waiting = asyncio.create_task(turns.begin(session, "x", "second"))
    await settle()
    assert session.withdraw("second")
    with pytest.raises(SessionBusy, match="withdrawn"):
        await waiting
    assert session.withdraw("first")
    assert not session.in_turn
    assert not session.withdraw("first")


async def test_a_caller_that_had_no_answer_asks_again_and_has_one_turn(session, turns):
    lost = await turns.begin(session, "x", "first")
    again = await turns.begin(session, "x", "first", wait_seconds=0.0)
    assert again.epoch == lost.epoch + 1
    waiting = asyncio.create_task(turns.begin(session, "x", "second"))
    await settle()
    asked_again = asyncio.create_task(turns.begin(session, "x", "second"))
    await settle()
    with pytest.raises(SessionBusy, match="withdrawn"):
        await waiting
    session.abandon(again.epoch)
    await asked_again
    assert session.describe().num_waiting == 0


async def test_a_cancelled_caller_holds_nobody_up(session, turns):
    first = await turns.begin(session, "x")
    waiting = asyncio.create_task(turns.begin(session, "x"))
    await settle()
    waiting.cancel()
    await settle()
    session.abandon(first.epoch)
    assert (await turns.begin(session, "x", wait_seconds=0.0)).epoch == 2


async def test_a_turn_that_cannot_begin_frees_the_gate(make_journal, key, settings, turns):
    journal = make_journal(key, busy_seconds=0.0)
    session = Session.create(journal, settings)
    other = make_journal(key)
    with other._transaction(), pytest.raises(JournalUnavailable):
        await turns.begin(session, "x")
    assert not session.in_turn
    assert (await turns.begin(session, "x", wait_seconds=0.0)).epoch == 1


# Memory.


async def test_a_dropped_cache_is_computed_again(session, turns, settings):
    await turns.run(session, "x", range(100))
    assert session.drop_cache() == 4 * 4 * PAGE
    assert session.drop_cache() == 0
    grant = await turns.begin(session, "xy")
    assert (grant.num_tokens, grant.num_computed_tokens, grant.num_kept_tokens) == (100, 0, 100)
    assert stored_ids(grant, settings) == list(range(100))


async def test_no_cache_is_dropped_in_a_turn(session, turns):
    await turns.run(session, "x", range(100))
    await turns.begin(session, "xy")
    before = session.describe().kv_cache_bytes
    assert session.drop_cache() == 0
    assert session.describe().kv_cache_bytes == before


async def test_cleared_equals_new(session, turns, journal, settings):
    await turns.run(session, "secret", range(500))
    stats = await session.clear()
    assert (stats.kv_cache_bytes, stats.num_tokens, stats.turns) == (PAGE, 0, 0)
    assert journal.load() == []
    grant = await turns.begin(session, "secret and more")
    assert (grant.num_kept_tokens, grant.num_tokens, grant.turns) == (0, 0, 0)
    turns.write(grant, [1])
    assert session.commit(turns.message(grant, "secret and more", [1])).turns == 1


async def test_clear_waits_for_the_turn_and_fences_it(session, turns, journal, processes):
    writer = ProcessId(10, 1)
    first = await turns.begin(session, "x", writers=(writer,))
    with pytest.raises(SessionBusy):
        await session.clear(wait_seconds=0.003)
    clearing = asyncio.create_task(session.clear())
    await settle()
    processes.dead.add(writer)
    await asyncio.wait_for(clearing, 5)
    with pytest.raises(StaleEpoch):
        session.commit(turns.message(first, "x", [1]))
    assert journal.load() == []
    assert not session.in_turn


async def test_a_hopeless_turn_is_left_behind_with_its_memory(session, turns, settings):
    await turns.run(session, "x", [1, 2, 3])
    stuck = await turns.begin(session, "xy")
    writer = Segment.open(stuck.segment, settings.layout, settings.fingerprint)
    session.replace_segment()
    with pytest.raises(StaleEpoch):
        session.commit(turns.message(stuck, "xy", [4]))
    grant = await turns.begin(session, "xz", wait_seconds=0.0)
    writer.append_tokens([66, 66, 66])
    assert grant.segment.nonce != stuck.segment.nonce
    assert (grant.num_tokens, grant.num_computed_tokens) == (3, 0)
    assert stored_ids(grant, settings) == [1, 2, 3]
    writer.close()


async def test_a_conversation_longer_than_the_segment_is_used_as_far_as_it_fits(journal, turns, settings, layout, kit):
    session = Session.create(journal, settings)
    await turns.run(session, "x", range(1000))
    await turns.run(session, "xy", range(500))
    small = dataclasses.replace(
        settings, layout=dataclasses.replace(layout, kv=dataclasses.replace(layout.kv, max_model_len=1200))
    )
    restored = Session.restore(journal, small)
    grant = await turns.begin(restored, "xyz")
    assert (grant.num_tokens, grant.num_kept_tokens, grant.num_kept_chars) == (1200, 1000, 1)
    assert stored_ids(grant, small) == [*range(1000), *range(200)]
    assert restored.match("xyz").num_kept_tokens == 1000


# Telling.


async def test_statistics(session, turns, clock, key):
    clock.now += 10
    stats = session.describe()
    assert (stats.key, stats.state, stats.in_turn, stats.turns) == (key, "active", False, 0)
    assert (stats.age_seconds, stats.idle_seconds, stats.activation_age_seconds) == (10, 10, 10)
    assert (stats.activation, stats.recycles, stats.activation_turns) == (1, 0, 0)
    grant = await turns.begin(session, "x")
    clock.now += 5
    assert session.describe().in_turn
    assert session.describe().idle_seconds == 0
    turns.write(grant, [1])
    session.commit(turns.message(grant, "x", [1]))
    clock.now += 2
    stats = session.describe()
    assert (stats.turns, stats.activation_turns, stats.idle_seconds, stats.age_seconds) == (1, 1, 2, 17)
    clock.now -= 100
    assert session.describe().idle_seconds == 0


async def test_matching_finds_the_conversation_that_a_prompt_goes_on_with(session, turns):
    await turns.run(session, "one two", [1, 2])
    assert session.match("one two three").num_kept_chars == 7
    assert session.match("another").num_kept_chars == 0
    assert session.last_prompt_chars == 7


# From the journal.


async def test_replay_into_new_memory(make_journal, key, settings, turns):
    first = Session.create(make_journal(key), settings)
    await turns.run(first, "one", [1, 2])
    await turns.run(first, "one two", [3, 4])
    restored = Session.restore(make_journal(key), settings)
    assert restored.describe().activation == 2
    grant = await turns.begin(restored, "one two three")
    assert (grant.epoch, grant.turns) == (3, 2)
    assert (grant.num_tokens, grant.num_computed_tokens, grant.num_kept_tokens) == (4, 0, 4)
    assert stored_ids(grant, settings) == [1, 2, 3, 4]


async def test_a_turn_under_way_is_committed_at_its_restored_session(make_journal, key, settings, turns):
    first = Session.create(make_journal(key), settings)
    await turns.run(first, "one", [1, 2])
    grant = await turns.begin(first, "one two")
    restored = Session.restore(make_journal(key), settings)
    message = turns.message(grant, "one two", [3])
    assert restored.commit(message).num_tokens == 3
    assert restored.commit(message).turns == 2
    later = await turns.begin(restored, "one two three")
    assert (later.num_kept_tokens, later.num_computed_tokens) == (3, 0)


async def test_a_stale_incarnation_catches_up_with_the_journal(make_journal, key, settings, turns):
    old = Session.create(make_journal(key), settings)
    await turns.run(old, "one", [1, 2])
    new = Session.restore(make_journal(key), settings)
    await turns.run(new, "one two", [3])
    grant = await turns.begin(old, "one two three")
    assert (grant.epoch, grant.turns, grant.num_kept_tokens, grant.num_computed_tokens) == (3, 2, 3, 2)


async def test_a_turn_begun_elsewhere_is_committed_here_on_what_it_built_on(make_journal, key, settings, turns):
    here = Session.create(make_journal(key), settings)
    elsewhere = Session.restore(make_journal(key), settings)
    await turns.run(elsewhere, "one", [1, 2])
    grant = await turns.begin(elsewhere, "one two")
    assert here.commit(turns.message(grant, "one two", [3])).num_tokens == 3


async def test_a_create_never_hides_stored_turns(make_journal, key, settings, turns, kit):
    first = Session.create(make_journal(key), settings)
    await turns.run(first, "one", [1])
    # SQLite keeps a file's descriptors while another connection of the process has it open.
    first.rest()
    before = kit.descriptors()
    journal = make_journal(key)
    with pytest.raises(ValueError, match="turns already"):
        Session.create(journal, settings)
    assert kit.descriptors() == before


async def test_another_models_ids_are_not_used_but_not_lost(make_journal, key, settings, turns):
    await turns.run(Session.create(make_journal(key), settings), "one", [1, 2])
    changed = dataclasses.replace(settings, fingerprint="model-2")
    journal = make_journal(key, "model-2")
    session = Session.restore(journal, changed)
    grant = await turns.begin(session, "one two")
    assert (grant.num_kept_tokens, grant.num_tokens) == (0, 0)
    session.abandon(grant.epoch)
    back = Session.restore(make_journal(key), settings)
    assert back.match("one two").num_kept_tokens == 2
    grant = await turns.begin(session, "one two")
    session.commit(turns.message(grant, "one two", [70, 71]))
    again = Session.restore(make_journal(key, "model-2"), changed)
    assert again.match("one two three").num_kept_tokens == 2
    assert [turn.text for turn in journal.load()] == ["one two"]


async def test_a_journal_that_contradicts_itself_is_a_typed_error(journal, key, settings, kit):
    journal.commit(kit.turn(key, journal.take_epoch().epoch, "x", [1], kept=(5, 5)))
    before = kit.descriptors()
    with pytest.raises(JournalCorrupt, match="contradicts"):
        Session.restore(journal, settings)
    assert kit.descriptors() == before


# Isolation.


async def test_two_interleaved_sessions_never_see_each_other(settings, turns, clock, kit):
    sessions = {}
    for name in ("a", "b"):
        journal = MemoryJournal(SessionKey("tenant", name), kit.fingerprint, clock)
        sessions[name] = (Session.create(journal, settings), os.urandom(16).hex(), journal)
    text = {"a": "", "b": ""}
    grants = {}
    for _ in range(12):
        for name, (session, canary, _journal) in sessions.items():
            text[name] += canary
            grants[name] = await turns.run(session, text[name], list(canary.encode()) * 4, value=ord(name))
    for name, other in (("a", "b"), ("b", "a")):
        session, canary, journal = sessions[name]
        foreign = sessions[other][1]
        content = os.pread(grants[name].segment.fd, settings.layout.nbytes, 0)
        assert kit.ids(list(canary.encode())) in content
        assert kit.ids(list(foreign.encode())) not in content
        assert bytes([ord(other)]) * 64 not in content
        for shown in (repr(session.describe()), repr(grants[name]), repr(journal.load())):
            assert canary not in shown
            assert foreign not in shown
        assert foreign not in "".join(turn.text for turn in journal.load())


async def test_a_request_waits_as_asked_in_another_session(session, settings, turns, clock, kit):
    """One session's turn is nothing to another's."""
    other = Session.create(MemoryJournal(SessionKey("tenant", "b"), kit.fingerprint, clock), settings)
    await turns.begin(session, "x")
    assert (await turns.begin(other, "x", wait_seconds=0.0)).epoch == 1


async def test_moved_is_the_answer_after_the_end(session, key, turns):
    await session.deactivate()
    assert await session.begin_turn(BeginTurn(key, "r", "x")) == Moved(key)
