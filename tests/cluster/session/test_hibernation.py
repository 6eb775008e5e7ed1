"""Sessions that leave memory and come back: warm where that can be, right in any case."""

from __future__ import annotations

import asyncio

import pytest

from phi_cluster.cluster.errors import NotFound, Overloaded, SessionBusy
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.hibernation_policy import HibernationPolicy
from phi_cluster.cluster.session.hibernation_store import FileHibernationStore, StorageFull
from phi_cluster.cluster.session.recycler import RecycleReason, SessionSnapshot, sleepers
from phi_cluster.cluster.session.segment import Segment

KEY = SessionKey("tenant", "sleeper")
TOKENS = list(range(1, 101))


@pytest.fixture
async def node(make_node):
    node = make_node()
    await node.turn(KEY, "first ", TOKENS, value=7)
    return node


def kept(tmp_path):
    return list(tmp_path.rglob("*.kv*"))


async def asleep(node, key=KEY):
    described = await node.keeper.hibernate(key)
    assert described["state"] == "hibernated"
    return described


def counts(node):
    return node.keeper._hibernation.counts


@pytest.mark.parametrize("place", ["keeper", "actor"])
async def test_a_session_sleeps_and_wakes_with_the_same_memory(node, place, tmp_path):
    if place == "actor":
        await node.keeper.recycle(KEY, RecycleReason.REQUESTED)
    before = await node.memory(KEY)
    described = await asleep(node)
    [path] = kept(tmp_path)
    assert (described["kv_cache_bytes"], described["actor_pid"], described["num_tokens"]) == (0, None, 100)
    assert described["disk_bytes"] == path.stat().st_size
    assert node.leases() == {}
    report = await node.keeper.report()
    assert (report.num_stored, report.num_hibernated, report.hibernated_nbytes) == (0, 1, path.stat().st_size)

    grant = await node.turn(KEY, "first second", [500], value=8)
    assert (grant.num_kept_tokens, grant.num_computed_tokens) == (100, 100)
    after = await node.memory(KEY)
    assert after[: 100 * 4] == before[: 100 * 4]
    for region in range(4):
        start = node.layout.kv_offset - node.layout.ids_offset + region * node.layout.kv.region_nbytes
        assert after[start : start + 12_800] == before[start : start + 12_800] == bytes([7]) * 12_800
    assert kept(tmp_path) == []
    # What it took is told with the turn; one that finds the session in memory has nothing of it.
    assert [one.name for one in grant.stretches] == ["session.wake", "session.wait", "journal.begin"]
    assert node.leases() == {KEY.digest: node.layout.nbytes_used(101)}
    assert (counts(node)["hibernations"], counts(node)["restores"]) == (1, 1)


async def test_it_survives_its_keeper(make_node, node):
    await asleep(node)
    later = make_node()
    described = (await later.listed("tenant"))[0]
    assert described["state"] == "hibernated"
    assert (await later.turn(KEY, "first second", [500])).num_computed_tokens == 100


async def test_an_empty_session_has_nothing_to_keep(node, tmp_path):
    other = SessionKey("tenant", "empty")
    grant, _ = await node.begin(other, "x")
    await node.keeper.abandon(other, grant.epoch)
    assert (await node.keeper.hibernate(other))["state"] == "stored"
    assert kept(tmp_path) == []


async def test_what_an_interrupted_turn_left_does_not_sleep(node, kit):
    grant, _ = await node.begin(KEY, "first second")
    segment = Segment.open(grant.segment, node.layout, kit.fingerprint)
    segment.append_tokens([777])
    kit.compute(segment, 9)
    segment.close()
    await node.keeper.abandon(KEY, grant.epoch)
    await asleep(node)
    assert (await node.turn(KEY, "first second", [500])).num_tokens == 100


async def test_a_session_in_a_turn_is_busy(node, tmp_path):
    grant, _ = await node.begin(KEY, "first second")
    with pytest.raises(SessionBusy):
        await node.keeper.hibernate(KEY)
    with pytest.raises(SessionBusy):
        await node.keeper.put_to_sleep(KEY)
    assert kept(tmp_path) == []
    await node.keeper.abandon(KEY, grant.epoch)
    assert (await node.keeper.describe(KEY))["state"] == "held"


async def test_turns_that_come_while_it_falls_asleep_wake_it(node):
    sleeping = asyncio.ensure_future(node.keeper.hibernate(KEY))
    turns = [asyncio.ensure_future(node.begin(KEY, "first second")) for _ in range(3)]
    await sleeping
    grant, _ = await turns[0]
    assert grant.num_computed_tokens == 100
    await node.keeper.abandon(KEY, grant.epoch)
    for turn in turns[1:]:
        grant, _ = await turn
        await node.keeper.abandon(KEY, grant.epoch)
    assert counts(node)["restores"] == 1


async def test_who_wakes_finds_out_that_it_was_deleted_just_now(node):
    await asleep(node)
    hibernation = node.keeper._hibernation
    waking = asyncio.ensure_future(hibernation.wake(KEY))
    await asyncio.sleep(0)
    # Asked for, not begun.
    assert hibernation._waking
    await hibernation.forget(KEY)
    await waking
    assert node.keeper._roster.find(KEY) is None


async def test_there_is_no_such_session(node):
    with pytest.raises(NotFound):
        await node.keeper.hibernate(SessionKey("tenant", "nobody"))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "another"])
async def test_a_bad_file_is_computed_anew_and_goes(make_node, node, tmp_path, damage):
    await asleep(node)
    [path] = kept(tmp_path)
    whole = bytearray(path.read_bytes())
    if damage == "flipped":
        whole[-100] ^= 1
        path.write_bytes(whole)
    elif damage == "cut":
        path.write_bytes(whole[:-1])
    elif damage == "gone":
        path.unlink()
    else:
        other = SessionKey("tenant", "other")
        await node.turn(other, "other ", TOKENS, value=66)
        await asleep(node, other)
        [others] = [one for one in kept(tmp_path) if one != path]
        path.write_bytes(others.read_bytes())
    grant = await node.turn(KEY, "first second", [500], value=8)
    assert (grant.num_kept_tokens, grant.num_computed_tokens) == (100, 0)
    assert bytes([66]) * 128 not in await node.memory(KEY)
    assert not path.exists()
    assert counts(node)["hibernation_failures"] == 1
    assert node.leases()[KEY.digest] == node.layout.nbytes_used(101)


async def test_a_file_that_the_journal_has_left_behind_is_stale(make_node, node, tmp_path):
    await asleep(node)
    [path] = kept(tmp_path)
    old = path.read_bytes()
    await node.turn(KEY, "first second", [500])
    await node.keeper.put_to_sleep(KEY)
    path.write_bytes(old)
    # Another keeper finds it.
    later = make_node()
    grant = await later.turn(KEY, "first second third", [600])
    assert (grant.num_kept_tokens, grant.num_computed_tokens) == (101, 0)
    assert kept(tmp_path) == []


async def test_a_memory_without_a_journal_goes(make_node, node, tmp_path):
    await asleep(node)
    for path in tmp_path.rglob("*.sqlite*"):
        path.unlink()
    assert (await make_node().keeper.report()).num_hibernated == 0
    assert kept(tmp_path) == []


@pytest.mark.parametrize("deed", ["delete", "clear"])
async def test_what_is_deleted_or_cleared_does_not_stay_on_the_disk(node, tmp_path, deed):
    await asleep(node)
    await getattr(node.keeper, deed)(KEY)
    assert kept(tmp_path) == []
    assert (await node.turn(KEY, "anew", [1])).num_kept_tokens == 0


async def test_a_fork_of_a_sleeper_is_warm(node):
    await asleep(node)
    fork = SessionKey("tenant", "fork")
    assert (await node.keeper.fork(KEY, fork, None))["kv_cache_bytes"] == node.layout.nbytes_used(100)


async def test_a_sleeper_that_is_renewed_wakes(node):
    await asleep(node)
    described = await node.keeper.recycle(KEY, RecycleReason.REQUESTED)
    assert (described["state"], described["kv_cache_bytes"]) == ("active", node.layout.nbytes_used(100))


class Failing(FileHibernationStore):
    def write(self, *arguments):
        raise OSError(28, "No space left on device")


async def test_a_full_disk_leaves_the_session_as_it_is(make_node, tmp_path):
    node = make_node(store=Failing(tmp_path, 2**30))
    await node.turn(KEY, "first ", TOKENS)
    for deed in (node.keeper.hibernate, node.keeper.put_to_sleep):
        # Small ones are not worth writing: make it one that is.
        node.keeper._hibernation.policy.tokens_per_second = 1.0
        with pytest.raises(StorageFull, match="No space left"):
            await deed(KEY)
    assert (await node.turn(KEY, "first second", [500])).num_computed_tokens == 100


async def test_what_made_room_on_the_disk_is_asleep_no_more(make_node, tmp_path):
    """The gauges, and what is told of a session, follow the files."""
    node = make_node(store=FileHibernationStore(tmp_path, 130_000, reserve_nbytes=0))
    keys = [SessionKey("tenant", f"s{i}") for i in range(4)]
    for key in keys:
        await node.turn(key, f"{key.session_id} ", TOKENS)
        await node.keeper.hibernate(key)
    node.keeper._hibernation.policy.tokens_per_second = 1.0
    files = kept(tmp_path)
    assert 0 < len(files) < len(keys)
    report = await node.keeper.report()
    assert (report.num_hibernated, report.num_stored) == (len(files), len(keys) - len(files))
    assert report.hibernated_nbytes == sum(path.stat().st_size for path in files)
    states = [(await node.keeper.describe(key))["state"] for key in keys]
    assert states == ["stored"] * (len(keys) - len(files)) + ["hibernated"] * len(files)
    # To be computed anew is no failure of the disk.
    assert (await node.turn(keys[0], "s0 more", [500])).num_computed_tokens == 0
    assert (await node.keeper.report()).counts.get("hibernation_failures", 0) == 0


async def test_want_of_memory_puts_the_idlest_to_sleep(make_node, tmp_path, clock):
    node = make_node(budget=200_000)
    node.keeper._hibernation.policy.tokens_per_second = 1.0
    keys = [SessionKey("tenant", f"s{i}") for i in range(5)]
    for key in keys:
        clock.now += 1
        await node.turn(key, f"{key.session_id} ", TOKENS)
    states = {one["id"]: one["state"] for one in await node.listed("tenant")}
    assert states == {"s0": "hibernated", "s1": "hibernated", "s2": "hibernated", "s3": "held", "s4": "held"}
    assert sum(node.leases().values()) <= 200_000
    # All of them go on where they were.
    for key in keys:
        clock.now += 1
        assert (await node.turn(key, f"{key.session_id} more", [500])).num_computed_tokens == 100


async def test_want_of_memory_takes_sessions_from_their_actors(make_node, clock):
    node = make_node(budget=200_000)
    node.keeper._hibernation.policy.tokens_per_second = 1.0
    await node.turn(KEY, "first ", TOKENS)
    await node.keeper.recycle(KEY, RecycleReason.REQUESTED)
    clock.now += 1
    for i in range(2):
        await node.turn(SessionKey("tenant", f"s{i}"), "x", TOKENS)
    assert (await node.keeper.describe(KEY))["state"] == "hibernated"
    assert (await node.keeper.report()).recycles["memory_pressure"] == 1


async def test_want_of_memory_passes_over_who_is_changing_hands(make_node, clock):
    node = make_node(budget=200_000)
    first, second = SessionKey("tenant", "first"), SessionKey("tenant", "second")
    for key in (first, second):
        await node.turn(key, "first ", TOKENS)
        clock.now += 10
    async with node.keeper._roster.find(first).moving:
        await node.turn(SessionKey("tenant", "newcomer"), "x", TOKENS)
        assert node.keeper._roster.find(second) is None
        assert first.digest in node.leases()


async def test_want_of_memory_takes_all_of_a_session_also_without_a_disk(make_node):
    """Also the page that one without a cache takes: a turn may want all there is."""
    node = make_node(budget=200_000, store=None)
    await node.turn(KEY, "first ", TOKENS)
    await node.keeper.recycle(KEY, RecycleReason.REQUESTED)
    await node.keeper.clear(KEY)
    assert node.leases()[KEY.digest] > 0
    newcomer = SessionKey("tenant", "newcomer")
    grant, _ = await node.begin(newcomer, "x")
    await node.keeper._memory.reserve(newcomer, 200_000)
    assert node.leases() == {newcomer.digest: 200_000}
    await node.keeper.abandon(newcomer, grant.epoch)


async def test_want_of_memory_is_met_also_if_the_disk_is_full(make_node, tmp_path, clock):
    node = make_node(budget=200_000, store=Failing(tmp_path, 2**30))
    node.keeper._hibernation.policy.tokens_per_second = 1.0
    for i in range(4):
        clock.now += 1
        await node.turn(SessionKey("tenant", f"s{i}"), "x", TOKENS)
    assert (await node.keeper.describe(SessionKey("tenant", "s0")))["state"] == "stored"


async def test_who_wakes_waits_for_memory_and_stays_asleep_without(make_node, tmp_path):
    node = make_node(budget=100_000)
    await node.turn(KEY, "first ", TOKENS)
    await asleep(node)
    other = SessionKey("tenant", "other")
    grant, _ = await node.begin(other, "x")
    await node.keeper.reserve(other, 100)
    with pytest.raises(Overloaded):
        await node.begin(KEY, "first second")
    assert len(kept(tmp_path)) == 1
    await node.keeper.abandon(other, grant.epoch)
    assert (await node.turn(KEY, "first second", [500])).num_computed_tokens == 100


async def test_what_is_computed_sooner_is_not_read(node, tmp_path):
    policy = node.keeper._hibernation.policy
    policy.tokens_per_second = 1e9
    # By policy it would not even be written; who asks for it gets it.
    await asleep(node)
    assert (await node.turn(KEY, "first second", [500])).num_computed_tokens == 0
    assert kept(tmp_path) == []
    await node.keeper.put_to_sleep(KEY)
    assert (await node.keeper.describe(KEY))["state"] == "stored"
    assert kept(tmp_path) == []


async def test_nothing_hibernates_where_there_is_no_store(settings, make_node, node):
    node.keeper._hibernation._store = None
    with pytest.raises(StorageFull, match="hibernate_quota is 0"):
        await node.keeper.hibernate(KEY)


def test_the_rule_follows_what_is_measured():
    policy = HibernationPolicy()
    # 23 KB a token.
    assert policy.is_worth_restoring(1000, 23_000_000)
    assert not policy.is_worth_restoring(5, 115_000)
    for _ in range(30):
        policy.computed(4000, 10, 0.4)
    assert policy.tokens_per_second == pytest.approx(10_000, rel=0.01)
    assert not policy.is_worth_restoring(1000, 23_000_000)
    for _ in range(30):
        policy.restored(23_000_000, 0.01)
    assert policy.is_worth_restoring(1000, 23_000_000)
    before = policy.tokens_per_second
    # Replies, small prompts and clocks that stand still say nothing.
    for arguments in ((300, 200, 1.0), (10, 1, 1.0), (1000, 1, 0.0)):
        policy.computed(*arguments)
    assert policy.tokens_per_second == before


def test_who_sleeps_is_who_has_idled_longest():
    snapshots = [
        SessionSnapshot("a", 0.0, 90.0, 1),
        SessionSnapshot("b", 0.0, 10.0, 1),
        SessionSnapshot("c", 0.0, 50.0, 1),
        SessionSnapshot("d", 0.0, 0.0, 1, in_turn=True),
    ]
    assert sleepers(snapshots, 40.0, 100.0, 9) == ["b", "c"]
    assert sleepers(snapshots, 40.0, 100.0, 1) == ["b"]
    assert sleepers(snapshots, None, 100.0, 9) == []
