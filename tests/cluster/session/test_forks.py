"""Forks: the same conversation and a private copy of its memory, wherever the source is, and whatever fails."""

from __future__ import annotations

import asyncio

import pytest

from phi_cluster.cluster.errors import InvalidRequest, NotFound, SessionBusy, SessionExists
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.journal import JournalFull
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.segment import Segment
from phi_cluster.cluster.session.sqlite_journal import journal_path

SOURCE, FORK = SessionKey("tenant", "source"), SessionKey("tenant", "fork")
# 128 bytes a row: 100 tokens are 4 pages in each of 4 regions.
FIRST, SECOND = list(range(1, 101)), list(range(200, 240))


@pytest.fixture
async def node(make_node):
    node = make_node()
    await node.turn(SOURCE, "first ", FIRST, value=7)
    await node.turn(SOURCE, "first second ", SECOND, value=8)
    return node


async def fork(node, turn=None, new=FORK):
    return await node.keeper.fork(SOURCE, new, turn)


def exact(node, num_tokens):
    return node.layout.nbytes_used(num_tokens)


@pytest.mark.parametrize("place", ["keeper", "actor"])
async def test_a_fork_has_conversation_and_memory_of_its_own(node, place):
    if place == "actor":
        assert (await node.keeper.recycle(SOURCE, RecycleReason.REQUESTED))["state"] == "active"
    before = await node.memory(SOURCE)
    described = await fork(node)
    assert (described["id"], described["num_tokens"], described["turns"]) == ("fork", 140, 2)
    assert described["kv_cache_bytes"] == exact(node, 140)
    assert await node.memory(FORK) == before
    # Exactly what is there is leased, for each.
    assert node.leases() == {SOURCE.digest: exact(node, 140), FORK.digest: exact(node, 140)}

    assert (await node.turn(FORK, "first second fork", [900], value=55)).num_computed_tokens == 140
    assert await node.memory(SOURCE) == before
    assert (await node.turn(SOURCE, "first second source", [901], value=66)).num_computed_tokens == 140
    assert bytes([66]) * 128 not in await node.memory(FORK)
    assert bytes([55]) * 128 not in await node.memory(SOURCE)
    assert (await node.keeper.describe(SOURCE))["turns"] == (await node.keeper.describe(FORK))["turns"] == 3


async def test_a_fork_outlives_its_source(node):
    await fork(node)
    await node.keeper.delete(SOURCE)
    assert (await node.turn(FORK, "first second more", [900])).num_computed_tokens == 140


async def test_a_fork_of_an_earlier_turn_has_nothing_of_the_later_ones(node):
    described = await fork(node, turn=1)
    assert (described["num_tokens"], described["turns"]) == (100, 1)
    assert described["kv_cache_bytes"] == exact(node, 100)
    memory = await node.memory(FORK)
    assert bytes([7]) * 128 in memory
    assert bytes([8]) not in memory.replace(bytes([8, 0, 0, 0]), b"")
    grant = await node.turn(FORK, "first other", [300], value=9)
    assert (grant.num_computed_tokens, grant.num_kept_tokens) == (100, 100)
    assert [turn.text for turn in node.journals.open(FORK).load()] == ["first ", "other"]


async def test_turns_that_an_edit_took_away_do_not_count(node):
    await node.turn(SOURCE, "first edited ", [500], value=9)
    assert (await fork(node, turn=2))["num_tokens"] == 101
    with pytest.raises(InvalidRequest, match="has 2 turns"):
        await fork(node, turn=3, new=SessionKey("tenant", "other"))


async def test_what_only_the_disk_has_is_forked_on_the_disk(make_node, node):
    later = make_node()
    described = await later.keeper.fork(SOURCE, FORK, None)
    assert (described["state"], described["num_tokens"], described["kv_cache_bytes"]) == ("stored", 140, 0)
    assert later.leases() == {}
    grant = await later.turn(FORK, "first second more", [900])
    assert (grant.num_kept_tokens, grant.num_computed_tokens) == (140, 0)
    # It survives its keeper as well.
    assert (await make_node().keeper.describe(FORK))["turns"] == 3


async def test_a_cache_that_was_dropped_is_not_copied(node):
    node.keeper._roster.find(SOURCE).session.drop_cache()
    assert (await fork(node))["state"] == "stored"


async def test_what_an_interrupted_turn_left_is_not_copied(node):
    grant, _ = await node.begin(SOURCE, "first second third")
    segment = Segment.open(grant.segment, node.layout, node.settings.fingerprint)
    segment.append_tokens([777])
    segment.close()
    await node.keeper.abandon(SOURCE, grant.epoch)
    assert (await fork(node))["num_tokens"] == 140


async def test_a_fork_waits_for_the_turn_under_way(node):
    grant, _ = await node.begin(SOURCE, "first second third")
    forking = asyncio.ensure_future(fork(node))
    await asyncio.sleep(0.01)
    assert not forking.done()
    await node.keeper.abandon(SOURCE, grant.epoch)
    assert (await forking)["num_tokens"] == 140


async def test_a_long_turn_is_a_conflict_and_leaves_nothing(node):
    grant, _ = await node.begin(SOURCE, "first second third")
    with pytest.raises(SessionBusy):
        await fork(node)
    await node.keeper.abandon(SOURCE, grant.epoch)
    assert not node.keeper._roster.is_known(FORK)
    assert set(node.leases()) == {SOURCE.digest}


@pytest.mark.parametrize("taken", [FORK, SOURCE])
async def test_a_name_that_is_taken(node, taken):
    await node.turn(FORK, "mine", [1])
    with pytest.raises(SessionExists) as refused:
        await fork(node, new=taken)
    assert (refused.value.status, refused.value.code, refused.value.param) == (409, "session_exists", "id")
    assert (await node.keeper.describe(FORK))["num_tokens"] == 1


async def test_two_forks_to_one_name(node):
    ends = await asyncio.gather(fork(node), fork(node), return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["SessionExists", "dict"]
    assert node.leases() == {SOURCE.digest: exact(node, 140), FORK.digest: exact(node, 140)}


async def test_a_session_that_begins_under_the_new_name_meanwhile_wins(node, monkeypatch):
    grant, _ = await node.begin(SOURCE, "first second third")
    forking = asyncio.ensure_future(fork(node))
    await asyncio.sleep(0.01)
    await node.turn(FORK, "mine", [1])
    await node.keeper.abandon(SOURCE, grant.epoch)
    with pytest.raises(SessionExists):
        await forking
    assert node.leases() == {SOURCE.digest: exact(node, 140), FORK.digest: exact(node, 1)}
    assert (await node.keeper.describe(FORK))["num_tokens"] == 1


async def test_there_is_no_such_session(node):
    with pytest.raises(NotFound):
        await node.keeper.fork(SessionKey("other", "source"), FORK, None)
    with pytest.raises(InvalidRequest, match="turn is 3"):
        await fork(node, turn=3)


async def test_without_room_a_fork_is_computed_anew(make_node):
    node = make_node(budget=150_000)
    await node.turn(SOURCE, "first ", FIRST)
    assert node.layout.nbytes_used(100) * 2 < 150_000 < node.layout.nbytes_used(100) * 3
    assert (await fork(node))["state"] == "held"
    # The first fork's cache is idle, and gives way; the source's own cannot, while it is copied.
    second = SessionKey("tenant", "second")
    assert (await fork(node, new=second))["state"] in ("held", "stored")
    total = sum(node.leases().values())
    assert total <= 150_000
    resident = [one["kv_cache_bytes"] for one in await node.listed("tenant")]
    assert sum(resident) == total
    for key in (SOURCE, FORK, second):
        await node.turn(key, "first more", [5])


async def test_a_full_disk_leaves_nothing(node, monkeypatch, kit):
    before = kit.descriptors()
    opened = node.journals.open

    class Full:
        def __init__(self, key):
            self._journal = opened(key)

        def fill(self, turns, fingerprint):
            raise JournalFull("the disk is full")

        def __getattr__(self, name):
            return getattr(self._journal, name)

    node.journals.open = Full
    with pytest.raises(JournalFull):
        await fork(node)
    node.journals.open = opened
    assert set(node.leases()) == {SOURCE.digest}
    assert len(kit.descriptors()) <= len(before)
    assert not node.keeper._roster.is_known(FORK)
    assert (await fork(node))["state"] == "held"


async def test_the_fork_of_an_actor_that_dies_in_the_middle(node):
    await node.keeper.recycle(SOURCE, RecycleReason.REQUESTED)
    node.actors.kill(node.actors.made[-1][1])
    with pytest.raises(Exception, match="actor"):
        await fork(node)
    # As whoever noticed its death would tell.
    await node.keeper.actor_died(SOURCE)
    assert (await fork(node))["kv_cache_bytes"] == exact(node, 140)
    samples = [sample for *_, some in (await node.keeper.report()).snapshot for sample in some]
    assert ("phi_recoveries_total", {"component": "session_actor", "reason": "death"}, 1.0) in samples
    assert ("phi_recovery_seconds_count", {"component": "session_actor"}, 1.0) in samples


async def test_a_journal_that_could_not_be_filled_is_not_there(node, make_journal, tmp_path):
    journal = make_journal(FORK)
    turns = node.journals.open(SOURCE).load()

    class Broken(list):
        def __iter__(self):
            yield from list.__iter__(self)
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        journal.fill(Broken(turns), "model-1")
    assert not journal_path(tmp_path, FORK).exists()
