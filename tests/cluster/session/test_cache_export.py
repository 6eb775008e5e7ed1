"""Exported caches: the next turn is warm where the cache is this server's own work, and right in any case."""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest

from phi_cluster.cluster.errors import Overloaded, SessionBusy
from phi_cluster.cluster.messages import SessionKey
from phi_cluster.cluster.session.cache_export import MAGIC, ExportSecret, opened
from phi_cluster.cluster.session.recycler import RecycleReason
from phi_cluster.cluster.session.session_export import BadExport
from phi_cluster.cluster.session.spool import SpoolFile, open_spooled
from phi_cluster.cluster.session_api import ImportLimits

KEY, COPY = SessionKey("tenant", "demo"), SessionKey("other", "copy")
TOKENS = list(range(1, 101))
LIMITS = ImportLimits(vocab_size=1000, max_turns_nbytes=2**20)
EVERYTHING = 2**30
SECRET = bytes(range(32))


@pytest.fixture
async def node(make_node):
    node = make_node(export_secret=lambda: SECRET)
    await node.turn(KEY, "first ", TOKENS, value=7)
    return node


async def imported(node, data, key=COPY):
    """The description, and of how many tokens the next turn found keys and values."""
    described = await node.keeper.import_session(key, data, LIMITS)
    grant = await node.turn(key, "first second", [500], value=8)
    assert grant.num_kept_tokens == 100
    return described, grant.num_computed_tokens


def cache_in(data):
    with opened(data, 2**20) as given:
        return given.file.read() if given.has_cache else None


def start_of_cache(data):
    return len(data) - len(cache_in(data))


async def export(node, key=KEY, cache_up_to=EVERYTHING):
    """All bytes, as whoever fetches them finds them."""
    answer = await node.keeper.export(key, cache_up_to)
    if isinstance(answer, bytes):
        return answer
    with open_spooled(answer) as file:
        await node.keeper.export_fetched(answer.token)
        data = file.read()
    assert len(data) == answer.nbytes
    return data


@pytest.mark.parametrize("place", ["keeper", "actor", "hibernated"])
async def test_an_imported_session_is_warm(node, place):
    before = await node.memory(KEY)
    if place == "actor":
        await node.keeper.recycle(KEY, RecycleReason.REQUESTED)
    elif place == "hibernated":
        await node.keeper.hibernate(KEY)
    data = await export(node)
    described, num_computed = await imported(node, data)
    assert (described["state"], described["num_tokens"], described["turns"], num_computed) == ("held", 100, 1, 100)
    assert described["kv_cache_bytes"] == node.layout.nbytes_used(100)
    after = await node.memory(COPY)
    for region in range(4):
        start = node.layout.kv_offset - node.layout.ids_offset + region * node.layout.kv.region_nbytes
        assert after[start : start + 12_800] == before[start : start + 12_800] == bytes([7]) * 12_800
    # Both are leased, and nothing else is.
    assert node.leases() == {
        KEY.digest: node.layout.nbytes_used(100),
        COPY.digest: node.layout.nbytes_used(101),
    }
    # The source goes on.
    assert (await node.turn(KEY, "first second", [600])).num_computed_tokens == 100


async def test_only_so_much_as_fits_is_carried(node):
    turns = await export(node, KEY, None)
    for room, least, most in ((40_000, 40, 80), (8_000, 1, 10), (1_000, 0, 0), (0, 0, 0)):
        data = await export(node, KEY, room)
        assert len(data) <= max(room, len(turns))
        key = SessionKey("other", f"copy-{room}")
        _, num_computed = await imported(node, data, key)
        assert least <= num_computed <= most
        assert (cache_in(data) is None) == (most == 0)


async def test_what_is_damaged_or_foreign_is_computed_anew(node, make_node):
    whole = await export(node)
    start = start_of_cache(whole)
    rng_places = [start, start + 9, start + 40, start + 200, (start + len(whole)) // 2, len(whole) - 1]
    bad = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in rng_places]
    bad += [whole[:-1], whole[:start], whole[: start + 30], whole + b"x"]
    for number, data in enumerate(bad):
        key = SessionKey("other", f"bad-{number}")
        described, num_computed = await imported(node, data, key)
        assert (described["state"], num_computed) == ("stored", 0), number
    foreign = make_node(export_secret=lambda: bytes(32))
    _, num_computed = await imported(foreign, whole, SessionKey("other", "foreign"))
    assert num_computed == 0


async def test_a_cache_fits_only_its_own_turns(node):
    other = SessionKey("tenant", "other")
    await node.turn(other, "first ", [999, *TOKENS[1:]], value=9)
    mine, others = [await export(node, key) for key in (KEY, other)]
    forged = mine[: start_of_cache(mine)] + cache_in(others)
    _, num_computed = await imported(node, forged)
    assert num_computed == 0


async def test_damaged_turns_are_refused(node):
    data = await export(node)
    start = start_of_cache(data)
    for bad in (data[:12], data[:20], data[: start - 1], data[:60] + b"?" + data[61:], MAGIC + b"\xff" * 8 + data[16:]):
        with pytest.raises(BadExport):
            await node.keeper.import_session(COPY, bad, LIMITS)
    assert await node.listed("other") == []
    assert set(node.leases()) == {KEY.digest}


async def test_without_room_it_is_computed_anew(make_node):
    node = make_node(export_secret=lambda: SECRET, budget=100_000)
    await node.turn(KEY, "first ", TOKENS)
    data = await export(node)
    grant, _ = await node.begin(KEY, "first second")
    assert (await node.keeper.import_session(COPY, data, LIMITS))["state"] == "stored"
    assert node.leases() == {KEY.digest: node.layout.nbytes_used(100)}
    await node.keeper.abandon(KEY, grant.epoch)
    # Now the idle one gives way.
    later = SessionKey("other", "later")
    assert (await node.keeper.import_session(later, data, LIMITS))["state"] == "held"


async def test_a_session_in_a_turn_is_busy(node):
    grant, _ = await node.begin(KEY, "first second")
    with pytest.raises(SessionBusy):
        await export(node)
    assert cache_in(await export(node, KEY, None)) is None
    await node.keeper.abandon(KEY, grant.epoch)
    exports = await asyncio.gather(*(export(node) for _ in range(4)))
    assert all(cache_in(data) for data in exports)


async def test_nothing_stays_open(node, kit):
    def memories():
        return [name for name in kit.descriptors() if "phi-kv" in name]

    before = memories()
    data = await export(node)
    await node.keeper.import_session(COPY, data[:-1], LIMITS)
    assert memories() == before


def test_the_secret_is_made_once_and_private(tmp_path):
    path = tmp_path / "export.key"
    secret = ExportSecret(path)()
    assert len(secret) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert ExportSecret(path)() == secret
    assert os.listdir(tmp_path) == ["export.key"]
    path.write_bytes(b"short")
    with pytest.raises(OSError, match="should hold"):
        ExportSecret(path)()


async def test_exports_that_nobody_fetches_are_few(node):
    refs = [await node.keeper.export(KEY, EVERYTHING) for _ in range(8)]
    with pytest.raises(Overloaded):
        await node.keeper.export(KEY, EVERYTHING)
    # One without a cache is no file.
    assert isinstance(await node.keeper.export(KEY), bytes)
    for ref in refs:
        await node.keeper.export_fetched(ref.token)
    await node.keeper.export_fetched(refs[0].token)
    assert cache_in(await export(node)) is not None


async def test_a_long_import_comes_from_a_file(node, tmp_path):
    data = await export(node)
    with contextlib.closing(SpoolFile(tmp_path)) as file:
        file.write(data)
        described, num_computed = await imported(node, file.ref)
    assert (described["state"], num_computed) == ("held", 100)


async def test_turns_may_not_take_more_than_they_may(node):
    data = await export(node)
    few = ImportLimits(vocab_size=1000, max_turns_nbytes=100)
    for given in (data, await export(node, KEY, None)):
        with pytest.raises(BadExport, match="more than the 100 bytes"):
            await node.keeper.import_session(COPY, given, few)
