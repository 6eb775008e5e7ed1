"""Journals in a real Redis: several writers, its death and its silence, damage, versions, and what lies in it.

What all journals do is in test_journal.py.
"""

from __future__ import annotations

import threading
import time

import pytest
import redis

from phi_cluster.cluster.errors import StaleEpoch, StartError
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.journal import JournalCorrupt, JournalFull, JournalTooNew, JournalUnavailable
from phi_cluster.cluster.session.redis_journal import RedisJournals
from phi_cluster.cluster.session.redis_server import check_server
from tests.redis_process import RedisProcess


def fill(journal, kit, num_turns=1, num_chars=10):
    for number in range(num_turns):
        kept = (num_chars * number, 2 * number)
        journal.commit(kit.turn(journal.key, journal.take_epoch().epoch, "s" * num_chars, [1, 2], kept=kept))


@pytest.fixture
def raw(redis_process):
    client = redis.Redis.from_url(redis_process.url)
    yield client
    client.close()


@pytest.fixture
def journals(redis_process, kit, clock, raw):
    raw.flushdb()
    return RedisJournals(redis_process.connect(), kit.fingerprint, clock)


def test_another_servers_turns_and_epochs_are_seen_at_once(journals, redis_process, key, kit, clock):
    here = journals.open(key)
    there = RedisJournals(redis_process.connect(), kit.fingerprint, clock).open(key)
    fill(here, kit)
    missed = there.take_epoch().epoch
    epoch = there.take_epoch().epoch
    assert here.info().epoch == epoch
    with pytest.raises(StaleEpoch):
        here.commit(kit.turn(key, missed, "late", [1]))
    there.commit(kit.turn(key, epoch, "more", [3], kept=(10, 2)))
    assert [turn.text for turn in here.load()] == ["s" * 10, "more"]


def test_who_began_the_last_turn_is_told_with_the_epoch_and_at_a_glance(journals, redis_process, key, kit, clock, raw):
    one, other = (RedisJournals(redis_process.connect(), kit.fingerprint, clock, name) for name in ("n1", "n2"))
    # As an earlier version wrote it, or a server that is alone.
    assert journals.open(key).take_epoch().seat is None
    assert raw.hget(f"phi-cluster:{{{key.digest}}}:session", "seat") is None
    assert journals.glance(key).seat is None
    first = one.open(key).take_epoch()
    assert first.seat is None
    assert journals.glance(key).seat == "n1"
    # Neither looking, nor another incarnation, nor a commit is a turn.
    assert other.open(key).info().seat == "n1"
    assert other.open(key).activate(recycled=False).seat == "n1"
    assert one.open(key).commit(kit.turn(key, first.epoch, "said", [1]))
    second = other.open(key).take_epoch()
    assert (second.epoch, second.seat) == (first.epoch + 1, "n1")
    assert one.glance(key).seat == one.open(key).info().seat == "n2"


def test_memory_that_is_brought_to_a_node_brings_the_turns_with_it(journals, redis_process, key, kit, clock, raw):
    here = RedisJournals(redis_process.connect(), kit.fingerprint, clock, "n1")
    there = RedisJournals(redis_process.connect(), kit.fingerprint, clock, "n2")
    # It makes nothing of what is deleted.
    there.take_seat(key)
    assert raw.keys() == []
    epoch = here.open(key).take_epoch().epoch
    there.take_seat(key)
    assert there.glance(key).seat == "n2"
    # No epoch is taken for it: a turn that is under way may still be recorded.
    assert here.open(key).commit(kit.turn(key, epoch, "said", [1]))
    journals.take_seat(key)
    assert there.glance(key).seat == "n2"


def test_of_many_who_take_epochs_at_once_only_the_last_can_commit(journals, redis_process, key, kit, clock):
    taken: list[int] = []
    committed: list[int] = []
    begin = threading.Barrier(8)

    def write() -> None:
        journal = RedisJournals(redis_process.connect(), kit.fingerprint, clock).open(key)
        begin.wait()
        for _ in range(20):
            epoch = journal.take_epoch().epoch
            taken.append(epoch)
            try:
                journal.commit(kit.turn(key, epoch, str(epoch), [1], kept=(0, 0)))
                committed.append(epoch)
            except StaleEpoch:
                pass

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 161))
    # Each turn superseded the one before it, so the last one is what is left.
    assert [turn.epoch for turn in journals.open(key).load()] == [max(committed)]
    assert journals.open(key).info().turns == len(committed)


def test_a_turn_is_dropped_with_the_one_that_supersedes_it_and_the_checksums_follow(journals, key, kit):
    journal = journals.open(key)
    fill(journal, kit, num_turns=4)
    journal.commit(kit.turn(key, journal.take_epoch().epoch, "edited", [9], kept=(10, 2)))
    assert [turn.text for turn in journal.load()] == ["s" * 10, "edited"]
    assert journals.glance(key).num_tokens == 3
    assert journal.info().turns == 5


def test_sessions_are_listed_and_glanced_at(journals, key, kit, clock):
    keys = {SessionKey(tenant, f"demo-{n}") for tenant in ("a", "b") for n in range(3)}
    for one in keys:
        fill(journals.open(one), kit, num_turns=2)
    assert set(journals.keys()) == keys
    assert journals.nbytes() > 0
    seen = journals.glance(next(iter(keys)))
    assert (seen.num_tokens, seen.turns, seen.recycles) == (4, 2, 0)
    assert journals.glance(key) is None
    assert key not in set(journals.keys())


def test_of_a_deleted_session_nothing_is_left_in_memory_and_names_show_only_digests(journals, raw, kit):
    key = SessionKey("tenant", "my-secret-name")
    journal = journals.open(key)
    fill(journal, kit, num_turns=3)
    assert all(key.digest in name.decode() and b"secret" not in name for name in raw.keys("*"))
    journal.delete()
    assert raw.keys("*") == []
    # A turn of the deleted session finds nobody who knows it.
    with pytest.raises(StaleEpoch):
        journal.commit(kit.turn(key, 3, "late", [1]))
    assert raw.keys("*") == []


def test_cleared(journals, key, kit):
    journal = journals.open(key)
    fill(journal, kit, num_turns=3)
    epoch = journal.info().epoch
    journal.clear()
    assert journal.load() == []
    assert (journal.info().turns, journal.info().epoch) == (0, epoch)
    fill(journal, kit)
    assert len(journal.load()) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw, stem: raw.hdel(f"{stem}:turns", raw.hkeys(f"{stem}:turns")[0]),
        lambda raw, stem: raw.hset(f"{stem}:turns", "1", b"\x00" * 40),
        lambda raw, stem: raw.hset(
            f"{stem}:turns", "1", raw.hget(f"{stem}:turns", "1")[:-2] + b"\x01" + raw.hget(f"{stem}:turns", "1")[-1:]
        ),
        lambda raw, stem: raw.hset(f"{stem}:turns", "2", raw.hget(f"{stem}:turns", "1")),
        lambda raw, stem: (raw.delete(f"{stem}:turns"), raw.set(f"{stem}:turns", "mine")),
    ],
)
def test_damage_is_told(journals, raw, key, kit, damage):
    journal = journals.open(key)
    epoch = 1
    journal.take_epoch()
    journal.commit(kit.turn(key, epoch, "one", [1, 2]))
    damage(raw, f"phi-cluster:{{{key.digest}}}")
    with pytest.raises(JournalCorrupt):
        journal.load()


def test_a_later_versions_journal_is_left_alone(journals, raw, key, kit):
    journal = journals.open(key)
    fill(journal, kit)
    raw.hset(f"phi-cluster:{{{key.digest}}}:session", "version", "2")
    before = {name: raw.hgetall(name) for name in raw.keys("*")}
    for call in (journal.info, journal.take_epoch, journal.load, journal.clear):
        with pytest.raises(JournalTooNew):
            call()
    with pytest.raises(JournalTooNew):
        journal.commit(kit.turn(key, 2, "x", [1]))
    assert {name: raw.hgetall(name) for name in raw.keys("*")} == before


def test_what_was_acknowledged_survives_redis_own_kill_9(tmp_path_factory, key, kit, clock):
    folder = tmp_path_factory.mktemp("r")
    first = RedisProcess(folder)
    try:
        journal = RedisJournals(first.connect(), kit.fingerprint, clock).open(key)
        fill(journal, kit, num_turns=3)
        first.kill()
        with pytest.raises(JournalUnavailable):
            journal.load()
    finally:
        first.kill()
    second = RedisProcess(folder)
    try:
        time.sleep(1.1)  # a server that failed is left alone for a second
        assert len(journal.load()) == 3
    finally:
        second.kill()


def test_a_silent_server_holds_nobody_up_for_long(tmp_path_factory, key, kit, clock):
    process = RedisProcess(tmp_path_factory.mktemp("r"))
    try:
        journals = RedisJournals(process.connect(), kit.fingerprint, clock)
        fill(journals.open(key), kit)
        with process.stopped():
            with pytest.raises(JournalUnavailable) as caught:
                journals.open(key).take_epoch()
            assert caught.value.retry_after
            # For the next second others are told so without being asked.
            begin = time.monotonic()
            for number in range(100):
                with pytest.raises(JournalUnavailable):
                    journals.open(SessionKey("tenant", str(number))).info()
            assert time.monotonic() - begin < 1.0
    finally:
        process.kill()


def test_a_full_server_is_told_from_a_damaged_journal(tmp_path_factory, key, kit, clock):
    process = RedisProcess(tmp_path_factory.mktemp("r"), "--maxmemory", "4mb")
    try:
        journal = RedisJournals(process.connect(), kit.fingerprint, clock).open(key)
        fill(journal, kit)
        with pytest.raises(JournalFull):
            fill(journal, kit, num_turns=50, num_chars=1_000_000)
        assert len(journal.load()) >= 1
    finally:
        process.kill()


def test_a_server_that_cannot_hold_journals_is_refused_at_the_start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("r")
    with pytest.raises(StartError, match="start it, or mend the URL"):
        check_server(f"unix://{folder}/nobody.sock")
    process = RedisProcess(folder, "--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(StartError, match="noeviction"):
            check_server(process.url)
    finally:
        process.kill()
    process = RedisProcess(folder, "--appendonly", "no")
    try:
        assert "appendfsync always" in check_server(process.url)[0]
    finally:
        process.kill()


def test_a_durable_server_needs_no_note(redis_process):
    assert check_server(redis_process.url) == []
