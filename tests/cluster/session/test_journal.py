"""All journals: who may commit, what comes back, what is superseded."""

import dataclasses
import pickle

import pytest

from phi_cluster.cluster.errors import StaleEpoch
from phi_cluster.cluster.session.journal import JournalCorrupt, MemoryJournal
from phi_cluster.cluster.session.redis_journal import RedisJournals
from phi_cluster.cluster.session.transcript import Transcript


@pytest.fixture(params=["memory", "sqlite", "redis"])
def journal(request, key, clock, kit, make_journal):
    if request.param == "redis":
        process = request.getfixturevalue("redis_process")
        journal = RedisJournals(process.connect(), kit.fingerprint, clock).open(key)
        journal.delete()
        return journal
    if request.param == "memory":
        return MemoryJournal(key, kit.fingerprint, clock)
    return make_journal(key)


def test_a_new_journal_is_empty(journal, clock, kit):
    clock.now += 5
    assert journal.load() == []
    info = journal.info()
    assert (info.epoch, info.turns, info.activation, info.recycles) == (0, 0, 0, 0)
    assert info.fingerprint == kit.fingerprint
    assert info.created_at in (clock.now, clock.now - 5)


def test_committed_turns_come_back_whole_and_in_order(journal, key, kit):
    stored = []
    for text in ("héllo\ufdd0 <|end|>", "", "lone \ud800 and \x00"):
        epoch = journal.take_epoch().epoch
        turn = kit.turn(key, epoch, text, [1, -2, 2**31 - 1], kept=(len(stored) * 100, len(stored) * 100))
        assert journal.commit(turn) is True
        stored.append(turn)
    assert journal.load() == stored
    journal.close()
    assert journal.load() == stored
    assert journal.info().turns == 3


def test_epochs_rise_by_one(journal):
    assert [journal.take_epoch().epoch for _ in range(3)] == [1, 2, 3]
    assert journal.info().epoch == 3


def test_a_stale_writer_is_refused(journal, key, kit):
    old = journal.take_epoch().epoch
    new = journal.take_epoch().epoch
    with pytest.raises(StaleEpoch):
        journal.commit(kit.turn(key, old, "old", [1]))
    with pytest.raises(StaleEpoch):
        journal.commit(kit.turn(key, new + 1, "never begun", [1]))
    assert journal.load() == []
    journal.commit(kit.turn(key, new, "new", [1]))
    assert [turn.text for turn in journal.load()] == ["new"]


def test_a_journal_made_of_anothers_turns(journal, key, kit, clock, make_journal):
    other = dataclasses.replace(key, session_id="other")
    turns = [kit.turn(other, 5, "one ", [1, 2]), kit.turn(other, 8, "two", [3], kept=(4, 2))]
    clock.now += 100
    journal.fill(turns, "another model")
    assert journal.load() == [dataclasses.replace(turn, key=key) for turn in turns]
    info = journal.info()
    assert (info.turns, info.activation, info.fingerprint, info.created_at) == (2, 0, "another model", clock.now)
    # Beyond the turns' own.
    assert info.epoch == 9
    journal.close()
    assert len(journal.load()) == 2
    epoch = journal.take_epoch().epoch
    assert journal.commit(kit.turn(key, epoch, "three", [4], kept=(7, 3)))
    with pytest.raises(ValueError, match=r"new|there is a journal"):
        journal.fill(turns, "another model")
    assert len(journal.load()) == 3


def test_a_repeated_commit_stores_nothing_new_even_after_the_next_turn_began(journal, key, kit):
    turn = kit.turn(key, journal.take_epoch().epoch, "once", [1])
    assert journal.commit(turn) is True
    assert journal.commit(turn) is False
    journal.take_epoch()
    assert journal.commit(turn) is False
    assert journal.load() == [turn]
    assert journal.info().turns == 1


def test_an_epoch_is_one_requests_only(journal, key, kit):
    turn = kit.turn(key, journal.take_epoch().epoch, "once", [1])
    journal.commit(turn)
    with pytest.raises(StaleEpoch):
        journal.commit(dataclasses.replace(turn, request_id="another"))


def test_activations_and_recycles_are_counted(journal):
    assert journal.activate(recycled=False).activation == 1
    info = journal.activate(recycled=True)
    assert (info.activation, info.recycles) == (2, 1)
    assert journal.info() == info


def test_clear_drops_turns_and_keeps_the_epoch(journal, key, kit):
    turn = kit.turn(key, journal.take_epoch().epoch, "secret", [1])
    journal.commit(turn)
    journal.clear()
    assert journal.load() == []
    assert (journal.info().epoch, journal.info().turns) == (1, 0)
    assert journal.take_epoch().epoch == 2


def test_a_deleted_journal_begins_anew(journal, key, kit):
    journal.activate(recycled=True)
    journal.commit(kit.turn(key, journal.take_epoch().epoch, "secret", [1]))
    journal.delete()
    journal.delete()
    assert journal.load() == []
    assert (journal.info().epoch, journal.info().activation) == (0, 0)
    journal.delete()


def test_epochs_of_a_deleted_journal_never_come_again(journal, key, kit, clock):
    clock.now = 1_800_000_000.0
    journal.delete()
    before = [journal.take_epoch().epoch for _ in range(9)]
    clock.now += 0.1
    journal.delete()
    assert journal.take_epoch().epoch > before[-1]
    with pytest.raises(StaleEpoch):
        journal.commit(kit.turn(key, before[0], "deleted", [1]))


def test_superseded_turns_go_and_what_is_left_replays_to_the_same(journal, key, kit):
    transcript = Transcript()

    def add(text, token_ids, kept):
        turn = kit.turn(key, journal.take_epoch().epoch, text, token_ids, kept=kept)
        journal.commit(turn)
        transcript.apply(turn)

    add("system", [1, 2, 3], (0, 0))
    add("first", [4, 5], (6, 3))
    add("second", [6, 7], (11, 5))
    assert len(journal.load()) == 3
    # Rewrites everything behind "system", but keeps one id more than the boundary's.
    add("other", [8], (6, 4))
    assert [turn.text for turn in journal.load()] == ["system", "first", "other"]
    add("again", [9], (6, 3))
    assert [turn.text for turn in journal.load()] == ["system", "again"]
    for _ in range(20):
        add("rewritten from the start", [1], (0, 0))
    assert len(journal.load()) == 1
    assert journal.info().turns == 25
    replayed = Transcript.replay(journal.load())
    assert (replayed.text, replayed.token_ids) == (transcript.text, transcript.token_ids)


def test_errors_cross_process_borders():
    error = pickle.loads(pickle.dumps(JournalCorrupt("broken")))
    assert (type(error), error.message, error.code) == (JournalCorrupt, "broken", "journal_corrupt")
